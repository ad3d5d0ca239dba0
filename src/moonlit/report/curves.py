"""A run's curves, read from its TensorBoard files."""

import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

MAX_POINTS = 500
"""A curve is thinned to about so many points."""
Curve = list[tuple[int, float]]
"""Step and value; a point that is not finite is left out."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Return a run's scalars by name; a resumed run's files are read as one."""
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(run.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        accumulator = EventAccumulator(str(file), size_guidance={SCALARS: 0})
        accumulator.Reload()
        for name in accumulator.Tags()[SCALARS]:
            points = curves.setdefault(name, {})
            points |= {event.step: event.value for event in accumulator.Scalars(name)}
    return {
        name: thinned(sorted(points.items()))
        for name, points in curves.items()
        if name not in ("epoch", "hp_metric")
    }


def thinned(points: Curve) -> Curve:
    """Keep every n-th finite point, and the last."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    every = -(-len(finite) // MAX_POINTS) or 1
    kept = finite[::every]
    return kept if not finite or kept[-1] == finite[-1] else [*kept, finite[-1]]
