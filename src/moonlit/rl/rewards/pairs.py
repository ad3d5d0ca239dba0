"""Wide search in short form: names with their values, as item F1."""

import re
from collections.abc import Sequence

from moonlit.rl.rewards.parsing import says_none

PAIR = re.compile(r"([^\W\d_]+)\s*:?\s*(\d+)")


def pairs(answer: str, truth: Sequence[Sequence[str]]) -> float:
    """F1 over (name, value) pairs; a name with two values is a pair each, and costs precision.

    Source: item-F1 as in WideSearch (arXiv:2508.07999), with exact values.

    Args:
        answer: ``Bato 41, Kilu 17``.
        truth: rows of a name and its value; none: the answer is to say ``none``.
    """
    if not truth:
        return float(says_none(answer))
    said = {(name.casefold(), value) for name, value in PAIR.findall(answer)}
    true = {(name.casefold(), value) for name, value in truth}
    return 2 * len(said & true) / (len(said) + len(true))
