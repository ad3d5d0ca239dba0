"""Sums along a chain: how many steps an answer takes is the length of the chain.

So length helps and can be wasted: who guesses is right once in ``modulus``, who writes the running
sum down is right, who goes over it again is right too. Harder tasks need longer answers.
"""

import string
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Message

HELD_OUT_ONE_IN = 5
"""Of the chains; no chain is in both splits."""


class Chains:
    """Makes tasks of the ability ``reasoning``; ``difficulty`` is the length of the chain.

    Args:
        seed: of everything.
        min_steps: numbers in a chain, one a letter.
        max_steps: the same, at most 26.
        modulus: numbers and sums are below it; one in ``modulus`` guesses is right.
    """

    def __init__(self, *, seed: int, min_steps: int, max_steps: int, modulus: int) -> None:
        if not 2 <= min_steps <= max_steps <= len(string.ascii_lowercase):
            raise ValueError(
                f"min_steps={min_steps}, max_steps={max_steps}: want 2 <= min <= max <= 26"
            )
        if not 2 <= modulus <= 10:
            raise ValueError(f"modulus={modulus}: want it in [2, 10]")
        self.seed, self.modulus = seed, modulus
        self.min_steps, self.max_steps = min_steps, max_steps

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        num_steps = int(rng.integers(self.min_steps, self.max_steps + 1))
        numbers = rng.integers(self.modulus, size=num_steps).tolist()
        while is_held_out(numbers) != (split == HELD_OUT):
            numbers = rng.integers(self.modulus, size=num_steps).tolist()
        return Task(
            prompt=[Message(role="user", content=lettered(map(str, numbers)))],
            domain="reasoning",
            environment="exact",
            answer=sum(numbers) % self.modulus,
            tags={"difficulty": str(num_steps), "steps": self.steps(numbers)},
        )

    def steps(self, numbers: Sequence[int]) -> str:
        """Write every number down again, each with the sum so far."""
        sums = [sum(numbers[: n + 1]) % self.modulus for n in range(len(numbers))]
        return lettered(f"{number}{sum_}" for number, sum_ in zip(numbers, sums, strict=True))


def lettered(values: Iterable[str]) -> str:
    """Write a value a letter."""
    return "".join(
        f" {letter}{value}" for letter, value in zip(string.ascii_lowercase, values, strict=False)
    )


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether a chain is never trained on."""
    return zlib.crc32(bytes(numbers)) % HELD_OUT_ONE_IN == 0
