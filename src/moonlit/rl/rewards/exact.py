"""Whether an answer is the truth: the whole of it, not a part that happens to stand in it."""

import math
import re
from collections.abc import Iterator
from typing import Any

from moonlit.rl.rewards.parsing import says_none

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
NOT_COORDINATES = re.compile(r"[^\s()\[\],]")
DECIMALS = 2  # of coordinates in answers


def is_exact(answer: str, truth: Any) -> bool:
    """Compare an answer with a number, a text, or (nested lists of) coordinates in [0, 1].

    Case, outer spaces and a final full stop do not matter; anything else does: an answer that lists
    several possibilities is wrong. Coordinates are compared at two decimals; where there are none
    the answer says ``none``.
    """
    said = " ".join(answer.split()).removesuffix(".").casefold()
    if isinstance(truth, str):
        return said == " ".join(truth.split()).removesuffix(".").casefold()
    if isinstance(truth, int | float):
        return NUMBER.fullmatch(said) is not None and math.isclose(float(said), truth)
    if not truth:
        return says_none(answer)
    wanted = [round(number, DECIMALS) for number in flat(truth)]
    got = [float(number) for number in NUMBER.findall(said)]
    if NOT_COORDINATES.search(NUMBER.sub("", said)) or len(got) != len(wanted):
        return False
    return all(math.isclose(g, w, abs_tol=1e-9) for g, w in zip(got, wanted, strict=True))


def is_comparable(truth: Any) -> bool:
    """Whether ``is_exact`` knows such a truth: a number, a text, or (nested lists of) numbers."""
    if isinstance(truth, list | tuple):
        return all(is_comparable(part) and not isinstance(part, str) for part in truth)
    return isinstance(truth, str | int | float)


def flat(values: Any) -> Iterator[float]:
    """Walk through nested lists of numbers."""
    if isinstance(values, int | float):
        yield values
        return
    for value in values:
        yield from flat(value)
