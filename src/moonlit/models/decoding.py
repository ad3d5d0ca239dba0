"""Greedy decoding over the latent cache: prompts packed end to end, then a token each per step.

Axes: T prompt tokens, M vision tokens, B sequences, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moonlit.models.cache import CachedSequence, LatentCache
from moonlit.models.kimi import Kimi


def greedy(
    model: Kimi,
    input_ids: Int[Tensor, " T"],
    features: Float[Tensor, "M D"] | None,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    banned_ids: Collection[int],
) -> list[int]:
    """Return the most likely continuation of one prompt, its stop token included."""
    return greedy_batch(
        model,
        [input_ids],
        features,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        banned_ids=banned_ids,
    )[0]


@torch.no_grad()
def greedy_batch(
    model: Kimi,
    prompts: Sequence[Int[Tensor, " _"]],
    features: Float[Tensor, "M D"] | None,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    banned_ids: Collection[int],
) -> list[list[int]]:
    """Return the most likely continuation of each prompt; a finished one leaves the batch.

    Args:
        model: decodes in evaluation mode, whatever mode it is in; the mode is put back.
        prompts: token ids, of any lengths.
        features: vision features of all prompts, in the order of their placeholders.
        max_new_tokens: where a continuation ends at the latest.
        stop_ids: where it ends; included in what is returned.
        banned_ids: never chosen, such as the media placeholder.
    """
    device = prompts[0].device
    cache = LatentCache(
        model.decoder_shape,
        dtype=model.language_model.lm_head.weight.dtype,
        device=device,
    )
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=device)
    sequences = [CachedSequence() for _ in prompts]
    continuations: list[list[int]] = [[] for _ in prompts]
    alive, new_tokens = list(range(len(prompts))), list(prompts)
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            cache.select([sequences[place] for place in alive])
            next_ids = next_tokens(model, new_tokens, features, cache, banned).tolist()
            features = None  # all placeholders are in the prompts
            for place, token in zip(alive, next_ids, strict=True):
                continuations[place].append(token)
            alive = [place for place in alive if continuations[place][-1] not in stop_ids]
            if not alive:
                break
            new_tokens = [torch.tensor(continuations[place][-1:], device=device) for place in alive]
    return continuations


@contextmanager
def evaluation_mode(model: Kimi) -> Iterator[None]:
    """Keep decoded tokens out of the router's load and the attention's measurement."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def next_tokens(
    model: Kimi,
    new_tokens: Sequence[Int[Tensor, " _"]],
    features: Float[Tensor, "M D"] | None,
    cache: LatentCache,
    banned: Int[Tensor, " banned"],
) -> Int[Tensor, " B"]:
    """Feed each selected sequence its new tokens; return the most likely next of each."""
    lengths = [len(tokens) for tokens in new_tokens]
    device = new_tokens[0].device
    position_ids = torch.cat(
        [
            torch.arange(sequence.length, sequence.length + new, device=device)
            for sequence, new in zip(cache.selected, lengths, strict=True)
        ]
    )
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    hidden = model(
        torch.cat(list(new_tokens)), position_ids, cu_seqlens, features, cache
    ).hidden_TD[cu_seqlens[1:] - 1]
    logits_BV = model.logits(hidden)
    logits_BV[:, banned] = -torch.inf
    return logits_BV.argmax(dim=-1)
