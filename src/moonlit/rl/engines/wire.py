"""How an engine server is spoken to: JSON for requests and answers, safetensors for weights.

Token in, token out, as everywhere. Every call bears the secret that the servers of a job share, for
a cluster's network is not ours alone.
"""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moonlit.batch import PackedMedia
from moonlit.rl.engines.base import Completion, Request, Sampling

SECRET, SECRET_HEADER = "MOONLIT_ENGINE_SECRET", "X-Moonlit-Secret"
MAX_PART_BYTES = 256 * 2**20
"""Weights travel in parts of about this size."""


def secret() -> str:
    """Return the job's secret.

    Raises:
        ValueError: if there is none.
    """
    found = os.environ.get(SECRET)
    if not found:
        raise ValueError(f"{SECRET} is not set: engine servers and trainers of a job share one")
    return found


def request_as_json(request: Request, session: str | None) -> dict[str, Any]:
    """Write a request down."""
    sampling, media = request.sampling, request.media
    return {
        "input_ids": list(request.input_ids),
        "seed": request.seed,
        "session": session,
        "media": None if media is None else media_as_json(media),
        "sampling": asdict(sampling)
        | {
            "stop_ids": sorted(sampling.stop_ids),
            "banned_ids": sorted(sampling.banned_ids),
        },
    }


def media_as_json(media: PackedMedia) -> dict[str, Any]:
    """Write raw patches down."""
    pixels = media.pixel_values.cpu().contiguous().numpy().tobytes()
    return {"pixel_values": base64.b64encode(pixels).decode(), "grid_thw": media.grid_thw.tolist()}


def read_request(value: Mapping[str, Any], session: Any) -> Request:
    """Read a request; ``session`` is the server's own of that name."""
    sampling = dict(value["sampling"])
    sampling["stop_ids"] = frozenset(sampling["stop_ids"])
    sampling["banned_ids"] = frozenset(sampling["banned_ids"])
    return Request(
        input_ids=value["input_ids"],
        sampling=Sampling(**sampling),
        media=None if value["media"] is None else read_media(value["media"]),
        seed=value["seed"],
        session=session,
    )


def read_media(value: Mapping[str, Any]) -> PackedMedia:
    """Read raw patches."""
    pixels = torch.frombuffer(
        bytearray(base64.b64decode(value["pixel_values"])), dtype=torch.uint8
    ).reshape(-1, 3, 14, 14)
    return PackedMedia(pixel_values=pixels, grid_thw=torch.tensor(value["grid_thw"]))


def completion_as_json(completion: Completion) -> dict[str, Any]:
    """Write an answer down."""
    return asdict(completion)


def read_completion(value: Mapping[str, Any]) -> Completion:
    """Read an answer."""
    return Completion(**value)


def logprobs_as_json(rows: list[Tensor]) -> str:
    """Write the probe's log-probs down, exactly."""
    return json.dumps([row.float().tolist() for row in rows])


def read_logprobs(text: str) -> list[Tensor]:
    """Read the probe's log-probs."""
    return [torch.tensor(row) for row in json.loads(text)]
