"""A pipeline of stages gives what one process with plain autograd gives."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from lightning import seed_everything
from micro_run import micro_model
from parallel_run import Outcome, train
from ranks import Ranks
from test_dep import assert_same

from moonlit.models.kimi import Kimi


def deep_model(dtype: torch.dtype, num_layers: int = 5) -> Kimi:
    """Layers that cannot be cut evenly, with a balance loss that travels through all stages."""
    micro = micro_model()
    shape = replace(micro.decoder_shape, num_layers=num_layers, aux_loss_alpha=0.01)
    seed_everything(0, verbose=False)
    return Kimi(decoder=shape, vision=micro.vision_shape, experts="reference").to(dtype)


def pipelined(layout: dict[str, Any] | None, **settings: Any) -> Outcome:
    dtype = settings.pop("dtype", torch.float64)
    phase = {"build_model": partial(deep_model, dtype)} | settings.pop("phase", {})
    return train(layout, phase=phase, dtype=dtype, **settings)


@cache
def alone(**settings: Any) -> Outcome:
    return pipelined(None, **settings)


def merged(outcomes: list[Outcome]) -> Outcome:
    """Every rank has the weights of its own stages; what several have must agree."""
    union = Outcome(metrics=outcomes[0].metrics)
    for one in outcomes:
        assert one.metrics == union.metrics
        for ours, theirs in ((one.gradients, union.gradients), (one.weights, union.weights)):
            for name, tensor in ours.items():
                assert torch.equal(theirs.setdefault(name, tensor), tensor), name
    return union


@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_two_stages_train_as_one_process_does(two_ranks: Ranks, stages_per_rank: int, encoder: str):
    layout = {"pp_size": 2, "stages_per_rank": stages_per_rank, "encoder": encoder}
    ours = merged(two_ranks(pipelined, layout, num_ranks=2))
    assert_same(ours, alone(), rtol=1e-6)  # float64, but the routers' scores are float32
