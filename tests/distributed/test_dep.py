"""Many processes give what one process with plain autograd gives."""

from functools import cache
from typing import Any

import pytest
import torch
from parallel_run import Outcome, train
from ranks import Ranks
from torch import nn

from moonlit.distributed.sharding import require_equal


@cache
def alone(dtype: torch.dtype = torch.float64, **phase: Any) -> Outcome:
    return train(None, dtype=dtype, phase=phase)


def assert_same(ours: Outcome, theirs: Outcome, *, rtol: float) -> None:
    assert set(ours.gradients) == set(theirs.gradients)
    for name, expected in theirs.gradients.items():
        # relative to the tensor's largest entry: only the order of sums differs
        error = (ours.gradients[name] - expected).abs().max() / expected.abs().max()
        assert error < rtol, f"gradient of {name}: {error:.1e}"
    torch.testing.assert_close(
        torch.tensor(ours.metrics), torch.tensor(theirs.metrics), rtol=rtol, atol=0
    )
    for name, expected in theirs.weights.items():
        torch.testing.assert_close(
            ours.weights[name], expected, rtol=10 * rtol, atol=10 * rtol, msg=f"weight {name}"
        )


@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
def test_two_ranks_train_as_one_process_does(two_ranks: Ranks, encoder: str):
    """Rank 1 has no media in most steps, one step has none at all, one item outweighs the rest."""
    ours = two_ranks(train, {"encoder": encoder}, num_ranks=2)
    assert len(ours[0].gradients) > 40
    for record in ours:
        assert_same(record, alone(), rtol=1e-6)  # float64, but the routers' scores are float32


def test_muon_clip_trains_over_shards_as_on_one_process(two_ranks: Ranks):
    """A threshold of 0.01 clips every head at every step."""
    ours = two_ranks(train, {}, num_ranks=2, muon=True)[1]
    assert_same(ours, train(None, muon=True), rtol=1e-6)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_every_zero_stage_adds_several_microbatches_up(two_ranks: Ranks, zero_stage: int):
    """Two rows a rank: catches a gradient summed over ranks once too often, or too early."""
    ours = two_ranks(train, {"zero_stage": zero_stage}, num_ranks=2)[0]
    assert_same(ours, alone(), rtol=1e-6)


LAYOUTS = [
    {"recompute": "never", "zero_stage": 1},
    {"recompute": "auto", "zero_stage": 2, "dp_replicate_size": 2, "patch_budget": 10_000},
    {"encoder": "inline", "dp_replicate_size": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_four_ranks_train_as_one_process_does(four_ranks: Ranks, layout: dict[str, Any]):
    for record in four_ranks(train, layout, num_ranks=4):
        assert_same(record, alone(), rtol=1e-6)


PARTS = {
    "frozen encoder": ("language_model",),
    "vit stage": ("vision_tower", "mm_projector"),
    "projector alone": ("mm_projector",),
}


@pytest.mark.parametrize("trains", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
def test_frozen_parts_stay_and_no_rank_waits(two_ranks: Ranks, trains: tuple, encoder: str):
    """Catches: a rank whose text teaches nothing skips the backward pass that others are in."""
    ours = two_ranks(train, {"encoder": encoder}, num_ranks=2, phase={"trains": trains})[1]
    assert {name.split(".")[1] for name in ours.gradients} == set(trains)
    assert_same(ours, alone(trains=trains), rtol=1e-6)


def test_float32_gradients_are_those_of_one_process(two_ranks: Ranks):
    alone32 = alone(torch.float32)
    ours = two_ranks(train, {}, num_ranks=2, dtype=torch.float32, max_steps=1)[0]
    assert set(ours.gradients) == set(alone32.gradients)
    for name, expected in alone32.gradients.items():
        error = (ours.gradients[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_a_text_only_run_leaves_the_encoder_alone(two_ranks: Ranks):
    ours = two_ranks(train, {}, num_ranks=2, text_only=True)[0]
    assert {name.split(".")[1] for name in ours.gradients} == {"language_model"}
    assert_same(ours, train(None, text_only=True), rtol=1e-6)


def unlike_seeds() -> str:
    torch.manual_seed(torch.distributed.get_rank())
    try:
        require_equal(nn.Linear(3, 2))
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_ranks_that_begin_unlike_are_refused(two_ranks: Ranks):
    assert (
        "the ranks built different weights (2 tensors, the first is weight)"
        in (two_ranks(unlike_seeds)[1])
    )
