"""vLLM servers that we start ourselves, on this machine, and start again when they die."""

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

END_S = 20.0
"""How long a server may take to end when it is asked to."""


class ServerProcess:
    """One server.

    Args:
        command: a command line; ``{port}`` in it is replaced.
        url: where it then serves: ``http://host:port``.
        log: a file that its output goes to.
    """

    def __init__(self, command: str, url: str, log: Path) -> None:
        self.words = shlex.split(command.replace("{port}", url.rsplit(":", 1)[1]))
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        if not self.words:
            raise ValueError("engine.command is empty: want what starts a vLLM server")

    @property
    def has_ended(self) -> bool:
        """Whether it does not run: it never did, or has died."""
        return self.process is None or self.process.poll() is not None

    def start(self) -> None:
        """Start it, in a process group of its own.

        Raises:
            OSError: if there is no such program.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End it and all it started."""
        if self.process is None:
            return
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.send(signal.SIGKILL)  # its workers outlive it where it was killed
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and all it started, those included that it left behind."""
        assert self.process is not None
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, number)
