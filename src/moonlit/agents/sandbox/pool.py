"""Workers kept warm, handed out one a rollout and never twice."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from moonlit.agents.sandbox.confinement import Report
from moonlit.agents.sandbox.frames import ProtocolError, read_frame
from moonlit.agents.sandbox.policy import Policy
from moonlit.agents.sandbox.worker import Worker

START_TIMEOUT_S = 120.0
SPAWN_TIMEOUT_S = 30.0
READY_BYTES = 65536
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SandboxError(RuntimeError):
    """No worker can be had."""


class Pool:
    """Starts the template, keeps ``num_warm`` workers ready, hands each out once.

    Args:
        policy: of every worker.
        num_warm: workers that wait, confined, for their rollout.
        max_workers: handed out at the same time; who comes later waits.

    ``async with Pool(...) as pool`` starts and ends it. Use it from one event loop.

    Raises:
        SandboxError: at the start, if a protection of ``policy.require`` does not hold here.
    """

    def __init__(
        self, policy: Policy | None = None, *, num_warm: int = 2, max_workers: int = 64
    ) -> None:
        if num_warm < 0 or max_workers < 1:
            raise ValueError(
                f"num_warm={num_warm}, max_workers={max_workers}: want at least 0 and 1"
            )
        self.policy = Policy() if policy is None else policy
        self.num_warm, self.room = num_warm, asyncio.Semaphore(max_workers)
        self.warm: deque[Worker] = deque()
        self.numbers = itertools.count()
        self.refilling: set[asyncio.Task[None]] = set()
        self.one_request = asyncio.Lock()
        self.template: subprocess.Popen[bytes] | None = None
        self.report = Report()

    async def __aenter__(self) -> "Pool":
        """Start the template and try one worker, whose report is the pool's."""
        self.root = Path(tempfile.mkdtemp(prefix="moonlit-sandbox-"))
        try:
            await asyncio.to_thread(self.start_template)
            first = await self.spawn()
        except BaseException:
            await self.close()
            raise
        self.report = first.report
        self.warm.append(first)
        self.refill()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything."""
        await self.close()

    def start_template(self) -> None:
        """Start the process that workers are forked from, and wait until it has loaded."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log = self.root / "template.log"
        home = self.root / "template"
        home.mkdir(mode=0o700)
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(home)}
        environment |= {"IPYTHONDIR": str(home), "MPLCONFIGDIR": str(home)}
        environment |= dict.fromkeys(ONE_THREAD, "1")
        with self.log.open("wb") as log:
            module = "moonlit.agents.sandbox.template"
            self.template = subprocess.Popen(
                [sys.executable, "-I", "-m", module, str(theirs.fileno())],
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self.control.settimeout(START_TIMEOUT_S)
        self.identity = self.answer()["identity"]
        self.root.chmod(0o711)  # workers of root are another user, who must get to their folders

    def answer(self) -> dict[str, Any]:
        """Read the template's next answer."""
        data = self.control.recv(READY_BYTES)
        if not data:
            raise SandboxError(f"the template ended:\n{self.log.read_text()[-2000:]}")
        answer = json.loads(data)
        if "error" in answer:
            raise SandboxError(answer["error"])
        return answer

    async def ask(self, request: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        """Send the template a request and return its answer."""
        async with self.one_request:
            return await asyncio.shield(
                asyncio.to_thread(self.ask_now, request, *descriptors)
            )  # an answer nobody waits for must not become the next one's

    def ask_now(self, request: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        """Send a request and block until the answer is here."""
        socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)
        return self.answer()

    async def spawn(self) -> Worker:
        """Fork a worker and wait until it has confined itself."""
        folder = self.root / f"worker-{next(self.numbers)}"
        folder.mkdir(mode=0o700)
        if self.identity != os.geteuid():
            os.chown(folder, self.identity, self.identity)
        ours, theirs = socket.socketpair()
        request = {"op": "spawn", "folder": str(folder), "policy": self.policy.as_json()}
        with theirs:
            pid = (await self.ask(request, theirs.fileno()))["pid"]
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            ready = await asyncio.wait_for(read_frame(reader, READY_BYTES), SPAWN_TIMEOUT_S)
        except (asyncio.IncompleteReadError, ProtocolError, TimeoutError) as error:
            raise SandboxError(
                f"a worker did not start: {error}\n{self.log.read_text()[-2000:]}"
            ) from error
        report = Report(ready["layers"], ready["protections"])
        worker = Worker(
            pid=pid,
            reader=reader,
            writer=writer,
            folder=folder,
            limits=self.policy.limits,
            reap=self.reap,
            report=report,
        )
        missing = [name for name in self.policy.require if not report.protections[name]]
        if missing:
            await worker.close()
            raise SandboxError(f"require={missing} does not hold on this machine: {report}")
        if self.policy.cgroup is not None:
            self.join_cgroup(pid, Path(self.policy.cgroup) / folder.name)
        return worker

    def join_cgroup(self, pid: int, cgroup: Path) -> None:
        """Put a worker into a cgroup of its own."""
        limits = self.policy.limits
        cgroup.mkdir()
        (cgroup / "memory.max").write_text(f"{limits.memory_bytes}")
        (cgroup / "pids.max").write_text(f"{limits.num_processes}")
        (cgroup / "cgroup.procs").write_text(f"{pid}")

    async def reap(self, pid: int) -> int:
        """Return the exit status of a worker that is dead."""
        return (await self.ask({"op": "reap", "pid": pid}))["status"]

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """Lend a worker that nobody has used; it ends when it is given back."""
        async with self.room:
            worker = self.warm.popleft() if self.warm else await self.spawn()
            self.refill()
            try:
                yield worker
            finally:
                await asyncio.shield(worker.close())

    def refill(self) -> None:
        """Spawn in the background until enough workers wait."""
        for _ in range(self.num_warm - len(self.warm) - len(self.refilling)):
            task = asyncio.create_task(self.add_warm())
            self.refilling.add(task)
            task.add_done_callback(self.refilling.discard)

    async def add_warm(self) -> None:
        """Spawn one more waiting worker."""
        self.warm.append(await self.spawn())

    async def close(self) -> None:
        """End all workers and the template, and delete their files."""
        for task in self.refilling:
            task.cancel()
        await asyncio.gather(*self.refilling, return_exceptions=True)
        if self.template is not None:
            while self.warm:
                await self.warm.popleft().close()
            self.control.close()
            await asyncio.to_thread(self.template.wait)
            self.template = None
        shutil.rmtree(self.root, ignore_errors=True)
