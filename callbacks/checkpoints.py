"""Keeps checkpoints: the last few, and every so many steps one for good; ``last.ckpt`` names one.

Saving may go on in the background (``strategy.finish_saving``). A checkpoint bears its name only
when it is whole, so whatever is found here can be resumed from.
"""

import os
import re
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from moonlit.hub.disk import remove

NAME = re.compile(r"step_(\d{6,})\.ckpt")


class Checkpoints(Checkpoint):
    """Saves ``step_NNNNNN.ckpt`` every so many optimizer steps, and at the end of the run.

    Args:
        dirpath: their folder.
        every_n_steps: how often [steps].
        keep_last: so many of the latest stay; None: all.
        keep_every_n_steps: those of multiples of it stay too; None: none but the latest.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        every_n_steps: int,
        keep_last: int | None,
        keep_every_n_steps: int | None,
    ) -> None:
        for key, value in (
            ("every_n_steps", every_n_steps),
            ("keep_last", keep_last),
            ("keep_every_n_steps", keep_every_n_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoint.{key} must be at least 1, got {value}")
        self.folder = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep_last, self.keep_every_n_steps = keep_last, keep_every_n_steps
        self.saved_step = -1
        self.linked: Path | None = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save when it is time, or when a signal ends the run; name it as soon as it is whole."""
        if trainer.should_stop or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
        self.settle(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, and wait until it is on the disk."""
        self.save(trainer)
        finish: Any = getattr(trainer.strategy, "finish_saving", None)
        if finish is not None:
            finish()
        self.settle(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save this step unless it is saved."""
        if trainer.global_step != self.saved_step:
            self.saved_step = trainer.global_step
            trainer.save_checkpoint(self.latest)

    @property
    def latest(self) -> Path:
        """The checkpoint that was saved last, or is being saved."""
        return self.folder / f"step_{self.saved_step:06d}.ckpt"

    def settle(self, trainer: Trainer) -> None:
        """Point ``last.ckpt`` to the latest whole checkpoint, and drop what is not to be kept."""
        latest = self.latest
        if not trainer.is_global_zero or latest == self.linked or not latest.exists():
            return
        link = self.folder / ".last.ckpt"
        link.unlink(missing_ok=True)
        link.symlink_to(latest.name)
        os.replace(link, self.folder / "last.ckpt")
        self.linked = latest
        for path in self.outdated():
            remove(path)

    def outdated(self) -> list[Path]:
        """Return the whole checkpoints that are neither among the last nor kept for good."""
        if self.keep_last is None:
            return []
        steps = {int(m[1]): p for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name))}
        older = sorted(steps)[: -self.keep_last]
        every = self.keep_every_n_steps
        return [steps[step] for step in older if every is None or step % every]
