"""bf16 by autocast on every layout: the losses of float32, but for bf16's three digits."""

from functools import cache
from typing import Any

import pytest
import torch
from parallel_run import Outcome, train
from ranks import Ranks


@cache
def in_float32() -> Outcome:
    return train(None, dtype=torch.float32, muon=True)


def assert_near_float32(ours: Outcome, *, digits: float) -> None:
    """Compare losses: the first to its rounding, later ones as the weights drift apart."""
    pairs = zip(ours.metrics, in_float32().metrics, strict=True)
    errors = [abs(loss - expected) / expected for (loss, _), (expected, _) in pairs]
    assert max(errors) < digits
    assert max(errors) > 0.0, "nothing was computed in bf16"


def test_one_process_trains_in_mixed_precision():
    assert_near_float32(
        train(None, dtype=torch.float32, muon=True, precision="bf16-mixed"), digits=1e-2
    )


@pytest.mark.parametrize(
    "layout", [{"ep_size": 2}, {"pp_size": 2}, {"zero_stage": 2, "encoder": "inline"}], ids=str
)
def test_two_ranks_train_in_mixed_precision(two_ranks: Ranks, layout: dict[str, Any]):
    """Catches: a tensor of one dtype written into another's, or experts added in bf16."""
    settings = {"dtype": torch.float32, "muon": True, "precision": "bf16-mixed"}
    for ours in two_ranks(train, layout, num_ranks=2, **settings):
        assert_near_float32(ours, digits=1e-2)
