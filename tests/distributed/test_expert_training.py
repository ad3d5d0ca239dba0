"""Training with experts on several ranks, by MuonClip, against one process."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from micro_run import micro_model
from parallel_run import Outcome, exact_model, train
from ranks import Ranks

from moonlit.models.kimi import Kimi
from moonlit.optim.muon_clip import MuonClip

MUON_CLIP = partial(MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=1e-3)  # clips each step


def with_muon_clip(*, recompute: bool = False) -> dict[str, Any]:
    return {
        "build_model": partial(exact_and_recomputed if recompute else exact_model, torch.float64),
        "build_optimizer": MUON_CLIP,
    }


def exact_and_recomputed(dtype: torch.dtype) -> Kimi:
    model = exact_model(dtype)
    for layer in model.language_model.model.layers:
        layer.recompute = True
    return model


@cache
def alone() -> Outcome:
    return train(None, phase=with_muon_clip())


def assert_equals_one_process(outcomes: list[Outcome]) -> None:
    for ours in outcomes:
        assert set(ours.gradients) == set(alone().gradients)
        for name, expected in alone().gradients.items():
            error = (ours.gradients[name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-6, f"gradient of {name}: {error:.1e}"  # router and norms are fp32
        for name, expected in alone().weights.items():
            torch.testing.assert_close(
                ours.weights[name], expected, rtol=1e-5, atol=1e-5, msg=f"weight {name}"
            )


@pytest.mark.parametrize("recompute", [False, True])
def test_two_ranks_of_experts_train_as_one_process_does(two_ranks: Ranks, recompute: bool):
    """Catches: loads that are not summed over ranks, gradients of the wrong size."""
    phase = with_muon_clip(recompute=recompute)
    assert_equals_one_process(two_ranks(train, {"ep_size": 2}, phase=phase, num_ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
@pytest.mark.parametrize(
    "layout",
    [
        {"ep_size": 4},
        {"ep_size": 2, "dp_shard_size": 2},
        {"ep_size": 2, "dp_replicate_size": 2},
        {"ep_size": 2, "dp_shard_size": 2, "zero_stage": 1},
    ],
    ids=str,
)
def test_four_ranks_of_experts_train_as_one_process_does(
    four_ranks: Ranks, layout: dict[str, int], encoder: str
):
    outcomes = four_ranks(train, layout | {"encoder": encoder}, phase=with_muon_clip(), num_ranks=4)
    assert_equals_one_process(outcomes)


def test_a_micro_model_has_an_expert_for_each_of_four_ranks():
    assert micro_model().decoder_shape.num_experts == 4
