"""Counting: a number against the true one."""

import math

from moonlit.rl.rewards.parsing import only_number


def counting(answer: str, truth: int | float) -> float:
    r"""$\max(0, 1 - |p - g| / \max(g, 1))$.

    Source: arXiv:2602.02276, Sec. 4.4.2 (from the absolute difference); the map is ours. An answer
    with no number, or with several, earns nothing.

    Raises:
        ValueError: if the truth is no finite number of at least 0.
    """
    if not (math.isfinite(truth) and truth >= 0):
        raise ValueError(f"the true count is {truth}")
    said = only_number(answer)
    return 0.0 if said is None else max(0.0, 1 - abs(said - truth) / max(truth, 1))
