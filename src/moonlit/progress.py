"""How far a long command is: a bar in a terminal, a line now and then in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class Work:
    """Shows a count while a block of code runs; the bar is gone afterwards.

    Args:
        what: is done.
        total: of what is counted.
        completed: of it before the block.
        console: where it is shown; None: standard error.
        line_every_s: without a terminal, a plain line at most this often [s].
    """

    def __init__(
        self,
        what: str,
        total: int | float,
        *,
        completed: int = 0,
        console: Console | None = None,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self.what, self.total, self.first = what, max(total, 1), completed
        self.completed: int | float = completed
        self.console = console or Console(stderr=True, markup=False)
        self.line_every_s = line_every_s
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> "Work":
        """Begin."""
        self.began_s = self.last_line_s = time.monotonic()
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, transient=True, console=self.console)
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.first)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def advance(self, num: int | float = 1) -> None:
        """Count some more."""
        self.update(self.completed + num)

    def update(self, completed: int | float, what: str | None = None) -> None:
        """Say how much is done by now, and of what."""
        self.completed, self.what = completed, what or self.what
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, description=self.what)
            return
        now_s = time.monotonic()
        if now_s - self.last_line_s >= self.line_every_s and completed > self.first:
            self.last_line_s = now_s
            left_s = (now_s - self.began_s) * (self.total - completed) / (completed - self.first)
            done = f"{completed / self.total:.0%}"
            self.console.print(f"{self.what}: {done}, {max(left_s, 0):.0f} s left", soft_wrap=True)
