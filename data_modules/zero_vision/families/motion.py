"""Several frames: which way things move, when they appear."""

from typing import Any

from PIL import Image

from data_modules.world.clips import DIRECTIONS, motion
from data_modules.world.scenes import background_of
from data_modules.world.things import SEEN_PAIRS, draw
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


def moving(rng: Rng) -> Problem:
    """Which way a shape moves in a clip of four frames."""
    item = motion(rng, SEEN_PAIRS, int(pick(rng, 84, 112, 140)))
    question = pick(
        rng,
        "The pictures are the frames of a clip. Which way does the shape move: left, right, up or down?",  # noqa: E501
        "Four frames, one moving shape. Left, right, up or down?",
        "In which direction does the object travel over the frames (left, right, up, down)?",
    )
    return Problem(
        family="moving",
        question=question,
        images=list(item.frames),
        truth=str(item.questions[0].truth),
        is_right=same,
        programs={"means": moving_means, "mass": moving_mass},
        stated={},
        difficulty=1,
    )


def moving_means(rng: Rng, stated: dict[str, Any]) -> Program:
    """Mean positions, frame by frame."""
    names = Names(rng)
    code = """
import numpy as np
for i, f in enumerate(images):
    $px = np.array(f).astype(int)
    ys, xs = np.nonzero(($px != $px[0, 0]).any(axis=2))
    print("frame", i, "x", round(xs.mean(), 1), "y", round(ys.mean(), 1))"""
    output = yield Cell("I follow the centre of the foreground over the frames.", names(code))
    lines = [line.split() for line in output.strip().splitlines()]
    return moved(float(lines[-1][3]) - float(lines[0][3]), float(lines[-1][5]) - float(lines[0][5]))


def moving_mass(rng: Rng, stated: dict[str, Any]) -> Program:
    """First and last frame's centre of mass."""
    names = Names(rng)
    code = """
import numpy as np
from scipy import ndimage
def center(f):
    $px = np.array(f).astype(int)
    return np.array(ndimage.center_of_mass(($px != $px[0, 0]).any(axis=2)))
dy, dx = center(images[-1]) - center(images[0])
print("dx:", round(dx, 1))
print("dy:", round(dy, 1))"""
    thinking = "Comparing the first and the last frame's centre of mass is enough."
    output = yield Cell(thinking, names(code))
    return moved(float(field(output, "dx")), float(field(output, "dy")))


def moved(dx: float, dy: float) -> Answer:
    """Answer with the direction of a displacement; y runs down."""
    way = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)
    thinking = f"dx = {dx:.1f}, dy = {dy:.1f} with y running down: it moves {way}."
    return Answer(thinking, way, way)


def appearing(rng: Rng) -> Problem:
    """In which frame a shape comes in."""
    things, side, _ = scene(rng, int(rng.integers(2, 6)))
    background, num_frames = background_of(rng), int(rng.integers(4, 8))
    begin = int(rng.integers(1, num_frames))
    before, after = draw(things[1:], side, background), draw(things, side, background)
    frames: list[Image.Image] = [before] * begin + [after] * (num_frames - begin)
    question = pick(
        rng,
        f"A clip of {num_frames} frames. In which frame, counted from 0, does a new shape appear?",
        f"{num_frames} frames, numbered from 0: which is the first that shows the additional shape?",  # noqa: E501
        "At which frame (the first is 0) does something new come into the picture?",
    )
    return Problem(
        family="appearing",
        question=question,
        images=frames,
        truth=f"{begin}",
        is_right=same,
        programs={"counts": appearing_counts, "changes": appearing_changes},
        stated={},
        difficulty=1 + (num_frames > 5) + (len(things) > 3),
    )


def appearing_counts(rng: Rng, stated: dict[str, Any]) -> Program:
    """Count shapes in each frame."""
    names = Names(rng)
    code = """
import numpy as np
from scipy import ndimage
counts = []
for f in images:
    $px = np.array(f)
    counts.append(int(ndimage.label(($px != $px[0, 0]).any(axis=2))[1]))
print(counts)
print("frame:", next(i for i in range(1, len(counts)) if counts[i] > counts[i - 1]))"""
    output = yield Cell("The number of shapes in each frame tells when one comes in.", names(code))
    value = field(output, "frame")
    return Answer(f"The count rises at frame {value}.", value, value)


def appearing_changes(rng: Rng, stated: dict[str, Any]) -> Program:
    """Differences of consecutive frames."""
    names = Names(rng)
    code = """
from PIL import ImageChops
boxes = [ImageChops.difference(a, b).getbbox() for a, b in zip(images, images[1:])]
print(boxes)
print("frame:", 1 + next(i for i, box in enumerate(boxes) if box))"""
    output = yield Cell("Consecutive frames differ only where the new shape comes in.", names(code))
    value = field(output, "frame")
    return Answer(f"Frame {value} differs from the one before.", f"Frame {value}.", value)
