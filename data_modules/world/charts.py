"""Bar charts with exact values: what a bar's value is, which is the highest, how far two differ."""

from collections.abc import Sequence

from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from data_modules.world.question import Item, Question
from data_modules.world.things import COLOURS, Pair

LARGEST = 9
NUM_BARS = (3, 6)
"""Least, and one more than most."""
LABEL_FRACTION = 0.16
"""Of the side: the column of numbers beside the axis."""
GRID, INK = (200, 200, 200), (20, 20, 20)


def charts(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """Three to five bars of unlike colours and values; the axis is numbered, with a line a unit."""
    num = int(rng.integers(*NUM_BARS))
    colours = [tuple(COLOURS)[place] for place in rng.permutation(len(COLOURS))[:num]]
    values = [int(value) + 1 for value in rng.permutation(LARGEST)[:num]]
    bars = dict(zip(colours, values, strict=True))
    questions = (value_of(rng, bars), extreme(rng, bars), difference(rng, bars))
    question = questions[rng.integers(len(questions))]
    return Item(frames=[drawn(bars, side)], questions=[question], tags={"bars": str(num)})


def value_of(rng: Generator, bars: dict[str, int]) -> Question:
    """Ask for one bar's value."""
    colour = tuple(bars)[rng.integers(len(bars))]
    text = f"What is the value of the {colour} bar?"
    value = bars[colour]
    return Question(text=text, answer=f"{value}", truth=value, environment="chart_value")


def extreme(rng: Generator, bars: dict[str, int]) -> Question:
    """Ask for the highest or the lowest bar's colour."""
    word, pick = (("highest", max), ("lowest", min))[rng.integers(2)]
    colour = pick(bars, key=lambda colour: bars[colour])
    text = f"What colour is the {word} bar?"
    return Question(text=text, answer=colour, truth=colour, environment="chart_name")


def difference(rng: Generator, bars: dict[str, int]) -> Question:
    """Ask how far a higher bar is above a lower one."""
    one, other = (tuple(bars)[place] for place in rng.permutation(len(bars))[:2])
    if bars[one] < bars[other]:
        one, other = other, one
    text = f"How much higher is the {one} bar than the {other} bar?"
    gap = bars[one] - bars[other]
    return Question(text=text, answer=f"{gap}", truth=gap, environment="chart_value")


def drawn(bars: dict[str, int], side: int) -> Image.Image:
    """Draw the bars from left to right over a grid."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    left, bottom = LABEL_FRACTION * side, side - 3.0
    unit = (bottom - 4) / LARGEST
    font = ImageFont.load_default(max(7.0, 0.9 * unit))
    for value in range(LARGEST + 1):
        y = level(value, bottom, unit)
        pen.line([(left, y), (side - 1, y)], GRID)
        if value % 3 == 0:
            pen.text((left - 2, y), f"{value}", INK, font, anchor="rm")
    room = (side - left) / len(bars)
    for place, (colour, value) in enumerate(bars.items()):
        start = left + (place + 0.2) * room
        corners = [(start, level(value, bottom, unit)), (start + 0.6 * room, bottom)]
        pen.rectangle(corners, fill=COLOURS[colour])
    return image


def level(value: int, bottom: float, unit: float) -> int:
    """Row of a value [px]."""
    return round(bottom - value * unit)
