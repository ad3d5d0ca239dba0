"""Weights from a folder in the released layout."""

import warnings
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moonlit.hub import int4
from moonlit.hub.config import family_of, read_config, read_shapes
from moonlit.hub.mismatch import listing, require_fit
from moonlit.hub.released_layout import DERIVED_TENSORS, ReleasedTensor, released_tensors
from moonlit.hub.shards import ShardReader
from moonlit.models.kimi import Kimi
from moonlit.models.placement import holds, write
from moonlit.models.shapes import DecoderShape, EncoderShape

PLAIN_DTYPES = ("BF16", "F32", "F16")
INT4_DTYPES = {
    "weight_packed": ("I32",),
    "weight_scale": ("BF16",),
    "weight_shape": ("I32", "I64"),
}


@torch.no_grad()
def load_released(
    model: Kimi,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    shapes: Mapping[str, torch.Size] | None = None,
) -> None:
    """Fill a model with the weights of a released folder; INT4 experts become bf16 numbers.

    Each tensor is checked before the first one is read, and is read straight into its place, in
    the parameter's own dtype. A model on the meta device is materialised: the peak is the model
    plus the shard being read.

    Args:
        model: of the folder's architecture, on any device.
        folder: as released, or as ``save_released`` writes it.
        device: where a model on the meta device is materialised.
        shapes: of the whole model's state dict, where ``model`` is one rank's part of it; only what
            that holds is read.

    Raises:
        FileNotFoundError: if a file is missing; names it.
        ValueError: if a tensor is missing, unexpected, misshapen or of another dtype, or a file is
            truncated; names them all.
    """
    folder = Path(folder)
    family = family_of(read_config(folder))
    warn_of_differences(model, folder)
    reader = ShardReader(folder)
    shapes = shapes or {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = released_tensors(shapes, family)
    check_stored(reader, tensors, folder)

    if any(parameter.is_meta for parameter in model.parameters()):
        materialise(model, device)
    parameters = model.state_dict()
    held = [
        tensor
        for tensor in tensors
        if tensor.parameter in parameters and holds(parameters[tensor.parameter], tensor.expert)
    ]
    first_stored = {first_name(tensor, reader.shapes): tensor for tensor in held}
    for name, content in reader.stream(first_stored):
        tensor = first_stored[name]
        if name != tensor.name:
            content = int4.dequantize(content, reader.read(tensor.name + "_scale"))
        content = content if tensor.expert is None else content.mT
        write(parameters[tensor.parameter], content, row=tensor.expert)


def first_name(tensor: ReleasedTensor, stored: Container[str]) -> str:
    """Return the name a tensor is stored under, or that of its packed codes."""
    packed = tensor.name + "_packed"
    return packed if tensor.expert is not None and packed in stored else tensor.name


def check_stored(reader: ShardReader, tensors: list[ReleasedTensor], folder: Path) -> None:
    """Compare everything that is stored with everything the model needs."""
    expected: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if first_name(tensor, reader.shapes) == tensor.name:
            expected[tensor.name] = tensor.shape
        else:
            for suffix, shape in int4.stored_shapes(tensor.name, tensor.shape).items():
                expected[tensor.name + suffix] = shape
    found = {n: shape for n, shape in reader.shapes.items() if not n.endswith(DERIVED_TENSORS)}
    require_fit(found, expected, source=str(folder))
    problems = [
        f"{name} is {reader.dtypes[name]}, not {' or '.join(allowed)}"
        for name in expected
        if reader.dtypes[name] not in (allowed := allowed_dtypes(name))
    ]
    problems += [
        f"{tensor.name}_shape says {said}, not {list(tensor.shape)}"
        for tensor in tensors
        if first_name(tensor, reader.shapes) != tensor.name
        and (said := reader.read(tensor.name + "_shape").tolist()) != list(tensor.shape)
    ]
    if problems:
        raise ValueError(f"{folder} holds {listing('wrong', problems)}")


def allowed_dtypes(name: str) -> tuple[str, ...]:
    """Return the dtypes a stored tensor may have, in the file's spelling."""
    return INT4_DTYPES.get(name.rpartition(".")[2], PLAIN_DTYPES)


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device memory; its running counters start at zero."""
    model.to_empty(device=device)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in saved:
            buffer.zero_()


def warn_of_differences(model: Kimi, folder: Path) -> None:
    """Say where the folder's config and the model differ in what no tensor shows.

    The model's values stay: a longer context, say, starts from the weights of a shorter one.
    """
    stored = asdicts(read_shapes(folder))
    built = asdicts((model.decoder_shape, model.vision_shape))
    different = [
        f"{key} is {stored[key]} there and {built[key]} here"
        for key in stored.keys() & built.keys()
        if stored[key] != built[key]
    ]
    if different:
        warnings.warn(f"{folder} has another config: {'; '.join(sorted(different))}", stacklevel=3)


def asdicts(shapes: tuple[DecoderShape, EncoderShape | None]) -> dict[str, Any]:
    """Flatten both shapes into one mapping."""
    parts = zip(("decoder", "vision"), shapes, strict=True)
    return {
        f"{part}.{key}": value
        for part, shape in parts
        if shape is not None
        for key, value in asdict(shape).items()
    }
