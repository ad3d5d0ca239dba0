"""Shares of a pie, the report's own example (arXiv:2602.02276, App. F); heights of bars."""

import itertools
from typing import Any

from PIL import Image, ImageDraw

from data_modules.world.things import COLOURS
from data_modules.zero_vision.cells import look, palette, reference
from data_modules.zero_vision.problem import (
    Answer,
    Cell,
    Names,
    Problem,
    Program,
    Rng,
    field,
    pick,
    same,
    within,
)

Cells = set[tuple[int, int]]


def pie(rng: Rng) -> Problem:
    """The share of a colour in a pie chart, in percent."""
    num = int(rng.integers(2, 7))
    cuts = [0, *sorted(rng.choice(range(1, 20), num - 1, replace=False).tolist()), 20]
    shares = [5 * (b - a) for a, b in itertools.pairwise(cuts)]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:num]]
    side = int(pick(rng, 140, 168, 196))
    image = Image.new("RGB", (side, side), pick(rng, (255, 255, 255), (20, 20, 20)))
    pen, angle = ImageDraw.Draw(image), float(rng.uniform(0, 360))
    margin = side // int(rng.integers(8, 16))
    for share, colour in zip(shares, colours, strict=True):
        end = angle + 3.6 * share
        pen.pieslice((margin, margin, side - margin, side - margin), angle, end, COLOURS[colour])
        angle = end
    chosen = int(rng.integers(num))
    question = pick(
        rng,
        "What share of the pie chart is {c}, in percent?",
        "How many percent does the {c} slice of the pie take?",
        "Read the pie chart: what percentage belongs to {c}?",
        "In the pie chart, how big is the {c} part (percent)?",
    ).format(c=colours[chosen])
    return Problem(
        family="pie",
        question=question,
        images=[image],
        truth=f"{shares[chosen]}",
        is_right=within(1.0),
        programs={"masks": pie_masks, "angles": pie_angles, "hue": pie_hue},
        stated={"colour": colours[chosen]},
        difficulty=1 + (num > 3) + (num > 5),
    )


def pie_masks(rng: Rng, stated: dict[str, Any]) -> Program:
    """Pixel ratios by nearest colour."""
    names = Names(rng)
    yield from look(rng, names)
    code = """
import numpy as np
$px = np.array(images[0]).astype(int)
ref = $(palette)
pie = ($px != $px[0, 0]).any(axis=2)
d = np.stack([abs($px[pie] - c).sum(axis=1) for c in ref.values()])
$n = np.bincount(d.argmin(axis=0), minlength=len(ref))
for name, k in zip(ref, $n):
    if k:
        print(f"{name}: {100 * k / $n.sum():.1f}")"""
    output = yield Cell(
        "Slices are to the pie as their pixels are.", names(code, palette=palette(rng))
    )
    return shared(rng, field(output, stated["colour"]), stated["colour"])


def pie_angles(rng: Rng, stated: dict[str, Any]) -> Program:
    """Count angles on a circle half way out."""
    names, colour = Names(rng), stated["colour"]
    code = """
import numpy as np
$px = np.array(images[0]).astype(int)
ys, xs = np.nonzero(($px != $px[0, 0]).any(axis=2))
cy, cx, r = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2, (xs.max() - xs.min()) / 4
t = np.linspace(0, 2 * np.pi, 3600, endpoint=False)
ring = $px[(cy + r * np.sin(t)).round().astype(int), (cx + r * np.cos(t)).round().astype(int)]
$mask = abs(ring - $(ref)).sum(axis=1) < 60
print("center", cx, cy, "radius", r)
print("share:", round(100 * $mask.mean(), 1))"""
    thinking = f"I walk around a circle inside the pie and see how much of it is {colour}."
    output = yield Cell(thinking, names(code, ref=reference(rng, colour)))
    return shared(rng, field(output, "share"), colour)


