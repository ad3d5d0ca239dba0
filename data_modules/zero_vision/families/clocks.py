"""The time on a clock."""

import math
from typing import Any

from PIL import Image, ImageDraw

from data_modules.world.things import COLOURS
from data_modules.zero_vision.cells import look, reference
from data_modules.zero_vision.problem import (
    Answer,
    Cell,
    Names,
    Problem,
    Program,
    Rng,
    last_line,
    pick,
    same,
)

Cells = set[tuple[int, int]]


def clock(rng: Rng) -> Problem:
    """The time on a clock face."""
    hour, minute = int(rng.integers(12)), 5 * int(rng.integers(12))
    side = int(pick(rng, 112, 140, 168))
    image = Image.new("RGB", (side, side), (255, 255, 255))
    pen, centre = ImageDraw.Draw(image), side / 2
    pen.ellipse((3, 3, side - 4, side - 4), outline=(0, 0, 0), width=2)
    colours = [str(c) for c in rng.permutation(["red", "blue", "green", "purple"])[:2]]
    turns = ((hour + minute / 60) / 12, minute / 60)
    for turn, length, colour in zip(turns, (0.25, 0.4), colours, strict=True):
        angle = 2 * math.pi * turn
        tip = (centre + side * length * math.sin(angle), centre - side * length * math.cos(angle))
        pen.line((centre, centre, *tip), fill=COLOURS[colour], width=5)
    question = pick(
        rng,
        "What time does the clock show? The hour hand is {h}, the minute hand {m}. Answer h:mm.",
        "Read the clock ({h} hour hand, {m} minute hand), as h:mm.",
        "A clock with a {h} hand for hours and a {m} one for minutes. Which time is it (h:mm)?",
    ).format(h=colours[0], m=colours[1])
    return Problem(
        family="clock",
        question=question,
        images=[image],
        truth=f"{hour or 12}:{minute:02d}",
        is_right=same,
        programs={"angles": clock_angles},
        stated={"hour": colours[0], "minute": colours[1]},
        difficulty=2,
    )


def clock_angles(rng: Rng, stated: dict[str, Any]) -> Program:
    """Angles of the hands' centres of mass."""
    names = Names(rng)
    yield from look(rng, names, chance=0.4)
    code = """
import numpy as np
$px = np.array(images[0]).astype(int)
c = ($px.shape[0] - 1) / 2
def turn(rgb):
    ys, xs = np.nonzero(abs($px - rgb).sum(axis=2) < 90)
    far = np.hypot(xs - c, ys - c) > 0.12 * len($px)
    return np.arctan2(xs[far].mean() - c, c - ys[far].mean()) / (2 * np.pi) % 1
hour, minute = turn($(hour)), turn($(minute))
print("hour hand:", round(hour * 12, 2), "minute hand:", round(minute * 60, 1))"""
    thinking = pick(
        rng,
        "Each hand has its own colour; its direction from the centre gives an angle.",
        "I compute the angle of each hand from the mean position of its pixels.",
    )
    hands = {key: reference(rng, stated[key]) for key in ("hour", "minute")}
    output = last_line((yield Cell(thinking, names(code, **hands))))
    code = """
m = round(minute * 60 / 5) * 5 % 60
h = round(hour * 12 - m / 60) % 12
print(f"{h or 12}:{m:02d}")"""
    thinking = f"{output}. Round the minutes to five and take the hour that fits them."
    time = last_line((yield Cell(thinking, names(code))))
    return Answer(f"The hands say {time}.", pick(rng, time, f"It is {time}."), time)
