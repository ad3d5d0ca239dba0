"""Watches where the router sends text and vision tokens, layer by layer.

Axes: L MoE layers, M modalities (text, vision), E experts.
"""

import torch
from jaxtyping import Float, UInt8
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

LOAD = "tokens_per_expert_ME"  # what every router counts
MODALITIES = ("text", "vision")
DEAD_FRACTION = 0.01  # of the mean load: below it an expert counts as dead (our default)


class ExpertLoad(Callback):
    """Logs balance by layer and modality, and draws the whole load as a picture.

    ``moe/layer_i/max_violation`` is the largest load over the mean load, minus one;
    ``moe/layer_i/dead_experts`` counts experts below one per cent of the mean load.

    Args:
        picture_every_n_steps: how often the load is drawn; 0 never [steps].
    """

    def __init__(self, *, picture_every_n_steps: int) -> None:
        self.picture_every_n_steps = picture_every_n_steps

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the step's load before the phase forgets it."""
        loads = {name: b for name, b in pl_module.named_buffers() if name.endswith(LOAD)}
        loads = getattr(trainer.strategy, "over_stages", dict)(loads)
        if not loads:
            return
        load_LME = torch.stack(list(loads.values())).double()
        for layer, load_ME in enumerate(load_LME):
            pl_module.log_dict(layer_metrics(f"moe/layer_{layer}", load_ME))
        every = self.picture_every_n_steps
        if every and trainer.global_step % every == 0:
            draw(trainer, load_LME)


def layer_metrics(prefix: str, load_ME: Float[Tensor, "M E"]) -> dict[str, Tensor]:
    """Return balance metrics of one layer; a modality without a token has none."""
    rows = {"": load_ME.sum(0)} | {
        f"_{name}": load_E for name, load_E in zip(MODALITIES, load_ME, strict=True)
    }
    metrics = {}
    for suffix, load_E in rows.items():
        if load_E.sum() == 0:
            continue
        relative_E = load_E / load_E.mean()
        metrics[f"{prefix}/max_violation{suffix}"] = relative_E.max().float() - 1
        metrics[f"{prefix}/dead_experts{suffix}"] = (relative_E < DEAD_FRACTION).sum().float()
    return metrics


def draw(trainer: Trainer, load_LME: Float[Tensor, "L M E"]) -> None:
    """Add the picture to every TensorBoard logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(
                "moe/load_text_above_vision", load_picture(load_LME), trainer.global_step
            )


def load_picture(load_LME: Float[Tensor, "L M E"], cell: int = 12) -> UInt8[Tensor, "3 y x"]:
    """Draw one row of cells for each layer and modality; mean load is mid grey, red is more."""
    relative_LME = load_LME / load_LME.mean(-1, keepdim=True).clamp(min=1e-9)
    heat_yx = (relative_LME / 2).clamp(max=1).flatten(0, 1)
    over_yx = (relative_LME / 2 - 1).clamp(0, 1).flatten(0, 1)  # above twice the mean
    picture = torch.stack([heat_yx, heat_yx - over_yx, heat_yx - over_yx]).clamp(0, 1)
    picture = picture.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return (picture * 255).to(torch.uint8).cpu()
