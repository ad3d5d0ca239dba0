"""A question about pictures, its exact truth, and the programs that can answer it.

A *program* is a generator: it yields what the assistant thinks and the cell it runs, receives what
the cell printed, and returns its last thought and its answer. So later cells can depend on what
earlier ones found, exactly as they will when a model writes them. A program never sees the truth.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Cell:
    """One tool call: the thought before it and its code."""

    thinking: str
    code: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a program."""

    thinking: str
    text: str
    value: str
    """What is compared with the truth."""


Program = Generator[Cell, str, Answer]


class UnexpectedOutputError(ValueError):
    """A program cannot go on from what a cell printed: this trajectory is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One task."""

    family: str
    question: str
    images: Sequence[Image.Image]
    truth: str
    is_right: Callable[[str, str], bool]
    """Compares a program's value with the truth: equal, or as near as pixels can measure."""
    programs: dict[str, Callable[[Rng, dict[str, Any]], Program]]
    """By name; each is given the facts that the question states."""
    stated: dict[str, Any]
    """What the question says, and nothing else."""
    difficulty: int
    """1 to 3, from the size of the scene or the number of steps."""


def same(value: str, truth: str) -> bool:
    """Whether two words or whole numbers are the same."""
    return value.strip().lower() == truth.strip().lower()


def within(tolerance: float) -> Callable[[str, str], bool]:
    """Compare numbers separated by commas, each up to a difference."""

    def is_right(value: str, truth: str) -> bool:
        try:
            ours, true = numbers(value), numbers(truth)
        except ValueError:
            return False
        return len(ours) == len(true) and all(
            abs(one - other) <= tolerance for one, other in zip(ours, true, strict=True)
        )

    return is_right


def numbers(text: str) -> list[float]:
    """Read numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def pick(rng: Rng, *options: Any) -> Any:
    """Draw one."""
    return options[rng.integers(len(options))]


def last_line(output: str) -> str:
    """Return the last line that a cell printed.

    Raises:
        UnexpectedOutputError: if it printed nothing.
    """
    lines = output.strip().splitlines()
    if not lines:
        raise UnexpectedOutputError("a cell printed nothing")
    return lines[-1].strip()


def field(output: str, name: str) -> str:
    """Return what follows ``name:`` on a line of a cell's output.

    Raises:
        UnexpectedOutputError: if no line begins so.
    """
    for line in output.splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise UnexpectedOutputError(f"no line begins with {name!r}")


VARIABLES = {
    "img": ("img", "im", "picture", "image"),
    "px": ("px", "a", "arr", "pixels"),
    "mask": ("mask", "m", "fg", "binary"),
    "bg": ("bg", "background", "back"),
    "n": ("n", "count", "num", "k"),
}


class Names:
    """Names for a program's variables, drawn once, and the cells written with them."""

    def __init__(self, rng: Rng) -> None:
        self.drawn = {f"${key}": str(pick(rng, *options)) for key, options in VARIABLES.items()}

    def __call__(self, code: str, **values: Any) -> str:
        """Fill in the names, and the values of ``$(key)``."""
        for key, value in values.items():
            code = code.replace(f"$({key})", str(value))
        for key in sorted(self.drawn, key=len, reverse=True):
            code = code.replace(key, self.drawn[key])
        return code.strip("\n")
