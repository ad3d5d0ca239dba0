"""Watches that the run is alive: each rank writes its step to a file that a monitor can read."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from moonlit.distributed.heartbeat import Heartbeat


class SignsOfLife(Callback):
    """Keeps ``run_dir/heartbeats/rank_NNNNN.json`` young.

    Args:
        run_dir: the run's folder.
        every_s: how often it is written [s].
    """

    def __init__(self, *, run_dir: str, every_s: float) -> None:
        self.run_dir, self.every_s = Path(run_dir), every_s
        self.heartbeat: Heartbeat | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        rank = trainer.global_rank
        self.heartbeat = Heartbeat(self.run_dir, rank=rank, every_s=self.every_s)
        self.heartbeat.start(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Note the step."""
        if self.heartbeat is not None:
            self.heartbeat.at_step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write where it ended."""
        self._stop()

    def _stop(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None
