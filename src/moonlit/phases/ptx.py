"""PTX: a next-token loss on a kept SFT set, beside the policy's in every optimizer step.

Source: K2 report (arXiv:2507.20534), Sec. 3.2.3: an auxiliary PTX loss on hand-picked data, so that
RL does not forget it. Set and weight are NOT STATED.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moonlit.batch import PackedBatch


@dataclass(frozen=True, slots=True)
class Scales:
    """What a row's summed loss is multiplied with, before the step divides by all trained tokens.

    So a step's loss is the mean over the policy's tokens plus ``ptx_coef`` times the mean over the
    kept set's, however many there are of either.
    """

    policy: float = 1.0
    ptx: float = 0.0


def is_kept(row: PackedBatch) -> bool:
    """Whether a row is of the kept set: nobody sampled it."""
    return row.behavior_logprobs is None


def scales(
    rows: Sequence[PackedBatch], *, ptx_coef: float, global_sum: Callable[[Tensor], Tensor]
) -> Scales:
    """Count a step's trained tokens of either kind, over all ranks.

    Args:
        rows: of this rank.
        ptx_coef: weight of the kept set's mean.
        global_sum: over ranks.
    """
    counts = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        counts[int(is_kept(row))] += row.loss_mask.sum().cpu()
    num_policy, num_ptx = global_sum(counts).tolist()
    total = num_policy + num_ptx
    return Scales(
        policy=total / num_policy if num_policy else 0.0,
        ptx=ptx_coef * total / num_ptx if num_ptx else 0.0,
    )
