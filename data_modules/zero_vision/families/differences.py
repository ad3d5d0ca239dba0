"""Where two pictures differ, and how one was turned.

Spotting differences is the report's own example (arXiv:2602.02276, App. F).
"""

from typing import Any

from data_modules.world.scenes import background_of
from data_modules.world.things import Thing, draw
from data_modules.zero_vision.cells import look, whole
from data_modules.zero_vision.families.scene import scene
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

PAIR = """
import numpy as np
a, b = (np.array(i).astype(int) for i in images[:2])
"""


def changed(rng: Rng, num_things: int, num_changes: int) -> tuple[list[Thing], list[Any], int]:
    """Draw a scene twice, some things missing in one of the pictures; return those things too."""
    things, side, _ = scene(rng, num_things)
    gone, background = things[:num_changes], background_of(rng)
    pictures = [draw(things, side, background), draw(things[num_changes:], side, background)]
    return gone, pictures if rng.random() < 0.5 else pictures[::-1], side


def differences(rng: Rng) -> Problem:
    """How many places differ between two pictures."""
    num = int(rng.integers(0, 5))
    num_things = num + int(rng.integers(2, 5))
    _, pictures, _ = changed(rng, num_things, num)
    question = pick(
        rng,
        "Compare the two pictures: in how many places do they differ?",
        "Spot the differences. How many are there between image_0 and image_1?",
        "How many shapes are in one of the two pictures but not in the other?",
    )
    return Problem(
        family="differences",
        question=question,
        images=pictures,
        truth=f"{num}",
        is_right=same,
        programs={"label": differences_label, "graph": differences_graph},
        stated={},
        difficulty=1 + (num > 1) + (num_things > 5),
    )


def differences_label(rng: Rng, stated: dict[str, Any]) -> Program:
    """Pixel difference, threshold, label."""
    names = Names(rng)
    yield from look(rng, names, chance=0.3)
    code = (
        PAIR
        + """
from scipy import ndimage
$mask = abs(a - b).sum(axis=2) > $(threshold)
labels, $n = ndimage.label($mask)
print("changed pixels:", np.bincount(labels.ravel())[1:].tolist())
print("places:", $n)"""
    )
    thinking = "Subtract the pictures, threshold, and count connected regions of change."
    output = yield Cell(thinking, names(code, threshold=int(rng.integers(5, 40))))
    return places(rng, field(output, "places"))


def differences_graph(rng: Rng, stated: dict[str, Any]) -> Program:
    """ImageChops and a graph."""
    names = Names(rng)
    code = """
import networkx as nx
import numpy as np
from PIL import ImageChops
$img = ImageChops.difference(images[0], images[1]).convert("L")
print("range:", $img.getextrema(), "box:", $img.getbbox())
$mask = np.array($img) > 0
g = nx.grid_2d_graph(*$mask.shape).subgraph(map(tuple, np.argwhere($mask).tolist()))
print("places:", nx.number_connected_components(g))"""
    thinking = "ImageChops.difference shows what changed; its connected parts are the places."
    output = yield Cell(thinking, names(code))
    return places(rng, field(output, "places"))


def places(rng: Rng, value: str) -> Answer:
    """Answer with a number of places."""
    num = whole(value)
    return Answer(
        f"{num} separate places differ.",
        pick(rng, f"{num}", f"They differ in {num} places." if num != 1 else "1"),
        f"{num}",
    )


def difference_box(rng: Rng) -> Problem:
    """The box around the one thing that differs."""
    num_things = int(rng.integers(2, 7))
    (thing,), pictures, side = changed(rng, num_things, 1)
    question = pick(
        rng,
        "One shape is in only one of the two pictures. Give its box (x0, y0, x1, y1) in [0, 1].",
        "Where do image_0 and image_1 differ? Answer with a normalised bounding box.",
        "Box the difference between the two pictures, coordinates as fractions of the side.",
    )
    return Problem(
        family="difference_box",
        question=question,
        images=pictures,
        truth=", ".join(f"{edge / side:.2f}" for edge in thing.box),
        is_right=within(0.021),
        programs={"where": difference_where, "getbbox": difference_getbbox},
        stated={},
        difficulty=1 + (num_things > 3) + (num_things > 5),
    )


