"""Problems over diagrams: mazes, pie charts, bar charts, clocks.

Mazes and pie charts are the report's own examples (arXiv:2602.02276, App. F).
"""

import itertools
import math
from collections import deque
from typing import Any

from PIL import Image, ImageDraw

from data_modules.world.things import COLOURS
from data_modules.zero_vision.cells import look, palette, reference, whole
from data_modules.zero_vision.problem import (
    Answer,
    Cell,
    Names,
    Problem,
    Program,
    Rng,
    field,
    last_line,
    pick,
    same,
    within,
)

Cells = set[tuple[int, int]]


def carve(rng: Rng, num: int) -> Cells:
    """Carve a maze of ``num`` by ``num`` rooms, with a few loops; rooms stand at odd places."""
    free: Cells = {(1, 1)}
    stack = [(1, 1)]
    while stack:
        y, x = stack[-1]
        steps = [(y + 2, x), (y - 2, x), (y, x + 2), (y, x - 2)]
        fresh = [p for p in steps if min(p) > 0 and max(p) < 2 * num and p not in free]
        if not fresh:
            stack.pop()
            continue
        room = fresh[rng.integers(len(fresh))]
        free |= {room, ((room[0] + y) // 2, (room[1] + x) // 2)}
        stack.append(room)
    for _ in range(num // 2):
        y, x = (int(v) for v in rng.integers(1, 2 * num, size=2))
        if (y + x) % 2:
            free.add((y, x))
    return free


def path_length(free: Cells, start: tuple[int, int], end: tuple[int, int]) -> int:
    """Length of a shortest path in squares."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        y, x = queue.popleft()
        for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if p in free and p not in distance:
                distance[p] = distance[y, x] + 1
                queue.append(p)
    return distance[end]


def maze(rng: Rng) -> Problem:
    """Length of the shortest path through a maze."""
    num, cell = int(rng.integers(3, 9)), int(rng.integers(5, 10))
    free = carve(rng, num)
    rooms = [(y, x) for y, x in sorted(free) if y % 2 and x % 2]
    start, end = (rooms[i] for i in rng.choice(len(rooms), 2, replace=False))
    colours = {"start": pick(rng, "green", "blue"), "end": pick(rng, "red", "orange")}
    wall, floor = pick(rng, ((0, 0, 0), (255, 255, 255)), ((40, 40, 60), (235, 235, 225)))
    width = (2 * num + 1) * cell
    image = Image.new("RGB", (width, width), wall)
    pen = ImageDraw.Draw(image)
    special = {start: COLOURS[colours["start"]], end: COLOURS[colours["end"]]}
    for y, x in free:
        box = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
        pen.rectangle(box, fill=special.get((y, x), floor))
    stated = {**colours, "squares": 2 * num + 1}
    question = pick(
        rng,
        "The maze has {squares} by {squares} squares. How many steps does the shortest way from "
        "the {start} square to the {end} square take?",
        "Find the shortest path from {start} to {end} in this maze of {squares} x {squares} "
        "squares. How many steps is it?",
        "A maze of {squares} by {squares} squares, dark walls. Start: {start}, goal: {end}. "
        "Length of the shortest path, in squares moved?",
    ).format(**stated)
    length = path_length(free, start, end)
    return Problem(
        family="maze",
        question=question,
        images=[image],
        truth=f"{length}",
        is_right=same,
        programs={"bfs": maze_bfs, "networkx": maze_networkx, "wave": maze_wave},
        stated=stated,
        difficulty=1 + (num > 4) + (num > 6),
    )


def maze_grid(rng: Rng, names: Names, stated: dict[str, Any]) -> str:
    """Write the code that reads the maze into a grid of squares."""
    return names(
        """
import numpy as np
$px = np.array(images[0]).astype(int)
s = $px.shape[0] // $(squares)
grid = $px[s // 2::s, s // 2::s]
free = grid.max(axis=2) > 128
near = lambda c: tuple(map(int, np.unravel_index(abs(grid - c).sum(axis=2).argmin(), free.shape)))
start, end = near($(start)), near($(end))
print("square:", s, "px; free:", int(free.sum()), "of", free.size)
print("start", start, "end", end)""",
        squares=stated["squares"],
        start=reference(rng, stated["start"]),
        end=reference(rng, stated["end"]),
    )


MAZE_THOUGHTS = (
    "I sample the middle of each square: bright or coloured is free, dark is wall.",
    "First I turn the picture into a grid of free squares and find both ends by their colour.",
    "Binarise per square, mark start and goal, then search.",
)


def maze_with(rng: Rng, stated: dict[str, Any], thinking: str, code: str) -> Program:
    """Read the grid, search it, answer."""
    names = Names(rng)
    yield Cell(pick(rng, *MAZE_THOUGHTS), maze_grid(rng, names, stated))
    output = yield Cell(thinking, names(code))
    length = whole(field(output, "steps"))
    return Answer(f"The search reaches the goal after {length} steps.", f"{length}", f"{length}")


def maze_bfs(rng: Rng, stated: dict[str, Any]) -> Program:
    """Breadth-first search by hand."""
    code = """
from collections import deque
dist, queue = {start: 0}, deque([start])
while queue:
    y, x = queue.popleft()
    for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
        if 0 <= min(p) and max(p) < len(free) and free[p] and p not in dist:
            dist[p] = dist[y, x] + 1
            queue.append(p)
print("reached:", len(dist), "squares")
print("steps:", dist[end])"""
    return (yield from maze_with(rng, stated, "Breadth-first search gives the length.", code))


def maze_networkx(rng: Rng, stated: dict[str, Any]) -> Program:
    """Networkx's shortest path."""
    code = """
import networkx as nx
g = nx.grid_2d_graph(*free.shape).subgraph(map(tuple, np.argwhere(free).tolist()))
path = nx.shortest_path(g, start, end)
print(path[:6], "...")
print("steps:", len(path) - 1)"""
    return (yield from maze_with(rng, stated, "The free squares are a graph.", code))


def maze_wave(rng: Rng, stated: dict[str, Any]) -> Program:
    """A wave of dilations."""
    code = """
from scipy import ndimage
wave, $n = np.zeros_like(free), 0
wave[start] = True
while not wave[end]:
    wave = ndimage.binary_dilation(wave, mask=free)
    $n += 1
print("wave covers:", int(wave.sum()))
print("steps:", $n)"""
    thinking = "I let a wave spread from the start, one square a step, until it meets the goal."
    return (yield from maze_with(rng, stated, thinking, code))


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
