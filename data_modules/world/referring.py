"""Pictures in which one thing, or every thing of a kind, is to be shown: points and boxes."""

from collections.abc import Callable, Sequence

from numpy.random import Generator

from data_modules.world.question import Item, Question, in_words
from data_modules.world.scenes import picture, point, unlike
from data_modules.world.things import Pair, Thing, draw_pairs, place

NUM_THINGS = (3, 6)
"""Where several may be asked for: least, and one more than most."""


def pointing(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """One to three shapes: the centre of one of them."""
    things = unlike(rng, pairs, int(rng.integers(1, 4)), side)
    return picture(rng, things, side, [point(things[0], side)])


def every_point(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """Three to five shapes: the centres of all of one colour or shape."""
    return every(rng, pairs, side, "Point to every {}.", "pointing", centre)


def every_box(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """Three to five shapes: the boxes around all of one colour or shape."""
    return every(rng, pairs, side, "Draw a box around every {}.", "grounding", edges)


def every(
    rng: Generator,
    pairs: Sequence[Pair],
    side: int,
    text: str,
    environment: str,
    place_of: Callable[[Thing, int], list[float]],
) -> Item:
    """Ask for all things of a kind, from left to right."""
    things = place(rng, draw_pairs(rng, pairs, int(rng.integers(*NUM_THINGS))), side)
    about = things[rng.integers(len(things))]
    by_colour = rng.random() < 0.5
    meant = [
        thing
        for thing in sorted(things, key=lambda thing: thing.x)
        if (thing.colour == about.colour if by_colour else thing.shape == about.shape)
    ]
    truth = [place_of(thing, side) for thing in meant]
    question = Question(
        text=text.format(f"{about.colour} shape" if by_colour else about.shape),
        answer=" ".join(in_words(one) for one in truth),
        truth=truth,
        environment=environment,
    )
    return picture(rng, things, side, [question])


def centre(thing: Thing, side: int) -> list[float]:
    """Return a thing's centre in [0, 1]."""
    return [thing.x / side, thing.y / side]


def edges(thing: Thing, side: int) -> list[float]:
    """Return a thing's box in [0, 1]."""
    return [edge / side for edge in thing.box]
