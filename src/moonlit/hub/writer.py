"""A model as a folder in the released layout: weights, config, tokenizer, processor files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moonlit.chat.tokenizer import Tokenizer
from moonlit.hub import int4
from moonlit.hub.config import (
    CONFIG_FILE,
    generation_config,
    preprocessor_config,
    released_config,
)
from moonlit.hub.disk import replacing, sync_folder
from moonlit.hub.released_layout import ReleasedTensor, released_tensors
from moonlit.hub.shards import TensorSpec, write_shards
from moonlit.models.kimi import Kimi

DTYPES = (torch.bfloat16, torch.float32)


@torch.no_grad()
def save_released(
    model: Kimi,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    int4_experts: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    family: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder that transformers, vLLM and ``load_released`` read.

    The folder appears when all of it is on the disk. Needs no memory beyond the model and one
    tensor.

    Args:
        model: any device; its own weights are not touched.
        tokenizer: the one it was trained with.
        folder: new or empty.
        max_shard_bytes: size at which a new shard starts [bytes].
        int4_experts: store routed experts as INT4, as the release does.
        dtype: of all other weights (and of the experts without INT4); the router's bias is fp32.
        family: ``kimi_k25``, ``kimi_vl`` or ``deepseek_v3`` (text only); by default the first, or
            the last for a model without an encoder.
        weights: by our names, asked for one after another; None: the model's own. With them the
            model may be on the meta device.

    Raises:
        ValueError: if tokenizer and model differ, or the model has no released form.
        FileExistsError: if the folder holds something.
        OSError: if the disk is full; names the folder and the bytes needed.
    """
    folder = Path(folder)
    check_arguments(model, tokenizer, folder, dtype)
    text_only = model.vision_shape is None
    family = family or ("deepseek_v3" if text_only else "kimi_k25")
    if text_only != (family == "deepseek_v3"):
        raise ValueError(f"family {family} does not fit a model with vision={model.vision_shape}")
    config = released_config(
        model.decoder_shape,
        model.vision_shape,
        tokenizer.special,
        family=family,
        int4_experts=int4_experts,
        dtype=dtype,
    )
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    parameters = model.state_dict() if weights is None else weights
    layout = released_tensors(shapes, family)
    specs = [spec for tensor in layout for spec in specs_of(tensor, dtype, int4_experts)]
    made = (t for tensor in layout for t in stored(tensor, parameters, dtype, int4_experts))

    with replacing(folder, sum(spec.num_bytes for spec in specs)) as partial:
        partial.mkdir()
        write_json(partial / CONFIG_FILE, config)
        write_json(partial / "generation_config.json", generation_config(tokenizer.special))
        if not text_only:
            write_json(partial / "preprocessor_config.json", preprocessor_config())
        tokenizer.save(partial)
        write_shards(partial, specs, made, max_shard_bytes=max_shard_bytes)
        sync_folder(partial)


def check_arguments(model: Kimi, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Refuse what would write a broken folder or destroy one."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    decoder = model.decoder_shape
    ids_of_model = decoder.vocab_size, decoder.media_pad_id
    ids_of_tokenizer = tokenizer.vocab_size, tokenizer.special.media_pad_id
    if ids_of_model != ids_of_tokenizer:
        raise ValueError(
            f"vocab_size and media_pad_id are {ids_of_model} in the model and "
            f"{ids_of_tokenizer} in the tokenizer: they do not belong together"
        )


def specs_of(tensor: ReleasedTensor, dtype: torch.dtype, int4_experts: bool) -> list[TensorSpec]:
    """Name what is stored for a released tensor: itself, or the three of an INT4 expert."""
    if not (int4_experts and tensor.expert is not None):
        return [TensorSpec(name=tensor.name, dtype=tensor.dtype(dtype), shape=tensor.shape)]
    return [
        TensorSpec(name=tensor.name + suffix, dtype=int4.DTYPES[suffix], shape=shape)
        for suffix, shape in int4.stored_shapes(tensor.name, tensor.shape).items()
    ]


def stored(
    tensor: ReleasedTensor, parameters: Mapping[str, Tensor], dtype: torch.dtype, int4_experts: bool
) -> Iterator[Tensor]:
    """Make what ``specs_of`` names, in that order."""
    weight = tensor.view_in(parameters[tensor.parameter])
    if not (int4_experts and tensor.expert is not None):
        yield weight.to("cpu", tensor.dtype(dtype))
        return
    words, scale = int4.quantize(weight)
    yield from (words.cpu(), scale.cpu(), torch.tensor(tensor.shape, dtype=torch.int32))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one of the small files."""
    path.write_text(json.dumps(content, indent=2) + "\n")
