"""Watches the gradient norm of each part of the model, after clipping.

The K3 report (second hand) found a SigLIP-initialised encoder to give higher and spikier vision
gradient norms than one trained from scratch: here is where one would see it.
"""

from collections import defaultdict

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from moonlit.distributed.gradients import total_norm


class GradientNorms(Callback):
    """Logs ``grad_norm/{vision_tower,mm_projector,language_model}``, after clipping."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the norm of each top-level part that has gradients."""
        gradients: dict[str, list[Tensor]] = defaultdict(list)
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                gradients[name.split(".")[1]].append(parameter.grad)
        pl_module.log_dict(
            {f"grad_norm/{part}": total_norm(grads) for part, grads in gradients.items()}
        )
