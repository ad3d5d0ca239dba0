"""Segmentation: an outline's area against the true one."""

from typing import Any

from shapely import Polygon
from shapely.ops import unary_union
from shapely.validation import make_valid

from moonlit.rl.rewards.parsing import tuples
from moonlit.rl.rewards.truths import true_outlines

MAX_CORNERS = 512


def segmentation(answer: str, truth: Any) -> float:
    """IoU of the filled outlines, exact: areas of polygons, no raster.

    Source: arXiv:2602.02276, Sec. 4.4.2 (polygons as masks, IoU with the true mask). An outline
    that crosses itself covers what it encloses by the even-odd rule (ours), as a mask would; one
    with fewer than three corners covers nothing.

    Args:
        answer: the corners of one outline, ``(x, y) (x, y) ...`` in [0, 1].
        truth: outlines, each a list of corners; together they are the mask.

    Raises:
        ValueError: if the truth is none that an answer could meet.
    """
    outlines = true_outlines(truth)
    corners = tuples(answer, 2)
    if corners is None or not 3 <= len(corners) <= MAX_CORNERS:
        return 0.0
    predicted = make_valid(Polygon(corners))
    wanted = unary_union([make_valid(Polygon(outline)) for outline in outlines])
    return predicted.intersection(wanted).area / predicted.union(wanted).area
