"""What a worker does not let hostile code do. Each attack fails, is reported, and harms no other.

Every test runs with all layers and with those that need no namespaces.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMITS, MIB, POLICIES, Sandbox

from moonlit.agents.sandbox.policy import Policy

REFUSED = ("PermissionError", "OSError", "FileNotFoundError", "ProcessLookupError")


def refused(sandbox: Sandbox, code: str) -> bool:
    """Run an attack and check that the pool still serves."""
    attacked, alive = sandbox.run(code, "6 * 7")
    assert alive.text == "42\n"
    return str(attacked.error).startswith(REFUSED)


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/self/maps').read()",
        "import os; os.listdir(os.path.expanduser('~root/.ssh'))",
        "import os; os.listdir('/')",
        "open('/proc/TRAINER/mem', 'rb').read(1)",
        "open('../outside', 'w')",
        "open('/tmp/outside', 'w')",
        "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
        "import os; os.symlink('..', 'up'); open('up/outside', 'w')",
        "import os; os.mkdir('d'); os.rename('d', '../d')",
        "import sys; open(sys.prefix + '/pyvenv.cfg', 'a')",
        "import numpy; open(numpy.__file__, 'a')",
        "import os; os.mknod('disk', 0o60666, os.makedev(254, 0))",
        "import os; os.open('/dev/mem', os.O_RDONLY)",
        "import os; os.open('/dev/kmsg', os.O_RDONLY)",
    ],
)
def test_files_elsewhere_are_out_of_reach(sandbox: Sandbox, code: str):
    assert refused(sandbox, code.replace("TRAINER", str(os.getpid())))
    assert not Path("/tmp/outside").exists()


@pytest.mark.parametrize(
    "call",
    ["chmod({!r}, 0)", "chown({!r}, 0, 0)", "utime({!r})", "setxattr({!r}, 'user.x', b'')"],
)
def test_an_owner_cannot_change_a_files_attributes(sandbox: Sandbox, call: str, tmp_path: Path):
    """Landlock would let it: the worker may have the user's own id."""
    mine = tmp_path / "mine"
    mine.touch(mode=0o644)
    before = mine.stat()

    assert refused(sandbox, f"import os; os.{call.format(str(mine))}")
    assert mine.stat() == before


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/dbus/system_bus_socket')",
        "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "import socket; socket.getaddrinfo('example.com', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
    ],
)
def test_there_is_no_network(sandbox: Sandbox, code: str):
    """DNS fails in its own words, urllib wraps the refusal: neither gets through."""
    attacked, alive = sandbox.run(code, "6 * 7")

    assert attacked.error is not None
    assert attacked.error.startswith((*REFUSED, "gaierror", "URLError"))
    assert alive.text == "42\n"


SYSTEM_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall({number}, {arguments}) < 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize(
    ("name", "number", "arguments"),
    [
        ("ptrace", 101, "16, {trainer}, 0, 0"),
        ("process_vm_readv", 310, "{trainer}, 0, 0, 0, 0, 0"),
        ("pidfd_open", 434, "{trainer}, 0"),
        ("mount", 165, "b'none', b'/', b'tmpfs', 0, 0"),
        ("unshare", 272, "0x10000000"),
        ("bpf", 321, "0, 0, 0"),
        ("keyctl", 250, "0, 0, 0"),
        ("io_uring_setup", 425, "8, 0"),
        ("memfd_create", 319, "b'x', 0"),
        ("perf_event_open", 298, "0, 0, 0, 0, 0"),
        ("setns", 308, "0, 0"),
        ("clone3", 435, "0, 0"),
        ("the x32 twin of socket", 0x40000000 + 41, "2, 1, 0"),
    ],
)
def test_a_dangerous_system_call_is_refused(
    sandbox: Sandbox, name: str, number: int, arguments: str
):
    arguments = arguments.format(trainer=os.getpid())
    assert refused(sandbox, SYSTEM_CALL.format(number=number, arguments=arguments)), name


def test_other_processes_cannot_be_signalled(sandbox: Sandbox):
    template = sandbox.pool.template
    assert template is not None
    for pid in (os.getpid(), template.pid):
        assert refused(sandbox, f"import os; os.kill({pid}, 9)")
    for pid in ("-1", "os.getppid()"):  # may say that it worked, on nobody
        sandbox.run(f"import os; os.kill({pid}, 9)")
    assert template.poll() is None
    assert sandbox.run("6 * 7")[0].text == "42\n"


def test_a_fork_bomb_does_not_begin(sandbox: Sandbox):
    assert refused(sandbox, "import os\nwhile True: os.fork()")
    assert refused(sandbox, "import subprocess; subprocess.run(['/bin/sh', '-c', ':'])")


def test_a_thread_bomb_is_bounded(sandbox: Sandbox):
    """By the count of threads in a user namespace, elsewhere by the address space of stacks."""
    code = "from threading import Thread\nimport threading, time\n"
    code += "while True: Thread(target=time.sleep, args=(99,)).start()"
    bombed, alive = sandbox.run(code, "threading.active_count() < 500")

    assert "can't start new thread" in str(bombed.error)
    assert alive.text == "True\n"


def test_a_memory_bomb_ends_in_a_memory_error(sandbox: Sandbox):
    numpy_bomb, list_bomb, alive = sandbox.run(
        "import numpy; numpy.ones(10**9)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "del x; 6 * 7",
    )

    assert "MemoryError" in str(numpy_bomb.error)
    assert "MemoryError" in str(list_bomb.error)
    assert alive.text == "42\n"


