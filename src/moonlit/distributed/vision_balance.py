"""Which rank encodes which visual item: a pure function that every rank evaluates alike.

Axes: N items of the global batch.
"""

import heapq
from collections.abc import Sequence

from moonlit.models.shapes import EncoderShape

Grid = tuple[int, int, int]
"""Frames, patch rows and patch columns of one item."""


def encoding_cost(grid: Grid, shape: EncoderShape) -> float:
    r"""Return the work of one item in units of one patch without attention.

    For $P$ patches, $P\,(1 + P / P_0)$: attention inside an item costs $4 P^2 d$ FLOPs a layer, the
    linear maps $P\,(8 d^2 + 4 d f)$, so $P_0 = 2 d + f$ with width d and MLP width f.

    Source: ours; the report states only that the load is balanced by a metric such as the number
    of images or patches (arXiv:2602.02276, Sec. 4.5.1).
    """
    num_patches = grid[0] * grid[1] * grid[2]
    return num_patches * (1 + num_patches / (2 * shape.width + shape.mlp_width))


def assign(costs: Sequence[float], homes: Sequence[int], num_ranks: int) -> list[int]:
    """Give each item to a rank: the longest first, each to the least loaded rank.

    Among equally loaded ranks an item stays at home, which saves its way. The largest load is at
    most 4/3 of the best possible one (Graham, 1969).

    Args:
        costs: of each item.
        homes: rank whose rows hold each item.
        num_ranks: ranks that encode.
    """
    loads = [0.0] * num_ranks
    heap = [(0.0, rank) for rank in range(num_ranks)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        while heap[0][0] != loads[heap[0][1]]:
            heapq.heappop(heap)  # out of date: the rank was loaded through its home item
        lightest, rank = heap[0]
        if loads[homes[item]] == lightest:
            rank = homes[item]
        owners[item] = rank
        loads[rank] += costs[item]
        heapq.heappush(heap, (loads[rank], rank))
    return owners


def chunks(num_patches: Sequence[int], budget: int) -> list[range]:
    """Cut items into runs of at most ``budget`` patches; a larger item stands alone."""
    runs, start, filled = [], 0, 0
    for item, patches in enumerate(num_patches):
        if item > start and filled + patches > budget:
            runs.append(range(start, item))
            start, filled = item, 0
        filled += patches
    if num_patches:
        runs.append(range(start, len(num_patches)))
    return runs
