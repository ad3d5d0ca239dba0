"""What ``moonlit serve`` does."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moonlit.models.kimi import Kimi
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.engines.server import serve
from moonlit.rl.engines.wire import secret


def serve_engine(build_model: Callable[[], Kimi], settings: Mapping[str, Any]) -> None:
    """Serve an engine of a model's shape until a signal ends it.

    Args:
        build_model: of the trainers' model.
        settings: the command's values, as in ``conf/serve.yaml``.

    Raises:
        ValueError: if no secret is set.
        OSError: if the port is taken.
    """
    shared = secret()
    with torch.device(settings["device"]):
        model = build_model()
    names = ("max_sequences", "max_prefill_tokens", "max_cache_tokens", "max_logprob_gap")
    engine = NativeEngine(
        model, precision=settings["precision"], **{name: settings[name] for name in names}
    )
    asyncio.run(serve(engine, host=settings["host"], port=settings["port"], secret=shared))
