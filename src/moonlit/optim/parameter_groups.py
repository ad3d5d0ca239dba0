"""Trainable parameters in groups by learning rate: the vision tower, and the rest."""

from collections import defaultdict
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, encoder_lr_scale: float
) -> list[dict[str, Any]]:
    """Named, trainable parameters in groups, each with its peak rate ``initial_lr``.

    On one process there are at most two. Sharded and replicated parameters stand apart, because a
    fused update takes one kind.

    Args:
        model: its parameters under a ``vision_tower`` form the encoder's group.
        lr: peak learning rate.
        weight_decay: decoupled, on every parameter.
        encoder_lr_scale: the encoder's peak learning rate over ``lr``.

    Raises:
        ValueError: if a value is negative or nothing is trainable.
    """
    values = {"lr": lr, "weight_decay": weight_decay, "encoder_lr_scale": encoder_lr_scale}
    for key, value in values.items():
        if value < 0:
            raise ValueError(f"{key} must be at least 0, got {value}")
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: all are frozen")
    encoder = [(name, p) for name, p in trainable if "vision_tower" in name.split(".")]
    rest = [(name, p) for name, p in trainable if "vision_tower" not in name.split(".")]
    return [
        {"params": params, "lr": scaled, "initial_lr": scaled, "weight_decay": weight_decay}
        for named, scaled in ((encoder, lr * encoder_lr_scale), (rest, lr))
        for params in by_mesh(named)
    ]


def by_mesh(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Split named parameters by the mesh they are sharded over, if any."""
    split: dict[Any, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        split[mesh].append((name, parameter))
    return list(split.values())