def pie_hue(rng: Rng, stated: dict[str, Any]) -> Program:
    """Masks in HSV."""
    names, colour = Names(rng), stated["colour"]
    code = """
import colorsys
from collections import Counter
$img = images[0]
back = $img.getpixel((0, 0))
hues = Counter()
for $n, c in $img.getcolors($img.width * $img.height):
    if c != back:
        h, s, v = colorsys.rgb_to_hsv(*(x / 255 for x in c))
        hues[round(h * 360), round(s, 1)] += $n
print(hues)
h, s, v = colorsys.rgb_to_hsv(*(x / 255 for x in $(ref)))
gap = lambda key: min(abs(key[0] - h * 360), 360 - abs(key[0] - h * 360)) + 50 * abs(key[1] - s)
best = min(hues, key=gap)
print("nearest hue and saturation:", best)
print("share:", round(100 * hues[best] / sum(hues.values()), 1))"""
    thinking = f"In HSV the slices differ by hue; I take the one nearest to {colour}."
    output = yield Cell(thinking, names(code, ref=COLOURS[colour]))
    return shared(rng, field(output, "share"), colour)


def shared(rng: Rng, value: str, colour: str) -> Answer:
    """Answer with a share, rounded to whole percents."""
    try:
        percent = round(float(value))
    except ValueError:
        percent = -1  # not right, so it is dropped
    thinking = f"{colour.capitalize()} has {value} % of the pie's pixels, about {percent} %."
    return Answer(thinking, pick(rng, f"{percent} %", f"About {percent} %."), f"{percent}")


def bars(rng: Rng) -> Problem:
    """The value of a bar, from a bar chart with a known full height."""
    num, top = int(rng.integers(2, 7)), int(pick(rng, 10, 20, 50, 100))
    values = [int(v) for v in rng.integers(1, top + 1, size=num)]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:num]]
    width, height, bar = 28 * num, 160, 18
    image = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for place, (value, colour) in enumerate(zip(values, colours, strict=True)):
        left, top_px = 5 + 28 * place, height - round(value / top * height)
        pen.rectangle((left, top_px, left + bar - 1, height - 1), fill=COLOURS[colour])
    chosen = int(rng.integers(num))
    question = pick(
        rng,
        "In the bar chart the full height stands for {top}. What is the value of the {c} bar?",
        "The axis of this bar chart runs from 0 (bottom) to {top} (top). Read the {c} bar.",
        "How much does the {c} bar show, if the picture's height is {top}?",
    ).format(top=top, c=colours[chosen])
    return Problem(
        family="bars",
        question=question,
        images=[image],
        truth=f"{values[chosen]}",
        is_right=same,
        programs={"column": bars_column, "runs": bars_runs},
        stated={"colour": colours[chosen], "top": top},
        difficulty=1 + (num > 3) + (top > 20),
    )


def bars_column(rng: Rng, stated: dict[str, Any]) -> Program:
    """Height of a colour's mask."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names, chance=0.5)
    code = """
import numpy as np
$px = np.array(images[0]).astype(int)
$mask = abs($px - $(ref)).sum(axis=2) < 60
h = $mask.sum(axis=0).max()
print("height:", h, "of", $px.shape[0])
print("value:", round(h / $px.shape[0] * $(top), 2))"""
    thinking = f"The {colour} bar's height in pixels over the picture's height, times the maximum."
    output = yield Cell(thinking, names(code, ref=reference(rng, colour), top=stated["top"]))
    return read_bar(field(output, "value"))


def bars_runs(rng: Rng, stated: dict[str, Any]) -> Program:
    """All bars from left to right, then the one asked for."""
    names, colour = Names(rng), stated["colour"]
    code = """
import numpy as np
$px = np.array(images[0]).astype(int)
ref = $(palette)
$mask = ($px != 255).any(axis=2)
last = None
for x in range($px.shape[1]):
    h = $mask[:, x].sum()
    if h and h != last:
        c = $px[-1, x]
        name = min(ref, key=lambda k: abs(c - ref[k]).sum())
        print(f"{name}: {h / $px.shape[0] * $(top):.2f}")
    last = h"""
    thinking = "I read every bar from left to right, then take the one that was asked for."
    output = yield Cell(thinking, names(code, palette=palette(rng), top=stated["top"]))
    return read_bar(field(output, colour))


def read_bar(value: str) -> Answer:
    """Answer with the nearest whole value."""
    try:
        nearest = f"{round(float(value))}"
    except ValueError:
        nearest = value  # not right, so it is dropped
    return Answer(f"{value} is {nearest} within a pixel.", nearest, nearest)
