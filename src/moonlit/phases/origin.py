"""Who wrote a checkpoint: a run goes on from its own phase, optimizer and model only."""

from dataclasses import asdict
from typing import Any

from lightning import LightningModule

from moonlit.models.kimi import Kimi

Shapes = dict[str, dict[str, Any] | None]


def makers(phase: Any) -> dict[str, str]:
    """Name a phase and its optimizer, and digest the tokenizer of its data, if that has one."""
    build = phase.build_optimizer
    optimizer = getattr(build, "func", build)
    made_by = {"phase": type(phase).__name__, "optim": getattr(optimizer, "__name__", "")}
    tokenizer = getattr(phase.trainer.datamodule, "tokenizer", None)
    return made_by if tokenizer is None else made_by | {"tokenizer": tokenizer.digest}


def shapes_of(model: Kimi) -> Shapes:
    """Return the shapes of a model's parts, with which it can be built again."""
    vision = model.vision_shape
    return {
        "decoder": asdict(model.decoder_shape),
        "vision": None if vision is None else asdict(vision),
    }


def require_own(checkpoint: dict[str, Any], phase: LightningModule) -> None:
    """Refuse to go on from what another phase, optimizer or model wrote, or from too late a step.

    Raises:
        ValueError: naming both.
    """
    model: Any = phase.model
    told = makers(phase) | widths(shapes_of(model))
    wrote = checkpoint.get("made_by", {}) | widths(checkpoint["shapes"])
    for name, value in told.items():
        if wrote.get(name, value) != value:
            raise ValueError(
                f"resume_from goes on with a run, and that one's {name} is {wrote[name]}, this "
                f"one's {value}: to begin from its weights alone say init_from instead"
            )
    max_steps, step = phase.trainer.max_steps, checkpoint["global_step"]
    if 0 <= max_steps < step:
        raise ValueError(
            f"resume_from is at step {step}, past trainer.max_steps={max_steps}: nothing is left "
            "to train"
        )


def widths(shapes: Shapes) -> dict[str, Any]:
    """Return what weights must agree in, by the configuration's keys."""
    return {
        f"model.{part}.{name}": value
        for part, shape in shapes.items()
        for name, value in (shape or {}).items()
        if isinstance(value, int) and name != "max_positions"
    }
