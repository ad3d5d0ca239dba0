"""Watches for signals: the first one ends the run at the next step boundary."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from moonlit.distributed.launcher import STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption(Callback):
    """Turns Ctrl-C and SLURM's signals into a clean end; a second Ctrl-C is abrupt.

    The step in hand is finished, then ``callbacks.checkpoint`` saves it: weights, optimizer and
    data position always agree. Nothing is evaluated then: whoever sends a signal may not wait long.
    A signal that comes before training has begun waits for the first step; in the last step it
    changes nothing. In the closing evaluation it ends the process at once: all is saved, and
    Lightning's own handler would wait for ranks that wait for this one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped = False
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals before the model is built, which may take minutes."""
        if stage == "fit":
            self._take_over()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them over from Lightning, which has set its own on top."""
        self._take_over()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them over in an evaluation outside of training too."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._take_over(leave)

    def _take_over(self, react: Callable[[int, FrameType | None], None] | None = None) -> None:
        for number in SIGNALS:
            handler = signal.signal(number, react or self._note)
            self.previous.setdefault(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt("a second Ctrl-C")
            return  # SLURM may send one to the job and one to its steps
        self.received = signal.Signals(number)
        text = f"\n{self.received.name}: finishing this step, then saving and stopping"
        text += " (once more: at once, unsaved)\n" if number == signal.SIGINT else "\n"
        os.write(2, text.encode())  # print may be interrupted halfway by this very signal

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Stop on every rank or on none."""
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        if trainer.global_step != trainer.max_steps:
            self.stopped = trainer.should_stop = True
            trainer.limit_val_batches = 0  # else Lightning evaluates before it stops

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back, after Lightning has given back what it found."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()


def leave(number: int, frame: FrameType | None) -> None:
    """End the process, and with it all ranks."""
    name = signal.Signals(number).name
    os.write(2, f"\n{name}: leaving the evaluation; the run itself is trained and saved\n".encode())
    os._exit(STOPPED)
