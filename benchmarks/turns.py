"""Sides of a benchmark in processes of their own, which take turns a block of steps at a time.

So a slow minute of the machine falls on all alike. Nothing here needs moonlit: a peer's environment
may lack it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MARK = "@@ "
"""Before what a side tells; libraries say other things on the same stream."""


class Gate:
    """Lets a side run a block of steps at a time, and tells how each went."""

    def __init__(self) -> None:
        self.left = 0
        self.began_s = 0.0

    def begin_step(self) -> None:
        """Wait for the word, at the start of a block."""
        if not self.left:
            self.left = int(sys.stdin.readline())
        self.began_s = time.perf_counter()

    def end_step(self, **told: float) -> None:
        """Tell how long a step took, and more."""
        self.left -= 1
        tell({"seconds": time.perf_counter() - self.began_s, **told})


def tell(value: dict[str, Any]) -> None:
    """Write a line that the other process reads."""
    print(MARK + json.dumps(value), flush=True)


class Side:
    """A process that trains when it is told to."""

    def __init__(
        self, name: str, python: str, script: str, words: Sequence[str], log: Path
    ) -> None:
        self.name, self.steps = name, []
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [python, script, "--side", name, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            )  # fmt: skip
        self.told = self.lines(log)
        self.versions = next(self.told)

    def lines(self, log: Path) -> Iterator[dict[str, Any]]:
        """Read what it tells."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.name} ended with {self.process.wait()}: see {log}")

    def block(self, num_steps: int) -> None:
        """Let it take so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        self.steps += [next(self.told) for _ in range(num_steps)]
