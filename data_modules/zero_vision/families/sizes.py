"""How large a shape is: its pixels, or its share of the picture."""

from typing import Any

import numpy as np

from data_modules.world.things import draw
from data_modules.zero_vision.cells import LOAD, colour_mask, look, palette
from data_modules.zero_vision.families.scene import one_of_a_colour
from data_modules.zero_vision.problem import (
    Answer,
    Cell,
    Names,
    Problem,
    Program,
    Rng,
    field,
    pick,
    within,
)


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
