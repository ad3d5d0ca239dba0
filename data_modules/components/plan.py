"""The plan of a run: which tokens of which document stand in which row of which optimizer step.

The order is planned, not sampled. The plan is a pure function of the index, the seed, the mixture
and the step's geometry; it knows nothing of ranks, workers or files. Every step holds its share of
vision tokens to within half of the smallest document in sight, and what a step misses the next one
makes up: so the whole run misses no more than one step does.

Text documents flow: cut where a row ends, continued in the next row. Documents with media are
never cut. Every row holds exactly ``row_tokens`` tokens.

Source: a constant vision share, and the same order after a resume: technical report
(arXiv:2602.02276), Sec. 2.1 and App. C.1. How it is done there is not stated; this is our way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_modules.components.fillers import Row, TextFlow, VisionPicker
from data_modules.components.mixture import Geometry, Mixture, Stage, check_order, sources_of
from data_modules.components.plan_checks import Index, check_epochs, check_feasible
from data_modules.components.shuffle import Order

PIECE_DTYPE = np.dtype([("source", "<i4"), ("document", "<i4"), ("start", "<i4"), ("stop", "<i4")])
"""Tokens ``start`` to ``stop`` of a document; ``source`` numbers the mixture's sources in order."""

BLOCK = 1 << 16
ChunkStarts = Mapping[str, np.ndarray]
"""For each source the first document of each chunk, and the number of documents last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The rows of a run, one step's behind the other's."""

    sources: list[str]
    pieces: np.ndarray
    """``PIECE_DTYPE``, row after row."""
    row_starts: np.ndarray
    """int64: row k holds pieces ``row_starts[k]`` to ``row_starts[k + 1]``."""
    step_starts: np.ndarray
    """int64: step s holds rows ``step_starts[s]`` to ``step_starts[s + 1]``."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps planned."""
        return len(self.step_starts) - 1

    def num_rows(self, step: int) -> int:
        """Rows of a step."""
        return int(self.step_starts[step + 1] - self.step_starts[step])

    def row(self, step: int, row: int) -> np.ndarray:
        """Pieces of one row."""
        k = self.step_starts[step] + row
        return self.pieces[self.row_starts[k] : self.row_starts[k + 1]]


def plan_run(
    index: Index,
    chunk_starts: ChunkStarts,
    mixture: Mixture,
    geometry: Geometry,
    *,
    seed: int,
    num_steps: int,
) -> Plan:
    """Plan every row of a run whose vision may begin later.

    Raises:
        ValueError: as ``plan_stages``.
    """
    check_length(num_steps)
    stages = mixture.stages(geometry, num_steps)
    return plan_stages(index, chunk_starts, stages, seed=seed, num_steps=num_steps)


def plan_stages(
    index: Index,
    chunk_starts: ChunkStarts,
    stages: Sequence[Stage],
    *,
    seed: int,
    num_steps: int,
    max_epochs: Mapping[str, float] | None = None,
) -> Plan:
    """Plan every row of a run of several stages.

    Sources go on where they were when another stage begins. A source may stand in the text
    mixture, which takes its documents without media, and in the vision mixture, which takes those
    with media.

    Args:
        index: one ``INDEX_DTYPE`` row a document, by source.
        chunk_starts: of each source.
        stages: in order; the first one begins at step 0.
        seed: of the order.
        num_steps: steps to plan.
        max_epochs: how often a source may be read, where that is bounded.

    Raises:
        ValueError: if a source is missing or is used up, or a stage cannot reach its vision share
            in rows of its size; with the numbers.
    """
    check_length(num_steps)
    check_order(stages)
    check_feasible(index, stages)
    check_epochs(index, stages, max_epochs or {}, num_steps)
    text_orders = orders_of(index, chunk_starts, stages, seed=seed, with_media=False)
    vision_orders = orders_of(index, chunk_starts, stages, seed=seed, with_media=True)
    numbers = {name: number for number, name in enumerate(sources_of(stages))}
    text = TextFlow(index, text_orders, numbers)
    vision = VisionPicker(index, vision_orders, numbers)
    blocks: list[np.ndarray] = []
    pieces: list[tuple[int, int, int, int]] = []
    lengths_of_rows, step_starts = [], [0]
    owed = 0.0
    upcoming = list(stages)
    stage = upcoming[0]
    for step in range(num_steps):
        if upcoming and upcoming[0].first_step == step:
            stage = upcoming.pop(0)
            text.mix(stage.text)
            vision.mix(stage.vision)
        geometry = stage.geometry
        rows = [Row(space=geometry.row_tokens) for _ in range(geometry.rows_per_step)]
        if stage.vision_share:
            owed += stage.vision_share * geometry.step_tokens
            owed -= vision.fill(rows, owed, step)
        for row in rows:
            filling = text.fill(row.space)
            pieces += filling
            pieces += row.pieces
            lengths_of_rows.append(len(filling) + len(row.pieces))
        step_starts.append(len(lengths_of_rows))
        if len(pieces) >= BLOCK:  # an array takes a tenth of the memory
            blocks.append(np.array(pieces, PIECE_DTYPE))
            pieces.clear()
    return Plan(
        sources=sources_of(stages),
        pieces=np.concatenate([*blocks, np.array(pieces, PIECE_DTYPE)]),
        row_starts=np.cumsum([0, *lengths_of_rows], dtype=np.int64),
        step_starts=np.array(step_starts, np.int64),
    )


def check_length(num_steps: int) -> None:
    """Refuse a run without a step."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: want 1 or more")


def orders_of(
    index: Index,
    chunk_starts: ChunkStarts,
    stages: Sequence[Stage],
    *,
    seed: int,
    with_media: bool,
) -> dict[str, Order]:
    """Return the orders of the sources of the text or the vision mixtures."""
    names = dict.fromkeys(
        name for stage in stages for name in (stage.vision if with_media else stage.text)
    )
    orders = {}
    for name in names:
        has_media = index[name]["num_vision_tokens"] > 0
        wanted = has_media if with_media else ~has_media
        orders[name] = Order(
            chunk_starts[name], seed=seed, name=name, only=None if wanted.all() else wanted
        )
    return orders
