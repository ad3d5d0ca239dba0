"""Trainable parameters in groups: the vision tower, the projector, the rest."""

from collections import defaultdict
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

ENCODER = ("vision_tower", "mm_projector")


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, encoder_lr_scale: float
) -> list[dict[str, Any]]:
    """Named, trainable parameters in groups, each with its peak rate ``initial_lr``.

    On one process there are at most three, in the order of the forward pass: what a step encodes
    with is updated first. Sharded and replicated parameters stand apart, because a fused update
    takes one kind.

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
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in (*ENCODER, "rest")}
    for name, parameter in trainable:
        part = next((part for part in ENCODER if part in name.split(".")), "rest")
        parts[part].append((name, parameter))
    groups = []
    for part, named in parts.items():
        peak = lr * encoder_lr_scale if part == "vision_tower" else lr
        groups += [
            {"params": params, "lr": peak, "initial_lr": peak, "weight_decay": weight_decay}
            for params in by_mesh(named)
        ]
    return groups


def by_mesh(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Split named parameters by the mesh they are sharded over, if any."""
    split: dict[Any, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        split[mesh].append((name, parameter))
    return list(split.values())
