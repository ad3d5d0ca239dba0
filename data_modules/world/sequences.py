"""Puzzles about order: a row of shapes follows a rule, and its last place is empty."""

from collections.abc import Sequence

from numpy.random import Generator

from data_modules.world.question import Item, Question
from data_modules.world.scenes import picture
from data_modules.world.things import Pair, Thing

NUM_PLACES = 5
RULES = ((0, 1), (0, 0, 1), (0, 1, 1))
"""Periods. Four things in a row tell which it is, and where it began (a test)."""


def sequences(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """Four shapes in a row that alternate between two kinds: which comes next."""
    rule = RULES[rng.integers(len(RULES))]
    start = int(rng.integers(len(rule)))
    one, other = (pairs[place] for place in rng.permutation(len(pairs))[:2])
    if one[1] == other[1]:  # the shape is asked for, so it must tell
        return sequences(rng, pairs, side)
    room = side / NUM_PLACES
    kinds = [(one, other)[rule[(start + place) % len(rule)]] for place in range(NUM_PLACES)]
    y = side * rng.uniform(0.3, 0.7)
    things = [
        Thing(colour=colour, shape=shape, x=(place + 0.5) * room, y=y, radius=0.42 * room)
        for place, (colour, shape) in enumerate(kinds[:-1])
    ]
    question = Question(
        text="Which shape comes next?", answer=kinds[-1][1], truth=kinds[-1][1],
        environment="puzzle",
    )  # fmt: skip
    return picture(rng, things, side, [question])
