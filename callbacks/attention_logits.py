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
        maxima = list(of_all_stages(trainer, measured(pl_module)).values())
        largest = torch.stack(maxima).max().to(pl_module.device)
        pl_module.log("attention/max_logit", trainer.strategy.reduce(largest, reduce_op="max"))

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
        by_layer = dict(zip(measured(trainer.lightning_module), clipped_LH.cpu(), strict=True))
        clipped_LH = torch.stack(list(of_all_stages(trainer, by_layer).values()))
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


def measured(phase: LightningModule) -> dict[str, Tensor]:
    """Return every layer's maxima by name."""
    return {name: b for name, b in phase.named_buffers() if name.endswith("max_logits_H")}


def of_all_stages(trainer: Trainer, by_layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of all layers, wherever in a pipeline they lie."""
    return getattr(trainer.strategy, "over_stages", dict)(by_layer)
