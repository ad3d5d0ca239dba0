"""Shapes named in words, and how many they are: the text twin of counting in a picture."""

import zlib

import numpy as np

from data_modules.tasks.source import HELD_OUT
from data_modules.world.things import COLOURS, SHAPES
from moonlit.batch import Task
from moonlit.chat.messages import Message

HELD_OUT_ONE_IN = 5
"""Of the lists; none is in both splits."""


class ListedShapes:
    """Makes tasks of the ability ``reasoning``.

    Args:
        seed: of everything.
        most: shapes in a list, at least 2.
    """

    def __init__(self, *, seed: int, most: int) -> None:
        if most < 2:
            raise ValueError(f"most={most}: want at least 2 shapes")
        self.seed, self.most = seed, most

    def __call__(self, split: str, number: int) -> Task:
        """Return a task; half ask for all shapes, half for those of a colour that is there."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        num, of_a_colour = int(rng.integers(1, self.most + 1)), bool(rng.integers(2))
        while True:
            colours = rng.choice([*COLOURS], num).tolist()
            words = ", ".join(
                f"{colour} {shape}"
                for colour, shape in zip(colours, rng.choice(SHAPES, num), strict=True)
            )
            if (zlib.crc32(words.encode()) % HELD_OUT_ONE_IN == 0) == (split == HELD_OUT):
                break
        asked = colours[0] if of_a_colour else "there"
        return Task(
            prompt=[
                Message(
                    role="user", content=f"A picture shows: {words}. How many shapes are {asked}?"
                )
            ],
            domain="reasoning",
            environment="counting",
            answer=colours.count(colours[0]) if of_a_colour else num,
            tags={"modality": "text", "asked": "a colour" if of_a_colour else "all"},
        )
