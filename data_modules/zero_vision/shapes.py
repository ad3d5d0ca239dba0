"""Problems over scenes of coloured shapes: counting, sizes, places, colours, distances."""

import math
from typing import Any

import numpy as np

from data_modules.world.scenes import background_of
from data_modules.world.things import COLOURS, RADII, SEEN_PAIRS, Thing, draw, draw_pairs, place
from data_modules.zero_vision.cells import LOAD, colour_mask, look, palette, whole
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

SIDES = (84, 112, 140, 168)
COUNT_WORDS = (
    "How many shapes are there in the picture?",
    "Count the shapes in the image.",
    "How many separate objects does the picture show?",
    "What is the number of shapes in the image?",
    "Tell me how many figures are drawn here.",
)


def scene(rng: Rng, num: int) -> tuple[list[Thing], int, Any]:
    """Place things on a picture of some size."""
    side = int(pick(rng, *SIDES))
    radii = RADII.get(num, (0.08, 0.13))
    things = place(rng, draw_pairs(rng, SEEN_PAIRS, num), side, radii)
    return things, side, draw(things, side, background_of(rng))


def one_of_a_colour(rng: Rng, num: int) -> tuple[list[Thing], Thing, int, Any]:
    """Draw scenes until some thing has its colour alone."""
    while True:
        things, side, image = scene(rng, num)
        colours = [thing.colour for thing in things]
        alone = [thing for thing in things if colours.count(thing.colour) == 1]
        if alone:
            return things, alone[rng.integers(len(alone))], side, image


def counting(rng: Rng) -> Problem:
    """How many shapes."""
    num = int(rng.integers(1, 10))
    _, _, image = scene(rng, num)
    return Problem(
        family="counting",
        question=pick(rng, *COUNT_WORDS),
        images=[image],
        truth=f"{num}",
        is_right=same,
        programs={"label": count_label, "flood": count_flood, "graph": count_graph},
        stated={},
        difficulty=1 + (num > 3) + (num > 6),
    )


def count_label(rng: Rng, stated: dict[str, Any]) -> Program:
    """Connected components by scipy."""
    names = Names(rng)
    yield from look(rng, names)
    thinking = pick(
        rng,
        "Everything that is not background belongs to a shape, and the shapes do not touch. "
        "So I label the connected components.",
        "Binarise against the background, then count connected blots.",
        "A mask of the foreground and scipy.ndimage.label give the count.",
    )
    code = LOAD + "from scipy import ndimage\n$mask = ($px != $bg).any(axis=2)\n"
    code += "labels, $n = ndimage.label($mask)\n"
    code += pick(
        rng,
        'print("areas:", np.bincount(labels.ravel())[1:].tolist())\nprint("count:", $n)',
        "sizes = ndimage.sum($mask, labels, range(1, $n + 1))\n"
        'print("areas:", sorted(map(int, sizes)))\nprint("count:", $n)',
        "for i, box in enumerate(ndimage.find_objects(labels)):\n"
        '    print(i, box[1].start, box[0].start, box[1].stop, box[0].stop)\nprint("count:", $n)',
    )
    output = yield Cell(thinking, names(code, place=0))
    return counted(rng, field(output, "count"))


def count_flood(rng: Rng, stated: dict[str, Any]) -> Program:
    """Flood fill by hand."""
    names = Names(rng)
    yield from look(rng, names)
    thinking = pick(
        rng,
        "I flood each blot of foreground pixels once; the number of fills is the answer.",
        "A simple stack-based fill over the foreground mask counts the blots.",
    )
    code = (
        LOAD
        + """
todo = {(int(y), int(x)) for y, x in np.argwhere(($px != $bg).any(axis=2))}
sizes = []
while todo:
    stack, size = [todo.pop()], 0
    while stack:
        y, x = stack.pop()
        size += 1
        for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if p in todo:
                todo.remove(p)
                stack.append(p)
    sizes.append(size)
print("sizes:", sorted(sizes))
print("count:", len(sizes))"""
    )
    output = yield Cell(thinking, names(code, place=0))
    return counted(rng, field(output, "count"))


