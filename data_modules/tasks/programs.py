"""Small functions to be written, with tests: what to keep of a list, what to do to it, what to say.

Every task is a composition of three steps, so its tests come from running the program that solves
it; a composition is in one split only. One example is shown; it is not among the tests.
"""

import zlib
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Message

HELD_OUT_ONE_IN = 5
KEEP = {
    "all numbers": "",
    "the even numbers": " if x % 2 == 0",
    "the odd numbers": " if x % 2 == 1",
    "the numbers above 3": " if x > 3",
    "the negative numbers": " if x < 0",
}
CHANGE = {
    "as they are": "x",
    "each doubled": "2 * x",
    "each squared": "x * x",
    "each without its sign": "abs(x)",
}
SAY = {
    "their sum": "sum({})",
    "how many they are": "len({})",
    "their list in order": "sorted({})",
    "their list the other way round": "{}[::-1]",
    "the largest, or 0 if there is none": "max({}, default=0)",
}


class Programs:
    """Makes tasks of the ability ``coding``.

    Args:
        seed: of everything.
        num_tests: of each task.
    """

    def __init__(self, *, seed: int, num_tests: int) -> None:
        if num_tests < 1:
            raise ValueError(f"num_tests={num_tests}: want at least 1")
        self.seed, self.num_tests = seed, num_tests

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        chosen = compositions(split)
        keep, change, say = chosen[rng.integers(len(chosen))]

        source = program(keep, change, say)
        solved = function(source)
        lists = [[]] if self.num_tests > 1 else []
        while len(lists) <= self.num_tests:
            xs = rng.integers(-9, 10, size=int(rng.integers(3, 9))).tolist()
            if xs not in lists:
                lists.append(xs)
        *tested, shown = lists
        words = (
            f"Write a Python function solve(xs) that takes a list of whole numbers. Of {keep}, "
            f"{change}, it returns {say}. For example, solve({shown}) is {solved(shown)}. "
            "Answer with the function in one ```python block."
        )
        tests = [{"call": f"solve({xs})", "expected": solved(xs)} for xs in tested]
        return Task(
            prompt=[Message(role="user", content=words)],
            domain="coding",
            environment="code",
            answer={"tests": tests},
            tags={"composition": f"{keep}, {change}, {say}", "program": source},
        )

    def solution(self, task: Task) -> str:
        """Answer a task."""
        return f"```python\n{task.tags['program']}\n```"


def program(keep: str, change: str, say: str) -> str:
    """Write the function of a composition."""
    values = f"[{CHANGE[change]} for x in xs{KEEP[keep]}]"
    return f"def solve(xs):\n    return {SAY[say].format(values)}"


def function(source: str) -> Callable[[list[int]], int | list[int]]:
    """Run a program of ours, and return its function."""
    space: dict[str, Any] = {}
    exec(source, space)
    return space["solve"]


def compositions(split: str) -> list[tuple[str, str, str]]:
    """Return a split's compositions."""
    return [
        steps
        for steps in product(KEEP, CHANGE, SAY)
        if (zlib.crc32(" ".join(steps).encode()) % HELD_OUT_ONE_IN == 0) == (split == HELD_OUT)
    ]
