"""How many shapes there are: all, or those of one colour."""

from typing import Any

from data_modules.zero_vision.cells import LOAD, colour_mask, look, palette, whole
from data_modules.zero_vision.families.scene import scene
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
)

COUNT_WORDS = (
    "How many shapes are there in the picture?",
    "Count the shapes in the image.",
    "How many separate objects does the picture show?",
    "What is the number of shapes in the image?",
    "Tell me how many figures are drawn here.",
)


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