def count_graph(rng: Rng, stated: dict[str, Any]) -> Program:
    """Connected components of a graph of pixels."""
    names = Names(rng)
    yield from look(rng, names)
    thinking = pick(
        rng,
        "Take foreground pixels as nodes, neighbours as edges: each shape is one component.",
        "networkx can count the components of the grid of foreground pixels.",
    )
    code = (
        LOAD
        + """
import networkx as nx
$mask = ($px != $bg).any(axis=2)
g = nx.grid_2d_graph(*$mask.shape).subgraph(map(tuple, np.argwhere($mask).tolist()))
parts = list(nx.connected_components(g))
print("pixels:", sorted(len(p) for p in parts))
print("count:", len(parts))"""
    )
    output = yield Cell(thinking, names(code, place=0))
    return counted(rng, field(output, "count"))


def counted(rng: Rng, value: str) -> Answer:
    """Answer with a count."""
    num = whole(value)
    thinking = pick(
        rng,
        f"The code finds {num} separate regions.",
        f"That gives {num}, and no region is so small that it could be noise.",
        f"{num} components: that is the answer.",
    )
    text = pick(rng, f"There are {num} shapes.", f"{num}", f"I count {num}.")
    return Answer(thinking, text if num != 1 else "1", f"{num}")


def counting_colour(rng: Rng) -> Problem:
    """How many shapes of a colour."""
    things, _, image = scene(rng, int(rng.integers(2, 10)))
    colour = things[rng.integers(len(things))].colour
    num = sum(thing.colour == colour for thing in things)
    question = pick(
        rng,
        f"How many shapes are {colour}?",
        f"Count the {colour} shapes.",
        f"How many {colour} objects can be seen?",
        f"What is the number of {colour} figures in the image?",
    )
    return Problem(
        family="counting_colour",
        question=question,
        images=[image],
        truth=f"{num}",
        is_right=same,
        programs={"mask": colour_count_mask, "names": colour_count_names},
        stated={"colour": colour},
        difficulty=1 + (len(things) > 3) + (len(things) > 6),
    )


def colour_count_mask(rng: Rng, stated: dict[str, Any]) -> Program:
    """Mask one colour, then label."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names)
    thinking = pick(
        rng,
        f"I keep the pixels near {colour} and label what is left.",
        f"A mask of {colour} pixels, then connected components.",
    )
    code = LOAD + "from scipy import ndimage\n" + colour_mask(rng, colour)
    code += '\nlabels, $n = ndimage.label($mask)\nprint("pixels:", np.bincount(labels.ravel())[1:].tolist())\n'  # noqa: E501
    code += 'print("count:", $n)'
    output = yield Cell(thinking, names(code, place=0))
    num = whole(field(output, "count"))
    return Answer(
        f"The {colour} mask has {num} regions.",
        pick(rng, f"{num}", f"{num} of them are {colour}."),
        f"{num}",
    )


def colour_count_names(rng: Rng, stated: dict[str, Any]) -> Program:
    """Name the colour of every blot, then count."""
    names, colour = Names(rng), stated["colour"]
    thinking = pick(
        rng,
        "I find every shape, name its colour by the nearest reference, and count the names.",
        "Label all shapes first; then each one's colour at one of its pixels gives its name.",
    )
    code = (
        LOAD
        + """
from collections import Counter
from scipy import ndimage
ref = $(palette)
labels, $n = ndimage.label(($px != $bg).any(axis=2))
found = Counter()
for i in range(1, $n + 1):
    c = $px[labels == i][0]
    found[min(ref, key=lambda k: sum((c - ref[k]) ** 2))] += 1
