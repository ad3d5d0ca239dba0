"""One token of every sequence from its logits: temperature, top-p, bans, and both log-probs.

Axes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moonlit.rl.engines.base import Sampling

TOP_CANDIDATES = 64
"""A nucleus of at most so many tokens is found without looking at the others' order."""
RADIX_LEVELS = ((20, 11), (9, 11), (0, 9))
"""Shift and width [bits] of each digit of a probability's float32 pattern, highest first."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn."""

    token_ids_B: Int[Tensor, " B"]
    behavior_logprobs_B: Float[Tensor, " B"]
    untempered_logprobs_B: Float[Tensor, " B"]
    """Not finite where the logits are not: such a row's token means nothing."""


@dataclass(frozen=True, slots=True)
class BatchSampling:
    """The settings of every sequence of a batch as tensors."""

    temperature_B1: Float[Tensor, "B 1"]
    top_p_B1: Float[Tensor, "B 1"] | None
    """None where no sequence has one below 1."""
    is_greedy_B: Bool[Tensor, " B"] | None
    """None where no sequence is."""
    banned: tuple[Int[Tensor, " bans"], Int[Tensor, " bans"]]
    """Rows and columns."""

    @classmethod
    def of(
        cls, settings: Sequence[Sampling], always_banned: frozenset[int], device: torch.device
    ) -> "BatchSampling":
        """Lay the settings out; they change only when a sequence joins or leaves."""
        bans = [
            (row, token_id)
            for row, sampling in enumerate(settings)
            for token_id in always_banned | sampling.banned_ids
        ]
        rows, columns = torch.tensor(bans, device=device).reshape(-1, 2).long().unbind(1)
        temperatures = torch.tensor([sampling.temperature for sampling in settings], device=device)
        top_p = torch.tensor(
            [[sampling.top_p] for sampling in settings], dtype=torch.float64, device=device
        )
        is_greedy_B = temperatures == 0
        return cls(
            temperature_B1=torch.where(is_greedy_B, 1.0, temperatures)[:, None],
            top_p_B1=top_p if bool((top_p < 1).any()) else None,
            is_greedy_B=is_greedy_B if bool(is_greedy_B.any()) else None,
            banned=(rows, columns),
        )


def sample(
    logits: Float[Tensor, "B V"], settings: BatchSampling, uniforms: Float[Tensor, " B"]
) -> Sampled:
    """Draw one token a row by inverting the cumulative distribution in vocabulary order.

    Args:
        logits: scores of the next token.
        settings: of the rows.
        uniforms: in [0, 1), float64; a row's token depends on its own only.
    """
    logits = logits.float()
    scores_BV = logits / settings.temperature_B1
    scores_BV[settings.banned] = -torch.inf
    probs_BV = scores_BV.softmax(dim=-1)
    if settings.top_p_B1 is not None:
        lowest_B1 = nucleus_thresholds(probs_BV, settings.top_p_B1)
        probs_BV.masked_fill_(probs_BV < lowest_B1, 0.0)
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    # Rounding may lift u * total to the total itself, behind the last token.
    target_B1 = (uniforms[:, None] * total_B1).minimum(total_B1.nextafter(total_B1.new_zeros(())))
    token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    greedy_B = settings.is_greedy_B
    if greedy_B is not None:
        best_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        token_B1 = torch.where(greedy_B[:, None], best_B1, token_B1)
    token_B1.clamp_(max=logits.shape[1] - 1)  # a row that is not finite finds none
    behavior_B = (probs_BV.gather(-1, token_B1) / total_B1).log()[:, 0]
    return Sampled(
        token_ids_B=token_B1[:, 0],
        behavior_logprobs_B=behavior_B if greedy_B is None else behavior_B.masked_fill(greedy_B, 0),
        untempered_logprobs_B=logits.log_softmax(dim=-1).gather(-1, token_B1)[:, 0],
    )


def nucleus_thresholds(
    probs: Float[Tensor, "B V"], top_p: Float[Tensor, "B 1"]
) -> Float[Tensor, "B 1"]:
    """Return the smallest probability in each row's nucleus; 0 where ``top_p`` is 1.

    The nucleus is every token such that those more likely hold less than ``top_p``: equally likely
    tokens are in or out together. Nothing is sorted but the few most likely: sorting 64 rows of
    2304 takes a CPU 25 ms, this 2.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751, Sec. 3.1.
    """
    top_BC = probs.topk(min(TOP_CANDIDATES, probs.shape[-1])).values
    needed_B1 = top_p * probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    is_short_BC = top_BC.cumsum(dim=-1, dtype=torch.float64) < needed_B1
    place_B1 = is_short_BC.sum(dim=-1, keepdim=True).clamp_(max=top_BC.shape[-1] - 1)
    lowest_B1 = top_BC.gather(-1, place_B1)
    is_wide_B = is_short_BC[:, -1] & (top_p[:, 0] < 1)
    if bool(is_wide_B.any()):
        lowest_B1[is_wide_B] = wide_thresholds(probs[is_wide_B], needed_B1[is_wide_B])
    return lowest_B1.masked_fill_(top_p >= 1, 0.0)


def wide_thresholds(
    probs: Float[Tensor, "B V"], needed: Float[Tensor, "B 1"]
) -> Float[Tensor, "B 1"]:
    """Find the largest t such that the probabilities >= t sum to ``needed``, digit by digit.

    The bits of a non-negative float grow with it: the mass of each value of the highest digit says
    which value t has there; then the next digit, among those that share it.
    """
    bits_BV = probs.view(torch.int32)
    found_B1 = torch.zeros_like(needed, dtype=torch.int32)
    mass_BV = probs.double()
    for shift, width in RADIX_LEVELS:
        digit_BV = (bits_BV >> shift) & ((1 << width) - 1)
        mass_BX = mass_BV.new_zeros(len(probs), 1 << width)
        mass_BX.scatter_add_(1, digit_BV.long(), mass_BV)
        from_here_up_BX = mass_BX.flip(-1).cumsum(dim=-1).flip(-1)
        digit_B1 = ((from_here_up_BX >= needed).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
        # Never zero by rounding: the digit must be one that has mass.
        needed = (needed - (from_here_up_BX - mass_BX).gather(-1, digit_B1)).clamp_(min=1e-300)
        mass_BV = mass_BV.masked_fill(digit_BV != digit_B1, 0.0)
        found_B1 |= digit_B1.int() << shift
    return found_B1.view(torch.float32)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Float[Tensor, " B"]:
    """Return one number in [0, 1) for each pair of seed and position, float64.

    A function of its arguments alone, so that a resumed sequence goes on with the same numbers.
    Source: SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    increment = np.uint64(0x9E3779B97F4A7C15)
    seed_B = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    position_B = np.array(positions, dtype=np.uint64)
    mixed_B = mix(mix(seed_B + increment) + (position_B + np.uint64(1)) * increment)
    return torch.from_numpy((mixed_B >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
