"""What an answer says in numbers: strict, total and bounded; what cannot be read is None.

Coordinates are written as ``(0.12, 0.30, 0.50, 0.60)``, several one after another. Words around
them are allowed, so that a policy may explain itself, but every bracket must hold coordinates: an
answer cannot hide a second try in a bracket that is not counted.
"""

import math
import re

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
LETTER = re.compile(r"\w")
BRACKETS = re.compile(r"\(([^()]*)\)")
MAX_BRACKETS = 256
"""More are no answer: reading them would be work that the policy can make us do for nothing."""
MAX_CHARS = 20_000
Tuple = tuple[float, ...]

NOTHING = ("none", "[]")
"""How an answer says that nothing is there; no words at all say nothing."""


def says_none(answer: str) -> bool:
    """Whether an answer is ``none`` or ``[]``; case, spaces and a full stop do not matter."""
    return answer.strip().removesuffix(".").casefold() in NOTHING


def only_number(answer: str) -> float | None:
    """Return the one number that an answer holds; none, several or part of a word is no answer."""
    found = list(NUMBER.finditer(answer[:MAX_CHARS]))
    if len(found) != 1 or len(answer) > MAX_CHARS:
        return None
    start, end = found[0].span()
    if LETTER.match(answer[start - 1 : start]) or LETTER.match(answer[end : end + 1]):
        return None
    number = float(found[0][0])
    return number if math.isfinite(number) else None


def tuples(answer: str, length: int | None = None) -> list[Tuple] | None:
    """Return the bracketed groups of coordinates in [0, 1]; None if any is something else.

    Args:
        answer: the words.
        length: numbers in each group; None: any even number of at least two.
    """
    if len(answer) > MAX_CHARS:
        return None
    groups = BRACKETS.findall(answer)
    if len(groups) > MAX_BRACKETS or answer.count("(") != len(groups):
        return None
    read = [coordinates(group) for group in groups]
    for one in read:
        if one is None or (len(one) != length if length else len(one) < 2 or len(one) % 2):
            return None
    return [one for one in read if one is not None]


def coordinates(group: str) -> Tuple | None:
    """Return the numbers between commas, each in [0, 1]."""
    numbers = []
    for word in group.split(","):
        if NUMBER.fullmatch(word.strip()) is None:
            return None
        number = float(word)
        if not 0 <= number <= 1:
            return None
        numbers.append(number)
    return tuple(numbers)


def boxes(answer: str) -> list[Tuple] | None:
    """Return boxes (left, top, right, bottom); None if one is empty or turned round."""
    read = tuples(answer, 4)
    if read is None or any(x1 >= x2 or y1 >= y2 for x1, y1, x2, y2 in read):
        return None
    return read


def points(answer: str) -> list[Tuple] | None:
    """Return points (x, y)."""
    return tuples(answer, 2)