print(dict(found))
print("count:", found["$(colour)"])"""
    )
    output = yield Cell(thinking, names(code, place=0, palette=palette(rng), colour=colour))
    num = whole(field(output, "count"))
    return Answer(f"Among the names, {colour} comes {num} times.", f"{num}", f"{num}")


def size(rng: Rng) -> Problem:
    """How many pixels, or which share of the picture, a shape covers."""
    things, chosen, side, image = one_of_a_colour(rng, int(rng.integers(1, 5)))
    area = int((np.asarray(draw([chosen], side, (0, 0, 0))) > 0).any(axis=2).sum())
    percent = bool(rng.integers(2))
    name = chosen.name
    question = (
        pick(
            rng,
            f"What percentage of the picture does the {name} cover? One decimal.",
            f"How large is the {name}, in percent of the image's area (one decimal)?",
            f"Estimate the share of the image taken up by the {name}, in percent with one decimal.",
        )
        if percent
        else pick(
            rng,
            f"How many pixels does the {name} cover?",
            f"What is the area of the {name} in pixels?",
            f"Estimate the size of the {name}: how many pixels is it?",
        )
    )
    return Problem(
        family="size",
        question=question,
        images=[image],
        truth=f"{100 * area / side**2:.1f}" if percent else f"{area}",
        is_right=within(0.051 if percent else 0.5),
        programs={"mask": size_mask, "histogram": size_histogram},
        stated={"colour": chosen.colour, "percent": percent},
        difficulty=1 + (len(things) > 1) + percent,
    )


def size_mask(rng: Rng, stated: dict[str, Any]) -> Program:
    """Binarise and count."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names)
    thinking = pick(
        rng,
        f"Binarise: {colour} against everything else. The area is the number of true pixels.",
        f"Only one shape is {colour}, so counting {colour} pixels measures it.",
    )
    shown = "100 * $mask.mean()" if stated["percent"] else "$mask.sum()"
    ending = (
        f'print("area:", round(float({shown}), 1))'
        if stated["percent"]
        else f'print("area:", int({shown}))'
    )
    code = LOAD + colour_mask(rng, colour) + f'\nprint("picture:", $mask.shape)\n{ending}'
    output = yield Cell(thinking, names(code, place=0))
    return sized(field(output, "area"), stated)


def size_histogram(rng: Rng, stated: dict[str, Any]) -> Program:
    """Count colours with PIL, then choose."""
    names, colour = Names(rng), stated["colour"]
    thinking = f"The shapes are plain, so the colour histogram holds the area of the {colour} one."
    code = """
$img = images[0]
ref = $(palette)
near = lambda c: min(ref, key=lambda k: sum((x - y) ** 2 for x, y in zip(c, ref[k])))
w, h = $img.size
back = $img.getpixel((0, 0))
for $n, c in $img.getcolors(w * h):
    if c != back:
        print(f"{near(c)}: {$n} px, {100 * $n / (w * h):.1f} %")"""
    output = yield Cell(thinking, names(code, palette=palette(rng)))
    pixels, share = field(output, colour).split(" px, ")
    return sized(share.removesuffix(" %") if stated["percent"] else pixels, stated)


def sized(value: str, stated: dict[str, Any]) -> Answer:
    """Answer with a size."""
    unit = " %" if stated["percent"] else " pixels"
    return Answer(f"The {stated['colour']} pixels come to {value}{unit}.", f"{value}{unit}", value)


def localisation(rng: Rng) -> Problem:
    """The box around a shape, in fractions of the side."""
    things, chosen, side, image = one_of_a_colour(rng, int(rng.integers(1, 6)))
    question = pick(
        rng,
        f"Draw a box around the {chosen.name}: left, top, right, bottom as fractions of the side.",
        f"Give the bounding box of the {chosen.name} in normalised coordinates (x0, y0, x1, y1).",
        f"Locate the {chosen.name}. Answer with its box, coordinates between 0 and 1.",
    )
    return Problem(
        family="localisation",
        question=question,
        images=[image],
        truth=", ".join(f"{edge / side:.2f}" for edge in chosen.box),
        is_right=within(0.021),
        programs={"where": box_where, "objects": box_objects, "getbbox": box_getbbox},
        stated={"colour": chosen.colour},
        difficulty=1 + (len(things) > 2) + (len(things) > 4),
    )


