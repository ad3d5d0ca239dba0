"""Prompts for a tiny engine, and what the training forward says about its tokens."""

import asyncio
from collections.abc import Awaitable, Callable, Collection

import torch
from torch import Tensor

from moonlit.batch import PackedMedia
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Completion, Request, Sampling
from moonlit.rl.engines.native import NativeEngine, media_ids
from tests.models.shapes import MEDIA_PAD_ID, document, packed, random_media

NO_STOP = frozenset[int]()


def text(length: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    return torch.randint(0, MEDIA_PAD_ID - 3, (length,), generator=generator).tolist()


def pictures(*grids: tuple[int, int, int], num_text: int) -> tuple[list[int], PackedMedia]:
    return document(num_text, list(grids)).tolist(), random_media(list(grids))


def ask(
    ids: list[int], media: PackedMedia | None = None, *, new: int = 5, seed: int = 0, **settings
) -> Request:
    session = settings.pop("session", None)
    sampling = Sampling(max_new_tokens=new, **{"stop_ids": NO_STOP, **settings})
    return Request(input_ids=ids, media=media, sampling=sampling, seed=seed, session=session)


def answers(engine: NativeEngine, requests: list[Request]) -> list[Completion]:
    """Send all at once."""

    async def gather() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(gather())


def with_engine(engine: NativeEngine, talk: Callable[[NativeEngine], Awaitable[None]]) -> None:
    """Run a conversation, then check that nothing of it stays in the cache."""

    async def run() -> None:
        await asyncio.wait_for(talk(engine), timeout=60)

    asyncio.run(run())
    engine.close()
    assert not engine.batch.has_work
    assert engine.batch.cache.num_pages_in_use == 0


@torch.no_grad()
def training_logprobs(
    model: Kimi,
    request: Request,
    completion: Completion,
    *,
    banned_ids: Collection[int] = (),
) -> Tensor:
    """Log-prob of each sampled token, by one packed forward of everything.

    At temperature 1; with bans, at the request's.
    """
    start = len(request.input_ids)
    ids = torch.tensor([*request.input_ids, *completion.token_ids])
    features = None if request.media is None else model.encode_media(request.media)
    hidden = model.eval()(**packed([ids]), features=features).hidden_TD
    logits = model.logits(hidden)[start - 1 : -1]
    if banned_ids:
        logits = logits / request.sampling.temperature
        logits[:, list(banned_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]


def assert_sampled_from(
    model: Kimi, request: Request, completion: Completion, tokens: slice
) -> None:
    """Compare behaviour log-probs with the training forward's, bans applied."""
    banned = media_ids(model.decoder_shape.media_pad_id)
    trained = training_logprobs(model, request, completion, banned_ids=banned)
    told = torch.tensor(completion.behavior_logprobs)
    # Whole rows against token by token, in float32.
    torch.testing.assert_close(told[tokens], trained[tokens], rtol=0, atol=1e-4)
