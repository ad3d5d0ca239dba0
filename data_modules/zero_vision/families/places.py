"""Where a shape is: its box, its middle, the outermost one, how far two are apart."""

import math
from typing import Any

from data_modules.world.things import COLOURS
from data_modules.zero_vision.cells import LOAD, colour_mask, look, whole
from data_modules.zero_vision.families.scene import one_of_a_colour, scene
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
