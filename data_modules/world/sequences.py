"""Puzzles about order: a row of shapes follows a rule, and its last place is empty."""

from collections.abc import Sequence

from numpy.random import Generator

from data_modules.world.question import Item, Question
from data_modules.world.scenes import picture
from data_modules.world.things import Pair, Thing

NUM_PLACES = 5
RULES = ((0, 1), (0, 0, 1), (0, 1, 1))
"""Periods, of which a row shows as much as there is room for."""


def sequences(rng: Generator, pairs: Sequence[Pair], side: int) -> Item:
    """Four shapes in a row that alternate between two kinds: which comes next."""
    rule = RULES[rng.integers(len(RULES))]
    start = int(rng.integers(len(rule)))
    one, other = (pairs[place] for place in rng.permutation(len(pairs))[:2])
    if one[1] == other[1]:  # the shape is asked for, so it must tell
        return sequences(rng, pairs, side)
    room = side / NUM_PLACES
    kinds = [(one, other)[rule[(start + place) % len(rule)]] for place in range(NUM_PLACES)]
    if not is_told(rule, start):
        return sequences(rng, pairs, side)
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


def is_told(rule: Sequence[int], start: int) -> bool:
    """Whether no other rule shows the same four and goes on unlike it."""
    row = [rule[(start + place) % len(rule)] for place in range(NUM_PLACES)]
    for other in RULES:
        for begin in range(len(other)):
            for flip in (0, 1):
                told = [other[(begin + p) % len(other)] ^ flip for p in range(NUM_PLACES)]
                if told[:-1] == row[:-1] and told[-1] != row[-1]:
                    return False
    return True
