"""The sampler against closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlit.rl.engines.base import Sampling
from moonlit.rl.engines.sampling import BatchSampling, nucleus_thresholds, sample, uniforms

CPU = torch.device("cpu")


def settings_of(num: int, **values: object) -> BatchSampling:
    sampling = Sampling(max_new_tokens=1, stop_ids=frozenset(), **values)
    return BatchSampling.of([sampling] * num, frozenset(), CPU)


def closed_form(
    logits: torch.Tensor, temperature: float, top_p: float, banned: frozenset[int]
) -> torch.Tensor:
    """The distribution by its definition: sort, cut, normalise."""
    scores = logits.double() / temperature
    scores[list(banned)] = -torch.inf
    probs = scores.softmax(-1)
    more_likely = torch.stack([probs[probs > p].sum() for p in probs])
    kept = torch.where(more_likely < top_p, probs, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "banned"),
    [
        (1.0, 1.0, frozenset[int]()),
        (0.6, 0.95, frozenset[int]()),
        (1.7, 0.5, frozenset({2, 3})),
        (1.0, 0.9, frozenset({0})),
    ],
)
def test_samples_follow_the_closed_form(temperature: float, top_p: float, banned: frozenset[int]):
    """Chi-square at a fixed seed; also the recorded log-probs are that distribution's."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = closed_form(logits, temperature, top_p, banned)
    num = 20_000
    drawn = sample(
        logits.expand(num, -1),
        settings_of(num, temperature=temperature, top_p=top_p, banned_ids=banned),
        uniforms([3] * num, range(num)),
    )

    counts = drawn.token_ids_B.bincount(minlength=12).double()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((counts - num * expected)[seen].square() / (num * expected[seen])).sum()
    degrees = int(seen.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    torch.testing.assert_close(
        drawn.behavior_logprobs_B.double(), expected.log()[drawn.token_ids_B], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        drawn.untempered_logprobs_B, logits.log_softmax(-1)[drawn.token_ids_B], rtol=0, atol=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 30.0]),
    width=st.sampled_from([2, 63, 64, 65, 400]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.95, 0.999999, 1.0]),
)
def test_the_nucleus_is_that_of_a_sort(seed: int, spread: float, width: int, top_p: float):
    """Peaked and flat rows, ties, more tokens than the candidates looked at first."""
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * spread
    logits[1] = logits[1].round()  # ties
    probs = logits.softmax(-1)

    lowest = nucleus_thresholds(probs, torch.full((3, 1), top_p, dtype=torch.float64))

    for row, threshold in zip(probs.double(), lowest[:, 0], strict=True):
        more_likely = torch.stack([row[row > p].sum() for p in row])
        needed = top_p * row.sum()
        certain = (more_likely - needed).abs() > 1e-9  # the rest is rounding
        kept = row >= threshold
        assert torch.equal(kept[certain], (more_likely < needed)[certain] | (top_p == 1.0))
        assert kept.any()


def test_rows_keep_their_own_settings():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    rows = [
        Sampling(max_new_tokens=1, stop_ids=frozenset(), temperature=t, top_p=p, banned_ids=b)
        for t, p, b in [
            (1.0, 1.0, frozenset()),
            (0.0, 1.0, frozenset()),
            (0.5, 0.3, frozenset({int(logits[2].argmax())})),
            (2.0, 0.9, frozenset({1, 2})),
        ]
    ]
    numbers = torch.tensor([0.1, 0.9, 0.5, 0.7], dtype=torch.float64)

    together = sample(logits, BatchSampling.of(rows, frozenset({29}), CPU), numbers)

    for row, sampling in enumerate(rows):
        one = BatchSampling.of([sampling], frozenset({29}), CPU)
        alone = sample(logits[row : row + 1], one, numbers[row : row + 1])
        assert alone.token_ids_B[0] == together.token_ids_B[row]
        torch.testing.assert_close(
            alone.behavior_logprobs_B[0], together.behavior_logprobs_B[row], rtol=0, atol=1e-6
        )
    assert together.token_ids_B[1] == logits[1, :29].argmax()
    assert together.token_ids_B[2] != logits[2].argmax()


def test_the_largest_uniform_still_draws_a_token_that_can_be_drawn():
    logits = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    largest = torch.tensor([np.nextafter(1.0, 0.0)])
    drawn = sample(logits, settings_of(1), largest)
    assert drawn.token_ids_B.tolist() == [2]


def test_uniforms_are_uniform_and_depend_on_seed_and_position_alone():
    many = uniforms([7] * 50_000, range(50_000))
    other_seeds = uniforms(range(50_000), [7] * 50_000)
    for numbers in (many, other_seeds):
        counts = torch.histc(numbers.float(), bins=50, min=0, max=1)
        assert ((counts - 1000).square() / 1000).sum() < 49 + 4 * 98**0.5
        assert torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1].abs() < 0.02
    assert uniforms([-1, 2**64 + 5], [3, 3]).tolist() == [
        *uniforms([2**64 - 1], [3]).tolist(),
        *uniforms([5], [3]).tolist(),
    ]
