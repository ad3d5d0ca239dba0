"""Watches speed: tokens per second, model FLOP utilisation, and the time spent waiting for data."""

import time

import torch
from lightning import Callback, LightningModule, Trainer

from moonlit.batch import PackedBatch

# Dense bf16 peak [FLOP/s], from the vendor's data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Throughput(Callback):
    """Logs ``perf/*`` of every logged step; MFU only where the device's peak is known.

    A token counts six FLOPs for each weight it multiplies with (``phase.flops_per_token``); scores
    of attention and the encoder's work come on top, so the utilisation shown is a lower bound.
    """

    def __init__(self) -> None:
        self.step_began_s = 0.0
        self.step_ended_s: float | None = None
        self.data_wait_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the first wait is the loader's own start."""
        self.step_ended_s = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count an evaluation as waiting for data."""
        self.step_ended_s = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: list[PackedBatch], batch_idx: int
    ) -> None:
        """Take the time since the last step's end: the wait for this step's data."""
        self.step_began_s = time.perf_counter()
        waited_since = self.step_began_s if self.step_ended_s is None else self.step_ended_s
        self.data_wait_s = self.step_began_s - waited_since

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: list[PackedBatch],
        batch_idx: int,
    ) -> None:
        """Log this step's speed."""
        self.step_ended_s = time.perf_counter()
        step_s = self.step_ended_s - self.step_began_s + self.data_wait_s
        sharing = getattr(trainer.strategy, "pp_size", 1)  # ranks of a pipeline read the same rows
        tokens_per_s = sum(row.num_tokens for row in batch) / step_s / sharing
        pl_module.log("perf/tokens_per_s_per_gpu", tokens_per_s, prog_bar=True)
        pl_module.log("perf/step_s", step_s)
        pl_module.log("perf/data_wait_fraction", self.data_wait_s / step_s)
        peak = peak_flops(pl_module.device)
        if peak is not None:
            flops_per_token: float = pl_module.flops_per_token  # pyright: ignore
            pl_module.log("perf/mfu", tokens_per_s * flops_per_token / peak)


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak [FLOP/s], None where we know none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if name.startswith(known)), None)
