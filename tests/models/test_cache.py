"""Decoding over the latent cache is the full forward, whatever is batched with what."""

import pytest
import torch
from torch import Tensor

from moonlit.models.cache import CachedSequence, CacheFullError, LatentCache
from moonlit.models.decoding import greedy, greedy_batch
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape
from tests.models.shapes import DECODER, DIRECT_QUERIES, MEDIA_PAD_ID, packed, tiny_model

FP32 = 1e-4  # absorbed projections multiply in another order


def text(length: int) -> Tensor:
    return torch.randint(0, MEDIA_PAD_ID, (length,))


def full_logits(model: Kimi, ids: Tensor) -> Tensor:
    return model.logits(model(**packed([ids])).hidden_TD)


def cached_logits(model: Kimi, cache: LatentCache, pieces: list[Tensor]) -> Tensor:
    """Logits of one row whose documents continue the selected sequences."""
    row = packed(pieces)
    starts = [
        torch.full((len(piece),), sequence.length)
        for piece, sequence in zip(pieces, cache.selected, strict=True)
    ]
    row["position_ids"] = row["position_ids"] + torch.cat(starts)
    return model.logits(model(**row, cache=cache).hidden_TD)


@pytest.mark.parametrize("page_tokens", [1, 4, 64])
@pytest.mark.parametrize("shape", [DECODER, DIRECT_QUERIES], ids=["q_lora", "direct_queries"])
def test_cached_decoding_equals_the_full_forward(shape: DecoderShape, page_tokens: int):
    """Catches: a wrong absorbed projection, scale, position, or a token that misses itself."""
    model = tiny_model(shape).eval()
    documents = [text(13), text(9), text(11)]
    cache = LatentCache(shape, page_tokens=page_tokens)
    cache.select([CachedSequence() for _ in documents])
    # Prefill by 5, 1 and 3 tokens; then uneven pieces; then one token each.
    cuts = [[5, 2, 1, 1, 4], [1, 2, 3, 1, 2], [3, 2, 4, 1, 1]]
    pieces = [document.split(lengths) for document, lengths in zip(documents, cuts, strict=True)]

    steps = [cached_logits(model, cache, list(step)) for step in zip(*pieces, strict=True)]

    for index, document in enumerate(documents):
        got = torch.cat(
            [logits.split([cut[step] for cut in cuts])[index] for step, logits in enumerate(steps)]
        )
        torch.testing.assert_close(got, full_logits(model, document), rtol=0, atol=FP32)


def test_a_released_sequence_is_forgotten_and_the_others_are_not():
    model = tiny_model().eval()
    old, kept, new = text(7), text(5), text(4)
    cache = LatentCache(DECODER, page_tokens=2)
    old_sequence, kept_sequence, new_sequence = (CachedSequence() for _ in range(3))
    cache.select([old_sequence, kept_sequence])
    cached_logits(model, cache, [old, kept[:4]])

    cache.release(old_sequence)
    cache.select([kept_sequence, new_sequence])
    logits = cached_logits(model, cache, [kept[4:], new])

    expected = torch.cat([full_logits(model, kept)[4:], full_logits(model, new)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=FP32)
    cache.release(kept_sequence)
    cache.release(new_sequence)
    assert cache.num_pages_in_use == 0


@pytest.mark.parametrize("page_tokens", [1, 3, 4, 64])
def test_forks_share_pages_until_they_write(page_tokens: int):
    """Catches: a fork that writes into its twin's page, a shared page read for one of them only."""
    model = tiny_model().eval()
    prompt, other = text(10), text(3)
    tails = [text(5), text(5), text(5)]
    cache = LatentCache(DECODER, page_tokens=page_tokens)
    first, apart = CachedSequence(), CachedSequence()
    cache.select([first, apart])
    cached_logits(model, cache, [prompt, other])
    in_use = cache.num_pages_in_use
    twins = [first, cache.fork(first), cache.fork(first)]
    assert cache.num_pages_in_use == in_use

    cache.select([*twins[1:], apart, first])
    order = [tails[1], tails[2], text(5), tails[0]]
    steps = [
        cached_logits(model, cache, list(step))
        for step in zip(*(tail.split(1) for tail in order), strict=True)
    ]

    got = torch.stack(steps, dim=1)
    for place, tail in ((0, tails[1]), (1, tails[2]), (3, tails[0])):
        expected = full_logits(model, torch.cat([prompt, tail]))[10:]
        torch.testing.assert_close(got[place], expected, rtol=0, atol=FP32)
    for sequence in cache.selected:
        cache.release(sequence)
    assert cache.num_pages_in_use == 0


def test_a_truncated_sequence_goes_on_otherwise_and_leaves_its_twin_alone():
    model = tiny_model().eval()
    prompt, tail, twin_tail = text(9), text(6), text(2)
    cache = LatentCache(DECODER, page_tokens=4)
    sequence = CachedSequence()
    cache.select([sequence])
    cached_logits(model, cache, [prompt])
    twin = cache.fork(sequence)

    cache.truncate(sequence, 6)
    cache.select([sequence, twin])
    logits = cached_logits(model, cache, [tail, twin_tail])

    expected = [
        full_logits(model, torch.cat([prompt[:6], tail]))[6:],
        full_logits(model, torch.cat([prompt, twin_tail]))[9:],
    ]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=FP32)


def test_a_full_cache_says_so_and_takes_nothing():
    model = tiny_model().eval()
    cache = LatentCache(DECODER, page_tokens=4, max_tokens=10)
    first, second = CachedSequence(), CachedSequence()
    cache.select([first])
    cached_logits(model, cache, [text(6)])

    cache.select([first, second])
    with pytest.raises(CacheFullError, match="1 of 3 pages left, but 2 are needed"):
        cached_logits(model, cache, [text(1), text(5)])
    assert (first.length, second.length, cache.num_pages_in_use) == (6, 0, 2)


def test_greedy_batch_equals_one_by_one_and_the_full_forward():
    """Catches: a finished sequence that shifts the others, a stop id lost, a banned id chosen."""
    model = tiny_model()
    prompts = [text(6), text(3), text(8)]
    full_greedy = []
    for prompt in prompts:
        ids = prompt
        for _ in range(7):
            logits = full_logits(model.eval(), ids)[-1]
            logits[[MEDIA_PAD_ID, 1]] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
        full_greedy.append(ids[len(prompt) :].tolist())
    stop = full_greedy[1][2]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in full_greedy]
    settings = {"max_new_tokens": 7, "stop_ids": {stop}, "banned_ids": {MEDIA_PAD_ID, 1}}
    model.train()

    assert greedy_batch(model, prompts, None, **settings) == expected
    assert [greedy(model, prompt, None, **settings) for prompt in prompts] == expected
    assert model.training
    assert model.language_model.model.layers[1].mlp.gate.tokens_per_expert_ME.sum() == 0


def test_a_row_must_have_one_document_per_selected_sequence():
    model = tiny_model().eval()
    cache = LatentCache(DECODER)
    sequences = [CachedSequence() for _ in range(3)]
    cache.select(sequences)

    with pytest.raises(ValueError, match="2 documents but 3 sequences"):
        model(**packed([text(2), text(3)]), cache=cache)
    with pytest.raises(ValueError, match="selected twice"):
        cache.select([sequences[0], sequences[0]])