BOX_ENDING = """
h, w = $mask.shape
print("box:", f"{x0 / w:.2f}, {y0 / h:.2f}, {x1 / w:.2f}, {y1 / h:.2f}")"""


def box_where(rng: Rng, stated: dict[str, Any]) -> Program:
    """Extremes of a mask."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names, chance=0.4)
    code = (
        LOAD
        + colour_mask(rng, colour)
        + """
ys, xs = np.where($mask)
x0, y0, x1, y1 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
print("pixels:", x0, y0, x1, y1)"""
        + BOX_ENDING
    )
    thinking = f"The {colour} pixels' smallest and largest row and column are the box."
    output = yield Cell(thinking, names(code, place=0))
    return boxed(rng, field(output, "box"))


def box_objects(rng: Rng, stated: dict[str, Any]) -> Program:
    """Scipy's find_objects."""
    names, colour = Names(rng), stated["colour"]
    code = (
        LOAD
        + "from scipy import ndimage\n"
        + colour_mask(rng, colour)
        + """
labels, $n = ndimage.label($mask)
sizes = np.bincount(labels.ravel())[1:]
print("regions:", sizes.tolist())
rows, cols = ndimage.find_objects(labels)[sizes.argmax()]
x0, y0, x1, y1 = cols.start, rows.start, cols.stop, rows.stop"""
        + BOX_ENDING
    )
    thinking = f"Label the {colour} region and take its slices as the box."
    output = yield Cell(thinking, names(code, place=0))
    return boxed(rng, field(output, "box"))


def box_getbbox(rng: Rng, stated: dict[str, Any]) -> Program:
    """Pillow's getbbox of a mask."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names, chance=0.4)
    code = (
        LOAD
        + "from PIL import Image\n"
        + colour_mask(rng, colour)
        + """
x0, y0, x1, y1 = Image.fromarray(($mask * 255).astype("uint8")).getbbox()
print("pixels:", x0, y0, x1, y1)"""
        + BOX_ENDING
    )
    thinking = f"A black and white picture of the {colour} pixels has the box that I want."
    output = yield Cell(thinking, names(code, place=0))
    return boxed(rng, field(output, "box"))


def boxed(rng: Rng, value: str) -> Answer:
    """Answer with a box."""
    return Answer(pick(rng, f"The box is {value}.", "These are the edges."), f"({value})", value)


def pointing(rng: Rng) -> Problem:
    """The centre of a shape."""
    things, chosen, side, image = one_of_a_colour(rng, int(rng.integers(1, 6)))
    question = pick(
        rng,
        f"Point to the {chosen.name} (x, y as fractions of the side).",
        f"Where is the centre of the {chosen.name}? Give x and y between 0 and 1.",
        f"Mark the middle of the {chosen.name} with a point in normalised coordinates.",
    )
    return Problem(
        family="pointing",
        question=question,
        images=[image],
        truth=f"{chosen.x / side:.2f}, {chosen.y / side:.2f}",
        is_right=within(0.021),
        programs={"mean": point_mean, "moments": point_moments},
        stated={"colour": chosen.colour},
        difficulty=1 + (len(things) > 2) + (len(things) > 4),
    )


def point_mean(rng: Rng, stated: dict[str, Any]) -> Program:
    """Mean of coordinates."""
    names, colour = Names(rng), stated["colour"]
    yield from look(rng, names, chance=0.4)
    code = (
        LOAD
        + colour_mask(rng, colour)
        + """
