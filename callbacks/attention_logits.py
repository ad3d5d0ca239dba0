"""Watches the largest attention logit of every head, and the heads that QK-Clip rescaled.

Source: QK-Clip, Kimi K2 report (arXiv:2507.20534, Sec. 2.1): 12.7 % of K2's heads were clipped at
least once in the first 70k steps, none after.

Axes: L layers, H heads.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


class AttentionLogits(Callback):
    """Logs the maximum logit, and how many heads were clipped, now and ever.

    The logits are what attention measured for QK-Clip: exact where they may reach the threshold,
    else an upper bound by norms (``measure_logits: exact`` in the model makes all of them exact).
    """

    def __init__(self) -> None:
        self.ever_clipped_LH: Tensor | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the maxima of this step before the optimizer forgets them."""
        maxima = [b for name, b in pl_module.named_buffers() if name.endswith("max_logits_H")]
        largest = trainer.strategy.reduce(torch.stack(maxima).max(), reduce_op="max")
        pl_module.log("attention/max_logit", largest)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count the heads that the step just taken has clipped."""
        clipped_LH = getattr(trainer.optimizers[0], "clipped_heads", None)
        if clipped_LH is None:
            return
        clipped_LH = clipped_LH.cpu()
        before_LH = self.ever_clipped_LH
        ever_LH = clipped_LH if before_LH is None else before_LH | clipped_LH
        self.ever_clipped_LH = ever_LH
        pl_module.log("attention/clipped_heads", clipped_LH.sum().float())
        pl_module.log("attention/ever_clipped_fraction", ever_LH.float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Keep which heads were ever clipped."""
        return {"ever_clipped": self.ever_clipped_LH}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.ever_clipped_LH = state_dict["ever_clipped"]
