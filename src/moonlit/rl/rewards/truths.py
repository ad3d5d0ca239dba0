"""Truths that say where things are: boxes, points, outlines, checked before any answer is read.

A truth that no answer could meet is the source's fault: it must not pass for answers worth nothing.
Coordinates are shares of the picture's width and height in [0, 1], from its top left corner.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from shapely import Polygon
from shapely.validation import make_valid

SLACK = 1e-6
"""A coordinate may leave [0, 1] by as much: a sum of shares is rounded."""


def true_boxes(truth: Any) -> list[tuple[float, ...]]:
    """Return true boxes (left, top, right, bottom); none where nothing is there.

    Raises:
        ValueError: naming what is no box, or one that no answer could meet.
    """
    want = "want a list of boxes [left, top, right, bottom]"
    boxes = [coordinates(one, 4, "box", want) for one in listed(truth, "truth", want)]
    for x1, y1, x2, y2 in boxes:
        if not (x1 < x2 and y1 < y2):
            raise ValueError(f"the true box {[x1, y1, x2, y2]} is empty or turned round")
    return boxes


def true_points(truth: Any) -> list[tuple[float, ...]]:
    """Return true points (x, y); none where nothing is there.

    Raises:
        ValueError: naming what is no point.
    """
    want = "want a list of points [x, y]"
    return [coordinates(one, 2, "point", want) for one in listed(truth, "truth", want)]


def true_outlines(truth: Any) -> list[list[tuple[float, ...]]]:
    """Return true outlines, at least one, each a list of corners (x, y).

    Raises:
        ValueError: naming what is no outline, or one that covers nothing.
    """
    want = "want a list of outlines, each a list of at least three corners [x, y]"
    outlines = [
        [coordinates(one, 2, "corner", want) for one in listed(outline, "outline", want)]
        for outline in listed(truth, "truth", want)
    ]
    if not outlines:
        raise ValueError(f"the truth holds no outline: {want}")
    for outline in outlines:
        if len(outline) < 3:
            raise ValueError(f"the true outline {outline} has {len(outline)} corners: {want}")
        if make_valid(Polygon(outline)).area == 0:
            raise ValueError(f"the true outline {outline} covers nothing")
    return outlines


PLACES: dict[str, Callable[[Any], Any]] = {
    "grounding": true_boxes,
    "pointing": true_points,
    "segmentation": true_outlines,
}
"""By environment."""


def listed(value: Any, what: str, want: str) -> Sequence[Any]:
    """Return what is a list.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"the {what} {value!r} is no list: {want}")
    return value


def coordinates(value: Any, length: int, what: str, want: str) -> tuple[float, ...]:
    """Return so many coordinates.

    Raises:
        ValueError: if there are others, or one is no share of the picture.
    """
    if not (
        isinstance(value, Sequence)
        and len(value) == length
        and all(isinstance(number, Real) for number in value)
    ):
        raise ValueError(f"the truth holds {value!r}, no {what}: {want}")
    if not all(-SLACK <= number <= 1 + SLACK for number in value):  # nan is outside too
        raise ValueError(
            f"the true {what} {list(value)}: want shares of the picture's width and height in "
            "[0, 1], no pixels"
        )
    return tuple(map(float, value))
