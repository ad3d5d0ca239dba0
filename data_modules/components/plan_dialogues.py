"""The plan of a run over dialogues: whole documents, dealt out to rows, epoch after epoch.

Nothing is cut and nothing is padded: a row ends where no document in sight fits any more. Each
epoch takes every document once, in an order of its own.
"""

from itertools import islice

import numpy as np

from data_modules.components.fillers import LOOK_AHEAD, Row
from data_modules.components.mixture import Geometry
from data_modules.components.plan import PIECE_DTYPE, Plan
from data_modules.components.shuffle import Order


def plan_dialogues(
    index: np.ndarray,
    chunk_starts: np.ndarray,
    geometry: Geometry,
    *,
    source: str,
    seed: int,
    num_steps: int,
) -> Plan:
    """Plan every row of the run.

    Args:
        index: one ``INDEX_DTYPE`` row a document.
        chunk_starts: first document of each chunk, and the number of documents last.
        geometry: rows hold at most ``row_tokens``.
        source: the documents' source in the corpus.
        seed: of the order.
        num_steps: steps to plan.

    Raises:
        ValueError: if a document is longer than a row, or there are too few for the rows.
    """
    lengths = index["num_tokens"]
    if lengths.max() > geometry.row_tokens:
        raise ValueError(
            f"{source}/{lengths.argmax()} has {lengths.max()} tokens, row_tokens is "
            f"{geometry.row_tokens}: dialogues are never cut"
        )
    if len(lengths) < geometry.rows_per_step:
        raise ValueError(
            f"{len(lengths)} dialogues cannot fill {geometry.rows_per_step} rows of a step"
        )
    order = Order(chunk_starts, seed=seed, name=source)
    pieces: list[tuple[int, int, int, int]] = []
    row_starts = [0]
    for _ in range(num_steps):
        for row in filled_rows(order, lengths.tolist(), geometry):
            pieces += row.pieces
            row_starts.append(len(pieces))
    return Plan(
        sources=[source],
        pieces=np.array(pieces, PIECE_DTYPE),
        row_starts=np.array(row_starts, np.int64),
        step_starts=np.arange(num_steps + 1) * geometry.rows_per_step,
    )


def filled_rows(order: Order, lengths: list[int], geometry: Geometry) -> list[Row]:
    """Take documents in order, each into the emptiest row, until none in sight fits."""
    rows = [Row(space=geometry.row_tokens) for _ in range(geometry.rows_per_step)]
    while True:
        emptiest = max(rows, key=lambda row: row.space)
        in_sight = islice(order.look(LOOK_AHEAD), LOOK_AHEAD)
        fitting = next((n for n in in_sight if lengths[n] <= emptiest.space), None)
        if fitting is None:
            return rows
        order.look(LOOK_AHEAD).remove(fitting)
        emptiest.pieces.append((0, fitting, 0, lengths[fitting]))
        emptiest.space -= lengths[fitting]
