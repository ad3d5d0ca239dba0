"""Pointing: points against true points."""

from typing import Any

import numpy as np

from moonlit.rl.rewards.matching import soft_f1
from moonlit.rl.rewards.parsing import points, says_none
from moonlit.rl.rewards.truths import true_points

SIGMA = 0.05
"""Of the image's diagonal; ours: the report states none."""


def pointing(answer: str, truth: Any, *, sigma: float = SIGMA) -> float:
    r"""Soft F1 over $\exp(-d^2 / 2 \sigma^2)$, best matching.

    Source: arXiv:2602.02276, Sec. 4.4.2 (Gaussian-weighted distance under optimal matching).

    Args:
        answer: points ``(x, y)`` in [0, 1].
        truth: the same, as numbers; none: nothing is there, and the answer is to say ``none``.
        sigma: distance at which a match counts 0.61, as a fraction of the diagonal.

    Raises:
        ValueError: if the truth is none that an answer could meet, or sigma not above 0.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    truth_G2 = np.array(true_points(truth), dtype=float).reshape(-1, 2)
    if not len(truth_G2):
        return float(says_none(answer))
    predicted = points(answer)
    if predicted is None:
        return 0.0
    predicted_P2 = np.array(predicted, dtype=float).reshape(-1, 2)
    squares_PG = ((predicted_P2[:, None] - truth_G2[None]) ** 2).sum(axis=-1) / 2  # diagonal is 1
    return soft_f1(np.exp(-squares_PG / (2 * sigma**2)))