ys, xs = np.nonzero($mask)
print("pixels:", len(xs), "mean:", xs.mean().round(1), ys.mean().round(1))
h, w = $mask.shape
print("point:", f"{(xs.mean() + 0.5) / w:.2f}, {(ys.mean() + 0.5) / h:.2f}")"""
    )
    output = yield Cell(
        f"The centre is the mean position of the {colour} pixels.", names(code, place=0)
    )
    return pointed(field(output, "point"))


def point_moments(rng: Rng, stated: dict[str, Any]) -> Program:
    """Scipy's centre of mass."""
    names, colour = Names(rng), stated["colour"]
    code = (
        LOAD
        + "from scipy import ndimage\n"
        + colour_mask(rng, colour)
        + """
y, x = ndimage.center_of_mass($mask)
print("center of mass:", round(x, 2), round(y, 2), "of", $mask.sum(), "pixels")
print("point:", f"{(x + 0.5) / $mask.shape[1]:.2f}, {(y + 0.5) / $mask.shape[0]:.2f}")"""
    )
    output = yield Cell(
        f"scipy's centre of mass of the {colour} mask will do.", names(code, place=0)
    )
    return pointed(field(output, "point"))


def pointed(value: str) -> Answer:
    """Answer with a point."""
    return Answer(f"So the centre is at {value}.", f"({value})", value)


def majority(rng: Rng) -> Problem:
    """The colour that most shapes have."""
    while True:
        things, _, image = scene(rng, int(rng.integers(3, 9)))
        colours = [thing.colour for thing in things]
        counts = sorted(((colours.count(c), c) for c in set(colours)), reverse=True)
        if len(counts) > 1 and counts[0][0] > counts[1][0]:
            break
    question = pick(
        rng,
        "Which colour do most shapes have?",
        "Which colour occurs on the largest number of shapes?",
        "What is the most frequent colour among the shapes?",
    )
    return Problem(
        family="majority",
        question=question,
        images=[image],
        truth=counts[0][1],
        is_right=same,
        programs={"names": majority_names, "masks": majority_masks},
        stated={},
        difficulty=1 + (len(things) > 4) + (len(things) > 6),
    )


def majority_names(rng: Rng, stated: dict[str, Any]) -> Program:
    """Name every shape's colour."""
    names = Names(rng)
    yield from look(rng, names, chance=0.4)
    code = (
        LOAD
        + """
from collections import Counter
from scipy import ndimage
ref = $(palette)
labels, $n = ndimage.label(($px != $bg).any(axis=2))
votes = Counter()
for i in range(1, $n + 1):
    c = np.median($px[labels == i], axis=0)
    votes[min(ref, key=lambda k: abs(c - ref[k]).sum())] += 1
print(votes)
print("most:", votes.most_common(1)[0][0])"""
    )
    output = yield Cell(
        "Each shape votes for its colour.", names(code, place=0, palette=palette(rng))
    )
    return chosen_colour(field(output, "most"))


def majority_masks(rng: Rng, stated: dict[str, Any]) -> Program:
    """Label each colour's mask."""
    names = Names(rng)
    code = (
        LOAD
        + """
from scipy import ndimage
ref = $(palette)
best = {}
for name, c in ref.items():
    best[name] = ndimage.label(np.linalg.norm($px - c, axis=2) < 40)[1]
print({k: v for k, v in best.items() if v})
print("most:", max(best, key=best.get))"""
    )
    thinking = "For every colour name I count the connected regions of that colour."
    output = yield Cell(thinking, names(code, place=0, palette=palette(rng)))
    return chosen_colour(field(output, "most"))


def chosen_colour(value: str) -> Answer:
    """Answer with a colour."""
    return Answer(f"Most shapes are {value}.", value, value)


EDGES = {"leftmost": ("x", 0), "rightmost": ("x", -1), "topmost": ("y", 0), "lowest": ("y", -1)}


