"""How a vLLM server is spoken to: its JSON for requests and answers, msgpack for pictures.

Token ids and raw patches go as they are: the server neither tokenises nor resizes.

Source: vLLM 0.32, ``/inference/v1/generate`` and its ``features``.
"""

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from moonlit.rl.engines.base import Request
from moonlit.rl.engines.prompt import Prompt

MODALITY = "vision_chunk"
"""vLLM's word for an image or a chunk of a clip of this family."""
RAW_VIEW = 3
"""Its msgpack extension for the bytes of a tensor."""
ON_DEVICE = {"keep_on_cpu": False}
BAN = -1e9
"""Added to a logit: e to the power of it is zero in every float."""


class WireError(ValueError):
    """A server's answer cannot be read; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sampled, or as much of it as it had when it was told to stop."""

    token_ids: list[int]
    logprobs: list[float]
    """Of what was sampled from, if the server runs with ``processed_logprobs`` [nats]."""
    labels: list[str | None]
    """The server's own name of the weights, for each token; None: it tells none."""
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    num_cached: int | None
    """Tokens of the prompt that were not computed again; None: it does not tell."""


def generate_body(
    request: Request,
    prompt: Prompt,
    sampled: Sequence[int],
    *,
    banned_ids: frozenset[int],
    max_tokens: int,
    name: str,
    salt: str,
    normalised: bool,
) -> dict[str, Any]:
    """Ask for what comes after a prompt and the tokens that were sampled of its answer before.

    Args:
        request: what is wanted.
        prompt: its ids and media.
        sampled: of the answer, so far.
        banned_ids: never sampled.
        max_tokens: of the whole answer.
        name: what to call the request when it is to be stopped.
        salt: what is cached under one is not found under another.
        normalised: whether pixels go as numbers in [-1, 1], or raw.
    """
    sampling = request.sampling
    ids = [*prompt.ids, *sampled]
    return {
        **prompt_body(prompt, ids, name=name, salt=salt, normalised=normalised),
        "sampling_params": {
            "max_tokens": max_tokens - len(sampled),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # What goes on draws anew: the same seed would repeat the first part's numbers.
            "seed": (request.seed + 0x9E3779B97F4A7C15 * len(sampled)) % 2**63,
            "stop_token_ids": sorted(sampling.stop_ids),
            "ignore_eos": True,
            "logit_bias": {str(token_id): BAN for token_id in sorted(banned_ids)},
            "logprobs": 0,
            "detokenize": False,
        },
    }


def scoring_body(prompt: Prompt, *, name: str, salt: str, normalised: bool) -> dict[str, Any]:
    """Ask for the log-prob of each token of a prompt behind the first."""
    return {
        **prompt_body(prompt, prompt.ids, name=name, salt=salt, normalised=normalised),
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def prompt_body(
    prompt: Prompt, ids: Sequence[int], *, name: str, salt: str, normalised: bool
) -> dict[str, Any]:
    """Return what any request says of its prompt."""
    body: dict[str, Any] = {"request_id": name, "token_ids": list(ids), "cache_salt": salt}
    if prompt.media is not None:
        body["features"] = features(prompt, salt, normalised=normalised)
    return body


def features(prompt: Prompt, salt: str, *, normalised: bool) -> dict[str, Any]:
    """Write a prompt's media down: where their placeholders are, and their patches."""
    assert prompt.media is not None
    bounds = list(pairwise([0, *prompt.ends_of_items]))
    items = prompt.media.pixel_values.split([t * h * w for t, h, w in prompt.grids])
    places = [
        {"offset": prompt.placeholders[start], "length": end - start} for start, end in bounds
    ]
    for (start, end), place in zip(bounds, places, strict=True):
        if prompt.placeholders[end - 1] - place["offset"] != end - 1 - start:
            raise ValueError(
                f"an item's {end - start} placeholder tokens are not side by side: vLLM wants one"
                " run of them for each item"
            )
    return {
        # The salt again: features are cached by this name, and other weights make others.
        "mm_hashes": {MODALITY: [f"{salt}-{digest.hex()}" for digest in prompt.digests]},
        "mm_placeholders": {MODALITY: places},
        "kwargs_data": {
            MODALITY: [
                encoded_item(patches, grid, normalised=normalised)
                for patches, grid in zip(items, prompt.grids, strict=True)
            ]
        },
    }


def encoded_item(patches: Tensor, grid: tuple[int, int, int], *, normalised: bool) -> str:
    """Write one item as vLLM's own renderer would: patches, raw or as float32 in [-1, 1]."""
    pixels = patches.cpu().numpy()
    if normalised:
        pixels = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    item = {
        "pixel_values": {
            "data": tensor_as_list(pixels),
            "field": ["flat", {"slices": [[0, len(pixels), None]], "dim": 0, **ON_DEVICE}],
        },
        "grid_thws": {
            "data": tensor_as_list(np.array(grid, dtype=np.int64)),
            "field": ["batched", {"keep_on_cpu": True}],
        },
    }
    return base64.b64encode(msgpack(item)).decode()


def tensor_as_list(array: np.ndarray) -> list[Any]:
    """Write a tensor as its dtype, shape and bytes."""
    return [str(array.dtype), list(array.shape), Raw(array.tobytes())]


class Raw(bytes):
    """A tensor's bytes."""


def msgpack(value: Any) -> bytes:
    """Encode what a media item is made of.

    Source: the MessagePack specification; always its widest forms.
    """
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, str):
        text = value.encode()
        return b"\xdb" + struct.pack(">I", len(text)) + text
    if isinstance(value, Raw):
        return b"\xc9" + struct.pack(">Ib", len(value), RAW_VIEW) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(msgpack, value))
    if isinstance(value, dict):
        pairs = (msgpack(key) + msgpack(content) for key, content in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(pairs)
    raise TypeError(f"no msgpack form for {type(value).__name__}")


def read_answer(value: Mapping[str, Any]) -> Answer:
    """Read what a server sampled.

    Raises:
        WireError: if ids and log-probs do not belong together, or something is missing.
    """
    try:
        choice = value["choices"][0]
        ids = list(choice["token_ids"])
        content = (choice["logprobs"] or {}).get("content") or []
        told = [(entry["token_id"], entry["logprob"]) for entry in content]
        reason = choice["finish_reason"]
        spans = choice.get("weight_versions") or []
        labels: list[str | None] = [None] * len(ids)
        for span in spans:
            labels[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
        details = (value.get("usage") or {}).get("prompt_tokens_details") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise WireError(f"an answer of generate lacks {error}") from error
    if [token_id for token_id, _ in told] != ids or len(labels) != len(ids):
        raise WireError(
            f"an answer of generate has {len(ids)} token ids, log-probs of {len(told)} and weight"
            f" versions of {len(labels)}"
        )
    logprobs = [logprob for _, logprob in told]
    return Answer(ids, logprobs, labels, reason, details.get("cached_tokens"))


def read_scores(value: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
    """Read the log-prob of each token of a prompt behind the first.

    Raises:
        WireError: if there is not one for each.
    """
    rows = value.get("prompt_logprobs") or []
    try:
        return [
            float(row[str(token_id)]["logprob"])
            for row, token_id in zip(rows[1:], ids[1:], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(
            f"an answer of generate has no prompt_logprobs for its {len(ids)} tokens: {error!r}"
        ) from error
