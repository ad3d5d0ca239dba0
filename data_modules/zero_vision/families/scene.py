"""Scenes of coloured shapes that problems are asked about."""

from typing import Any

from data_modules.world.scenes import background_of
from data_modules.world.things import RADII, SEEN_PAIRS, Thing, draw, draw_pairs, place
from data_modules.zero_vision.problem import (
    Rng,
    pick,
)

SIDES = (84, 112, 140, 168)


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
