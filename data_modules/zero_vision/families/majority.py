"""Which colour most shapes have."""

from typing import Any

from data_modules.zero_vision.cells import LOAD, look, palette
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
