"""The released ``config.json`` and our shapes, each from the other; the files beside it.

Where vLLM and transformers spell a number differently (the encoder's), a config holds both.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from moonlit.chat.special_tokens import NUM_SPECIAL_TOKENS, SpecialTokens
from moonlit.chat.vision_processing import (
    MAX_FRAMES_PER_CHUNK,
    MERGE,
    PATCH_PX,
    RELEASED_LIMITS,
)
from moonlit.hub.config_keys import (
    ARCHITECTURES,
    DECODER_CONSTANTS,
    DECODER_KEYS,
    ENCODER_CONSTANTS,
    ENCODER_KEYS,
    TEXT_MODEL_TYPES,
    TRANSFORMERS_ENCODER_KEYS,
    WITHOUT_KEY,
    YARN_KEYS,
)
from moonlit.hub.int4 import QUANTIZATION_CONFIG
from moonlit.models.shapes import DecoderShape, EncoderShape

CONFIG_FILE = "config.json"


def released_config(
    decoder: DecoderShape,
    vision: EncoderShape | None,
    special: SpecialTokens,
    *,
    family: str,
    int4_experts: bool,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    token_ids = {
        "bos_token_id": special.bos_id,
        "eos_token_id": special.eos_id,
        "pad_token_id": special.pad_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    text = text_config(decoder, plain_rope_is_null=family != "kimi_k25") | token_ids
    if int4_experts:
        text["quantization_config"] = QUANTIZATION_CONFIG
    if vision is None:
        return {"architectures": [ARCHITECTURES[family]]} | text
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **token_ids,
        "ignore_index": -100,
        "media_placeholder_token_id": decoder.media_pad_id,
        "tie_word_embeddings": False,
        "text_config": {"architectures": [ARCHITECTURES["deepseek_v3"]]} | text,
        "vision_config": vision_config(vision, decoder, family),
        **(unified_media_keys(vision, decoder, special) if family == "kimi_k25" else {}),
    }


def text_config(decoder: DecoderShape, *, plain_rope_is_null: bool) -> dict[str, Any]:
    """Return the language model's config.

    ``rope_scaling`` is YaRN even at factor 1, where the two agree: vLLM on a CPU gets plain RoPE
    of this family wrong. The siblings' releases have null there.
    """
    require_default(decoder)
    yarn = {"type": "yarn"} | {key: getattr(decoder, field) for key, field in YARN_KEYS.items()}
    return {
        "model_type": "deepseek_v3",
        **{key: getattr(decoder, field) for key, field in DECODER_KEYS.items()},
        **DECODER_CONSTANTS,
        "initializer_range": 0.02,
        "num_key_value_heads": decoder.num_heads,
        "rope_scaling": None if plain_rope_is_null and decoder.yarn_factor == 1 else yarn,
        "seq_aux": True,
        "use_cache": True,
    }


def vision_config(vision: EncoderShape, decoder: DecoderShape, family: str) -> dict[str, Any]:
    """Return the encoder's and projector's config."""
    require_default(vision)
    keys = ENCODER_KEYS[family]
    widths: dict[str, Any] = {}
    if family == "kimi_k25":
        keys = keys | TRANSFORMERS_ENCODER_KEYS
        widths = {"mm_hidden_size": vision.width, "text_hidden_size": decoder.model_width}
    return {
        **{key: getattr(vision, field) for key, field in keys.items()},
        **ENCODER_CONSTANTS[family],
        **widths,
        "merge_kernel_size": [vision.merge, vision.merge],
    }


def unified_media_keys(
    vision: EncoderShape, decoder: DecoderShape, special: SpecialTokens
) -> dict[str, Any]:
    """Return what only K2.5 has: one chunk type for images and clips, and transformers' names."""
    return {
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "image_token_id": decoder.media_pad_id,
        "video_token_id": decoder.vocab_size,  # no id of its own: the placeholder is expanded
        "vision_start_token_id": special.media_begin_id,
        "vision_end_token_id": special.media_end_id,
        "projection_hidden_size": vision.width,
        "projection_layer_norm_eps": 1e-5,
    }


