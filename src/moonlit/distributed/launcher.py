"""Starts one process a rank on this node, and names the rank that ended the run.

Lightning's own launcher repeats ``sys.argv``, which our command line has edited; this one repeats
the command as it was typed, and gives every rank the first one's run folder.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

POLL_S = 0.2
GRACE_S = 5.0
"""How long the others may go on to print their own message, once a rank has ended."""
LAUNCHER_PID = "MOONLIT_LAUNCHER_PID"
STOPPED = 130
"""Exit status of a run that a signal has ended, its state saved."""


class RankLauncher(_SubprocessScriptLauncher):
    """The first process of a node starts the others, and watches them.

    Args:
        cluster_environment: knows address, port and ranks.
        num_processes: of this node.
        num_nodes: of the run.
        overrides: appended to the command line of the started processes.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        *,
        overrides: Sequence[str],
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.overrides = tuple(overrides)

    @override
    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks, then call ``function`` as the first one."""
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.procs:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()
        return function(*args, **kwargs)

    @override
    def _call_children_scripts(self) -> None:
        environment = self.cluster_environment
        os.environ.update(
            MASTER_ADDR=environment.main_address,
            MASTER_PORT=str(environment.main_port),
            NODE_RANK=str(environment.node_rank()),
            LOCAL_RANK=str(environment.local_rank()),
            WORLD_SIZE=str(self.num_processes * self.num_nodes),
            LOCAL_WORLD_SIZE=str(self.num_processes),
        )
        command = [sys.executable, *sys.orig_argv[1:], *self.overrides]
        for local_rank in range(1, self.num_processes):
            env = os.environ | {"LOCAL_RANK": str(local_rank), LAUNCHER_PID: str(os.getpid())}
            self.procs.append(subprocess.Popen(command, env=env))

    def await_verdict(self) -> None:
        """When this rank fails: wait a moment, in which the watch may find that another one died.

        The watch then names it and ends this process; if it finds none, the failure is our own.
        """
        time.sleep(10 * POLL_S)

    def _watch(self) -> None:
        """End the run when a rank has failed."""
        while True:
            time.sleep(POLL_S)
            codes = [process.poll() for process in self.procs]
            if all(code in (0, STOPPED) for code in codes):
                return
            failed = [rank for rank, code in enumerate(codes, 1) if code not in (None, 0, STOPPED)]
            if failed:
                self._end(failed)

    def _end(self, failed: list[int]) -> None:
        first_rank = self.cluster_environment.node_rank() * self.num_processes
        for local_rank in failed:
            process = self.procs[local_rank - 1]
            text = (
                f"moonlit: rank {first_rank + local_rank} (process {process.pid}) "
                f"{ending(process.returncode)}; ending the other ranks\n"
            )
            os.write(2, text.encode())
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(p.poll() is None for p in self.procs):
            time.sleep(POLL_S)
        for process in self.procs:
            if process.poll() is None:
                process.kill()
        os._exit(1)


def ending(code: int) -> str:
    """Say how a process has ended."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed with status {code}"


def started_by_launcher() -> bool:
    """Say whether this process was started by a ``RankLauncher``."""
    return LAUNCHER_PID in os.environ


def await_others(exception: BaseException) -> None:
    """When a started rank fails of a lost connection: let the rank that is lost be seen first."""
    if isinstance(exception, RuntimeError):
        time.sleep(5 * POLL_S)


def end_with_launcher(rank: int) -> None:
    """In a started process: end when the process that started it is gone."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(POLL_S)
        os.write(2, f"moonlit: rank 0 (process {launcher}) is gone; ending rank {rank}\n".encode())
        time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