@pytest.mark.parametrize(
    "code",
    ["sum(range(10**12))", "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass"],
)
def test_what_cannot_be_interrupted_is_killed_and_said_to_be_lost(sandbox: Sandbox, code: str):
    stuck, after = sandbox.run(code, "1", timeout_s=0.3)

    assert stuck.state_lost
    assert "could not be interrupted; all variables and files are lost" in str(stuck.error)
    assert after.state_lost


def test_a_catastrophic_pattern_is_stopped(sandbox: Sandbox):
    (output,) = sandbox.run("import re; re.match('(a+)+$', 'a' * 40 + 'b')", timeout_s=0.3)

    assert "0.3 s" in str(output.error)


def test_a_thread_that_goes_on_writing_is_not_heard(sandbox: Sandbox):
    code = """
import threading, time
def write():
    while True:
        print("late")
        time.sleep(0.01)
threading.Thread(target=write, daemon=True).start()
"""
    _, quiet = sandbox.run(code, "import time; time.sleep(0.2); print('mine')")

    assert quiet.text.startswith("mine\n")
    assert "late" not in quiet.text
    assert "characters from threads of earlier calls left out" in quiet.text


def test_a_full_disk_is_an_error_of_the_code(sandbox: Sandbox):
    """In pieces: with a tmpfs it is full, without one the trainer looks and kills."""
    code = f"for n in range(64): open(str(n), 'wb').write(bytes({LIMITS.disk_bytes // 4}))"
    slow = "\nimport time; time.sleep(1)"
    (output,) = sandbox.run(code + slow)

    assert "No space left" in str(output.error) or "its files pass" in str(output.error)


def test_one_file_cannot_be_larger_than_the_disk(sandbox: Sandbox):
    (output,) = sandbox.run(f"open('x', 'wb').write(bytes({2 * LIMITS.disk_bytes}))")

    assert output.error is not None


def test_a_flood_on_the_descriptors_is_bounded(sandbox: Sandbox):
    code = "import os\nfor n in range(3000): os.write(1, b'x' * 1_000_000)"
    flooded, alive = sandbox.run(code, "6 * 7")

    assert flooded.error is not None
    assert len(flooded.text) < 2 * LIMITS.output_chars
    assert alive.text == "42\n" or alive.state_lost


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("import os; os._exit(3)", "exit status 3"),
        ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV"),
        ("import os; os.closerange(0, 100)", "exit status 1"),
    ],
)
def test_an_early_end_is_reported(sandbox: Sandbox, code: str, ending: str):
    output, after = sandbox.run(code, "1")

    assert f"the worker ended with {ending}" in str(output.error)
    assert (output.state_lost, after.state_lost) == (True, True)


FORGE = """
import json, os, struct
def send(message):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
"""


def test_a_forged_reply_answers_nothing(sandbox: Sandbox):
    """The number is random: guessed and stale ones are dropped."""
    forged = 'send({"reply": "0" * 16, "text": "forged"})'
    _, first, second = sandbox.run(FORGE, f"{forged}; print('true')", "print('next')")

    assert (first.text, second.text) == ("true\n", "next\n")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("for n in range(50): send({'reply': n})", "replies that answer nothing"),
        ("send(b'no json')", "not JSON"),
        ("send(b'[1]')", "holds list"),
        ("send(b'[' * 100_000)", "not JSON"),
        ("os.write(3, b'\\xff' * 8)", "a frame of 4294967295 bytes"),
    ],
)
def test_a_broken_protocol_ends_the_worker(sandbox: Sandbox, code: str, complaint: str):
    (output,) = sandbox.run(FORGE + code + "\nimport time; time.sleep(2)")

    assert complaint in str(output.error)
    assert output.state_lost


def test_a_forged_picture_is_refused(sandbox: Sandbox):
    """Replaces the kernel's own encoder, as code in the same process can."""
    code = """
import gc
from moonlit.agents.sandbox.output import Pictures
Pictures.as_json = lambda self: [{"size": [10**9, 10**9], "data": ""}]
"""
    (output,) = sandbox.run(code)

    assert "malformed reply" in str(output.error)


def test_nothing_is_left_behind(sandbox: Sandbox):
    async def folder_and_pid(worker):  # type: ignore[no-untyped-def]
        await worker.run("open('x', 'w').write('x')")
        return worker.folder, worker.pid

    folder, pid = sandbox.with_worker(folder_and_pid)

    assert not folder.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_workers_end_with_the_trainer():
    """Kills a trainer while its worker computes."""
    code = """
import asyncio, os
from moonlit.agents.sandbox.pool import Pool
async def main():
    async with Pool(num_warm=0) as pool, pool.worker() as worker:
        print(worker.pid, flush=True)
        await worker.run("sum(range(10**13))", timeout_s=100.0)
asyncio.run(main())
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())

    trainer.kill()
    trainer.wait()

    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the worker outlived its trainer")


@pytest.mark.slow
def test_a_fork_bomb_is_bounded_where_processes_are_allowed():
    """Each child sleeps; all end with the worker."""
    limits = POLICIES["all"].limits
    sandbox = Sandbox(Policy(limits=limits, allow_processes=True))
    try:
        code = "import os, time\nfor n in range(200):\n    if os.fork() == 0: time.sleep(60)"
        (output,) = sandbox.run(code)
        assert "BlockingIOError" in str(output.error)
    finally:
        sandbox.close()


@pytest.mark.slow
def test_gigabytes_of_output_cost_the_trainer_nothing(sandbox: Sandbox):
    code = "s = 'x' * (1 << 20)\nfor n in range(4000): print(s)"
    (output,) = sandbox.run(code, timeout_s=60.0)

    assert output.error is None
    assert len(output.text) < LIMITS.output_chars + 100
    assert LIMITS.memory_bytes == 256 * MIB
