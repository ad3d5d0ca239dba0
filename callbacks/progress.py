"""Watches how far the run is: a rich progress bar in a terminal, a line a minute elsewhere."""

import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = {  # logged metric -> how it reads
    "train/nll_per_token": "loss {:.3f}",
    "rl/reward_mean": "reward {:.3f}",
    "rl/tokens_per_answer": "{:.1f} tokens an answer",
    "perf/tokens_per_s_per_gpu": "{:,.0f} tokens/s",
    "perf/data_wait_fraction": "waiting for data {:.0%}",
    "data/vision_share": "vision {:.1%}",
}


class RunProgress(Callback):
    """Shows step, loss, tokens per second, vision share, and the time left.

    Args:
        line_every_s: without a terminal, a plain line at most this often [s].
    """

    def __init__(self, *, line_every_s: float) -> None:
        self.line_every_s = line_every_s
        self.console = Console(file=sys.stderr, markup=False)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.began_s = 0.0
        self.first_step = 0
        self.last_line_s = float("-inf")  # the first step shows at once

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the run starts from."""
        if not trainer.is_global_zero:
            return
        self.began_s = time.monotonic()
        self.first_step = trainer.global_step
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(
                type(pl_module).__name__,
                total=trainer.max_steps,
                completed=trainer.global_step,
                metrics="",
            )
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar, or print a line when one is due."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        shown = "  ".join(
            form.format(metrics[name].item()) for name, form in SHOWN.items() if name in metrics
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=trainer.global_step, metrics=shown)
            return
        now_s = time.monotonic()
        is_last = trainer.global_step >= trainer.max_steps
        if is_last or now_s - self.last_line_s >= self.line_every_s:
            self.last_line_s = now_s
            left_s = self._seconds_left(trainer, now_s)
            self.console.print(
                f"step {trainer.global_step}/{trainer.max_steps}  {shown}  left {left_s:,.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    def _seconds_left(self, trainer: Trainer, now_s: float) -> float:
        done = trainer.global_step - self.first_step
        return (now_s - self.began_s) / max(done, 1) * (trainer.max_steps - trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error is printed below it."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