def extreme(rng: Rng) -> Problem:
    """The colour of the shape furthest to one side."""
    side_word = str(pick(rng, *EDGES))
    axis, end = EDGES[side_word]
    while True:
        things, side, image = scene(rng, int(rng.integers(2, 7)))
        ordered = sorted(things, key=lambda thing: getattr(thing, axis))
        gap = abs(getattr(ordered[end], axis) - getattr(ordered[-2 if end else 1], axis))
        if gap > 0.05 * side:
            break
    question = pick(
        rng,
        f"What colour is the {side_word} shape?",
        f"Name the colour of the {side_word} object (by its centre).",
        f"The {side_word} figure: which colour does it have?",
    )
    return Problem(
        family="extreme",
        question=question,
        images=[image],
        truth=ordered[end].colour,
        is_right=same,
        programs={"centres": extreme_centres},
        stated={"axis": axis, "end": end, "word": side_word},
        difficulty=1 + (len(things) > 3) + (len(things) > 5),
    )


def extreme_centres(rng: Rng, stated: dict[str, Any]) -> Program:
    """Sort centres along an axis."""
    names, word = Names(rng), stated["word"]
    yield from look(rng, names, chance=0.5)
    axis, chosen = (1 if stated["axis"] == "x" else 0), ("min" if stated["end"] == 0 else "max")
    code = (
        LOAD
        + """
from scipy import ndimage
labels, $n = ndimage.label(($px != $bg).any(axis=2))
centers = ndimage.center_of_mass(labels > 0, labels, range(1, $n + 1))
print("centers:", [(round(x), round(y)) for y, x in centers])
i = $(chosen)(range($n), key=lambda j: centers[j][$(axis)])
c = $px[labels == i + 1][0]
print("rgb:", *c)"""
    )
    thinking = f"I take the centre of every shape; the {word} one has the {chosen}imum coordinate."
    output = yield Cell(thinking, names(code, place=0, axis=axis, chosen=chosen))
    rgb = [whole(part) for part in field(output, "rgb").split()]
    colour = min(COLOURS, key=lambda name: math.dist(COLOURS[name], rgb))
    thinking = f"RGB {tuple(rgb)} is {colour}."
    return Answer(thinking, pick(rng, colour, f"The {word} shape is {colour}."), colour)


def distance(rng: Rng) -> Problem:
    """How far two shapes' centres are apart."""
    while True:
        things, _, image = scene(rng, int(rng.integers(2, 6)))
        if things[0].colour != things[1].colour and all(
            thing.colour not in (things[0].colour, things[1].colour) for thing in things[2:]
        ):
            break
    one, other = things[:2]
    pixels = math.dist((one.x, one.y), (other.x, other.y))
    question = pick(
        rng,
        f"How far apart are the centres of the {one.name} and the {other.name}, in pixels?",
        f"What is the distance in pixels from the {one.name} to the {other.name}, centre to centre?",  # noqa: E501
        f"Measure the distance between the {one.name}'s and the {other.name}'s centres (pixels).",
    )
    return Problem(
        family="distance",
        question=question,
        images=[image],
        truth=f"{pixels:.1f}",
        is_right=within(2.0),
        programs={"means": distance_means},
        stated={"one": one.colour, "other": other.colour},
        difficulty=2 + (len(things) > 3),
    )


def distance_means(rng: Rng, stated: dict[str, Any]) -> Program:
    """Two centres of mass, in two cells."""
    names, centres = Names(rng), []
    for colour in (stated["one"], stated["other"]):
        code = (LOAD if not centres else "") + colour_mask(rng, colour)
        code += "\nys, xs = np.nonzero($mask)\n"
        code += 'print("center:", round(float(xs.mean()), 1), round(float(ys.mean()), 1))'
        thinking = f"{'First' if not centres else 'Now'} the centre of the {colour} shape."
        output = yield Cell(thinking, names(code, place=0))
        centres.append([float(part) for part in field(output, "center").split()])
    (x0, y0), (x1, y1) = centres
    code = f"import math\nprint(round(math.hypot({x0} - {x1}, {y0} - {y1}), 1))"
    output = yield Cell("The distance follows from Pythagoras.", code)
    value = last_line(output)
    return Answer(
        f"So they are {value} px apart.", pick(rng, f"{value} pixels", f"About {value} px."), value
    )
