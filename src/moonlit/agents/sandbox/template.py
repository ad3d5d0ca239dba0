"""The process whose forks are workers: ``python -I -m moonlit.agents.sandbox.template FD``.

It imports what code in a worker will want, runs nobody's code, and answers requests on one socket:
``spawn`` (with the worker's channel as a descriptor) and ``reap``. A spawn forks twice: a launcher
enters new namespaces, its child is the worker, pid 1 there, so that whatever the worker starts ends
with it. It ends, and every worker with it, when the trainer does.
"""

import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moonlit.agents.sandbox.confinement import (
    INSIDE_ID,
    Report,
    closed_folder,
    confine,
    interpreter,
)
from moonlit.agents.sandbox.frames import pack
from moonlit.agents.sandbox.kernel import Kernel
from moonlit.agents.sandbox.kernel_calls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    prctl,
    unshare,
)

PR_SET_CHILD_SUBREAPER = 36
NAMESPACES = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
NOBODY = 65534
MAX_REQUEST_BYTES = 65536
CHANNEL_FD = 3


def main() -> None:
    """Load, say so, and serve until the trainer closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    kernel = Kernel()
    if (num_threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"the template has {num_threads} threads: a fork would lose them")
    identity = worker_identity()
    gc.collect()
    gc.freeze()  # so that collections in workers do not touch, and copy, the template's pages
    control.send(json.dumps({"ready": os.getpid(), "identity": identity}).encode())
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 1)
        if not request:
            os._exit(0)
        answer = handle(json.loads(request), descriptors, identity, kernel)
        control.send(json.dumps(answer).encode())


def handle(
    request: dict[str, Any], descriptors: list[int], identity: int, kernel: Kernel
) -> dict[str, Any]:
    """Answer one request; an error goes to the trainer, which decides."""
    try:
        if request["op"] == "spawn":
            return {"pid": spawn(request, descriptors[0], identity, kernel)}
        return {"status": os.waitpid(request["pid"], 0)[1]}
    except OSError as error:
        return {"error": str(error)}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def worker_identity() -> int:
    """Return the user id of workers without namespaces of their own.

    It is one's own, or ``NOBODY`` for root where that can read the interpreter.
    """
    if os.geteuid() != 0:
        return os.geteuid()
    return 0 if any(map(closed_folder, interpreter())) else NOBODY


def spawn(request: dict[str, Any], channel: int, identity: int, kernel: Kernel) -> int:
    """Start a worker and return its process id."""
    told, tell = os.pipe()  # from the launcher
    waits, go = os.pipe()  # to the launcher, then to the worker
    launcher = os.fork()
    if launcher == 0:
        os.close(told)
        os.close(go)
        in_child(lambda: launch(request, channel, identity, kernel, tell, waits))
    os.close(tell)
    os.close(waits)
    try:
        if os.read(told, 1) == b"n":
            map_identity(launcher)
        os.write(go, b"1")
        worker = int.from_bytes(read_all(told), "little")
        os.waitpid(launcher, 0)
        if worker == 0:
            raise OSError("the launcher of a worker failed; see its standard error")
        os.write(go, b"2")  # the launcher has gone: the template is the worker's parent now
        return worker
    finally:
        os.close(told)
        os.close(go)


def read_all(descriptor: int) -> bytes:
    """Read to the end of a pipe."""
    pieces = b""
    while piece := os.read(descriptor, 64):
        pieces += piece
    return pieces


def map_identity(pid: int) -> None:
    """Give a new user namespace its one user and group: outside, one's own, or root's nobody."""
    user, group = os.geteuid(), os.getegid()
    user, group = (NOBODY, NOBODY) if user == 0 else (user, group)
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(f"{INSIDE_ID} {user} 1")
    Path(f"/proc/{pid}/gid_map").write_text(f"{INSIDE_ID} {group} 1")


def launch(
    request: dict[str, Any], channel: int, identity: int, kernel: Kernel, tell: int, waits: int
) -> None:
    """Enter namespaces, fork the worker, tell its id and end."""
    report, told = Report(), b"-"
    if "namespaces" in request["policy"]["use"]:
        told = b"n" if report.attempt("namespaces", lambda: unshare(NAMESPACES)) else b"-"
    os.write(tell, told)
    os.read(waits, 1)
    worker = os.fork()
    if worker == 0:
        os.close(tell)
        in_child(lambda: work(request, channel, identity, kernel, waits, report))
    os.write(tell, worker.to_bytes(8, "little"))


def work(
    request: dict[str, Any],
    channel: int,
    identity: int,
    kernel: Kernel,
    waits: int,
    report: Report,
) -> None:
    """Be a worker: confine oneself, report, serve."""
    os.read(waits, 1)
    os.setsid()
    policy = request["policy"]
    report = confine(policy, request["folder"], identity, channel, report)
    trainer = socket.socket(fileno=CHANNEL_FD)
    trainer.sendall(pack({"layers": report.layers, "protections": report.protections}))
    kernel.serve(trainer, policy["limits"])


def in_child(action: Callable[[], None]) -> None:
    """Run a fork's part and end there, whatever happens."""
    status = 1
    try:
        action()
        status = 0
    except BaseException:  # the fork must never return into the template's loop
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
