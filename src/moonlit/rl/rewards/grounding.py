"""Grounding: boxes against true boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moonlit.rl.rewards.matching import soft_f1
from moonlit.rl.rewards.parsing import boxes, says_none
from moonlit.rl.rewards.truths import true_boxes


def grounding(answer: str, truth: Any) -> float:
    """Soft F1 over the IoU of boxes, best matching.

    Source: arXiv:2602.02276, Sec. 4.4.2. Its IoU threshold is NOT STATED: none here.

    Args:
        answer: boxes ``(left, top, right, bottom)`` in [0, 1].
        truth: the same, as numbers; none: nothing is there, and the answer is to say ``none``.

    Raises:
        ValueError: if the truth is none that an answer could meet.
    """
    wanted = true_boxes(truth)
    if not wanted:
        return float(says_none(answer))
    predicted = boxes(answer)
    if predicted is None:
        return 0.0
    ious = [[iou(one, other) for other in wanted] for one in predicted]
    return soft_f1(np.array(ious, dtype=float).reshape(len(predicted), len(wanted)))


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = area(one) + area(other) - intersection
    return intersection / union if union > 0 else 0.0


def area(box: Sequence[float]) -> float:
    """Width times height."""
    return (box[2] - box[0]) * (box[3] - box[1])
