"""Linear equations with an exact solution, a fraction or a whole number, as text or drawn."""

import zlib
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text

HELD_OUT_ONE_IN = 5
"""Of the equations; none is in both splits."""


class Equations:
    """Makes tasks of the ability ``reasoning``, for the reward ``mathematics``.

    Args:
        seed: of everything.
        largest: coefficient.
        picture_fraction: of the tasks that show the equation in a picture.
        picture_side: its height; it is three times as wide [px].
    """

    def __init__(
        self, *, seed: int, largest: int, picture_fraction: float, picture_side: int
    ) -> None:
        if largest < 3 or not 0 <= picture_fraction <= 1:
            raise ValueError(
                f"largest={largest}, picture_fraction={picture_fraction}: want >= 3 and [0, 1]"
            )
        self.seed, self.largest = seed, largest
        self.picture_fraction, self.picture_side = picture_fraction, picture_side

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        while True:
            a, b, c = (int(n) for n in rng.integers(2, self.largest + 1, size=3))
            equation = f"{a}x + {b} = {c}"
            if (zlib.crc32(equation.encode()) % HELD_OUT_ONE_IN == 0) == (split == HELD_OUT):
                break
        is_drawn = rng.random() < self.picture_fraction
        asked = "Solve for x. Put the value into \\boxed{}."
        content = (
            [ImagePart(drawn(equation, self.picture_side)), Text(asked)]
            if is_drawn
            else [Text(f"{equation}. {asked}")]
        )
        return Task(
            prompt=[Message(role="user", content=content)],
            domain="reasoning",
            environment="mathematics",
            answer=latex(Fraction(c - b, a)),
            tags={"modality": "picture" if is_drawn else "text"},
        )

    def solution(self, task: Task) -> str:
        """Answer a task."""
        return rf"\boxed{{{task.answer}}}"


def latex(value: Fraction) -> str:
    r"""Write a fraction: ``\frac{1}{2}``, or ``3``."""
    sign, size = "-" if value < 0 else "", abs(value)
    if size.denominator == 1:
        return f"{sign}{size.numerator}"
    return rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"


def drawn(words: str, side: int) -> Image.Image:
    """Draw a line of words in the middle of a white strip."""
    image = Image.new("RGB", (3 * side, side), "white")
    font = ImageFont.load_default(size=side / 2.5)
    ImageDraw.Draw(image).text((1.5 * side, side / 2), words, "black", font, anchor="mm")
    return image