def generation_config(special: SpecialTokens) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: a turn ends at im_end (our default)."""
    return {
        "bos_token_id": special.bos_id,
        "eos_token_id": [special.im_end_id, special.eos_id],
        "pad_token_id": special.pad_id,
    }


def preprocessor_config() -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json``: the limits of our own processing."""
    return {
        "media_proc_cfg": {
            "fixed_output_tokens": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "in_patch_limit": RELEASED_LIMITS.per_image,
            "in_patch_limit_each_frame": RELEASED_LIMITS.per_frame,
            "in_patch_limit_video": RELEASED_LIMITS.per_video,
            "max_num_frames_each_video": None,
            "merge_kernel_size": MERGE,
            "patch_limit_on_one_side": RELEASED_LIMITS.per_side,
            "patch_size": PATCH_PX,
            "sample_fps": 2.0,
            "temporal_merge_kernel_size": MAX_FRAMES_PER_CHUNK,
            "timestamp_mode": "hh:mm:ss.fff",
        }
    }


def read_shapes(folder: Path | str) -> tuple[DecoderShape, EncoderShape | None]:
    """Return the shapes that a released folder's config describes.

    Raises:
        FileNotFoundError: if there is no ``config.json``.
        ValueError: if the config lacks a key or asks for something our model does not do.
    """
    config = read_config(folder)
    path, family = Path(folder) / CONFIG_FILE, family_of(config)
    try:
        if family == "deepseek_v3":
            return decoder_shape(config, path), None
        media_pad_id = config["media_placeholder_token_id"]
        return (
            decoder_shape(config["text_config"], path, media_pad_id),
            encoder_shape(config["vision_config"], path, family),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {error}") from error


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        is_run = (path.parent / "checkpoints").is_dir()
        hint = "; it is a run: say its checkpoints/last.ckpt" if is_run else ""
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}{hint}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def family_of(config: dict[str, Any]) -> str:
    """Return the family that ``model_type`` names."""
    model_type = config.get("model_type")
    if model_type in TEXT_MODEL_TYPES:
        return "deepseek_v3"
    if model_type not in ARCHITECTURES:
        known = sorted({*ARCHITECTURES, *TEXT_MODEL_TYPES})
        raise ValueError(f"model_type must be one of {known}, got {model_type!r}")
    return model_type


def decoder_shape(
    text: dict[str, Any], path: Path, media_pad_id: int | None = None
) -> DecoderShape:
    """Read the language model's numbers; a text-only release has no id for media."""
    require_constants(text, DECODER_CONSTANTS, path)
    fields = {field: text[key] for key, field in DECODER_KEYS.items()}
    if (scaling := text["rope_scaling"]) is not None:
        require_constants(scaling, {"type": "yarn", "rope_type": "yarn"}, path)
        fields |= {field: scaling[key] for key, field in YARN_KEYS.items()}
    if media_pad_id is None:
        media_pad_id = SpecialTokens(text["vocab_size"] - NUM_SPECIAL_TOKENS).media_pad_id
    return DecoderShape(**fields, media_pad_id=media_pad_id)


def encoder_shape(vision: dict[str, Any], path: Path, family: str) -> EncoderShape:
    """Read the encoder's numbers."""
    require_constants(vision, ENCODER_CONSTANTS[family], path)
    rows, columns = vision["merge_kernel_size"]
    require_constants({"merge_kernel_size": columns}, {"merge_kernel_size": rows}, path)
    fields = {field: vision[key] for key, field in ENCODER_KEYS[family].items()}
    if family == "kimi_vl":
        fields["max_frames"] = 1  # its encoder knows images only
    return EncoderShape(**fields, merge=rows)


def require_constants(config: dict[str, Any], constants: dict[str, Any], path: Path) -> None:
    """Refuse a config that asks for something else than our model does."""
    for key, value in constants.items():
        if key in config and config[key] != value:
            raise ValueError(f"{path}: {key} must be {value!r}, got {config[key]!r}")


def require_default(shape: DecoderShape | EncoderShape) -> None:
    """Refuse a shape that a released config cannot describe."""
    defaults = {field.name: field.default for field in dataclasses.fields(shape)}
    for name in WITHOUT_KEY[type(shape)]:
        if getattr(shape, name) != defaults[name]:
            raise ValueError(
                f"a released config cannot say {name}={getattr(shape, name)}: "
                f"it must be {defaults[name]}"
            )