def difference_where(rng: Rng, stated: dict[str, Any]) -> Program:
    """Extremes of the difference."""
    names = Names(rng)
    code = (
        PAIR
        + """
ys, xs = np.nonzero((a != b).any(axis=2))
h, w = a.shape[:2]
print("changed:", len(xs), "of", h * w)
x0, y0, x1, y1 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
print("box:", f"{x0 / w:.2f}, {y0 / h:.2f}, {x1 / w:.2f}, {y1 / h:.2f}")"""
    )
    output = yield Cell("The changed pixels' extremes are the box.", names(code))
    value = field(output, "box")
    return Answer("Normalised already.", f"({value})", value)


def difference_getbbox(rng: Rng, stated: dict[str, Any]) -> Program:
    """Pillow's box, normalised in a second cell."""
    names = Names(rng)
    code = "from PIL import ImageChops\n$img = ImageChops.difference(*images)\n$img.getbbox(), $img.size"  # noqa: E501
    output = last_line((yield Cell("Pillow can give the box of the difference.", names(code))))
    code = f"box, (w, h) = {output}\nprint(', '.join(f'{{v / s:.2f}}' for v, s in zip(box, (w, h, w, h))))"  # noqa: E501
    value = last_line((yield Cell("Divide by the picture's size.", code)))
    return Answer(f"The box is {value}.", f"({value})", value)


def turned(rng: Rng) -> Problem:
    """How far the second picture is turned against the first."""
    _, _, image = scene(rng, int(rng.integers(2, 6)))
    angle = int(pick(rng, 0, 90, 180, 270))
    other = image.rotate(-angle)
    question = pick(
        rng,
        "By how many degrees clockwise is image_1 turned against image_0 (0, 90, 180 or 270)?",
        "image_1 is image_0 turned clockwise. By 0, 90, 180 or 270 degrees?",
        "Which clockwise rotation takes the first picture to the second: 0, 90, 180 or 270?",
    )
    return Problem(
        family="turned",
        question=question,
        images=[image, other],
        truth=f"{angle}",
        is_right=same,
        programs={"rot90": turned_rot90, "rotate": turned_rotate},
        stated={},
        difficulty=1,
    )


def turned_rot90(rng: Rng, stated: dict[str, Any]) -> Program:
    """Numpy's quarter turns."""
    names = Names(rng)
    code = (
        PAIR
        + """
for k in range(4):
    $n = int((np.rot90(a, -k) != b).any(axis=2).sum())
    print(90 * k, "degrees:", $n, "pixels differ")
print("angle:", 90 * min(range(4), key=lambda k: (np.rot90(a, -k) != b).sum()))"""
    )
    output = yield Cell("Try all four turns and compare pixel by pixel.", names(code))
    value = field(output, "angle")
    return Answer(f"Only {value} degrees fits.", pick(rng, value, f"{value} degrees"), value)


def turned_rotate(rng: Rng, stated: dict[str, Any]) -> Program:
    """Pillow's rotation, counter-clockwise."""
    names = Names(rng)
    code = """
from PIL import ImageChops
for angle in (0, 90, 180, 270):
    box = ImageChops.difference(images[0].rotate(-angle), images[1]).getbbox()
    print(angle, box)
    if box is None:
        print("angle:", angle)
        break"""
    thinking = (
        "Pillow rotates counter-clockwise, so I pass negative angles and look for no difference."
    )
    output = yield Cell(thinking, names(code))
    value = field(output, "angle")
    return Answer(f"At {value} degrees nothing differs.", value, value)
