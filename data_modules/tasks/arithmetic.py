"""Sums of small numbers: the same question as text, or drawn into a picture."""

import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text

HELD_OUT_ONE_IN = 5
"""Of the pairs of numbers; no pair is in both splits."""


class Arithmetic:
    """Makes tasks of the ability ``reasoning``.

    Args:
        seed: of everything.
        largest: number in a sum.
        picture_fraction: of the tasks that show the sum in a picture.
        picture_side: of it [px].
    """

    def __init__(
        self, *, seed: int, largest: int, picture_fraction: float, picture_side: int
    ) -> None:
        if largest < 2 or not 0 <= picture_fraction <= 1:
            raise ValueError(
                f"largest={largest}, picture_fraction={picture_fraction}: want >= 2 and [0, 1]"
            )
        self.seed, self.largest = seed, largest
        self.picture_fraction, self.picture_side = picture_fraction, picture_side
        pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
        held = [zlib.crc32(f"{a}+{b}".encode()) % HELD_OUT_ONE_IN == 0 for a, b in pairs]
        self.pairs = {
            split: [pair for pair, is_held in zip(pairs, held, strict=True) if is_held == wanted]
            for split, wanted in (("train", False), (HELD_OUT, True))
        }

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        a, b = self.pairs[split][rng.integers(len(self.pairs[split]))]
        is_drawn = rng.random() < self.picture_fraction
        content = (
            [ImagePart(drawn(f"{a}+{b}", self.picture_side)), Text("What is the sum?")]
            if is_drawn
            else [Text(f"What is {a} + {b}?")]
        )
        return Task(
            prompt=[Message(role="user", content=content)],
            domain="reasoning",
            environment="exact",
            answer=a + b,
            tags={"modality": "picture" if is_drawn else "text"},
        )


def drawn(words: str, side: int) -> Image.Image:
    """Draw a line of words in the middle of a white square."""
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=side / 3)
    ImageDraw.Draw(image).text((side / 2, side / 2), words, "black", font, anchor="mm")
    return image
