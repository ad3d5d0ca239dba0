"""Many processes give what one process with plain autograd gives."""

from functools import cache
from typing import Any

import pytest
import torch
from parallel_run import Outcome, train
from ranks import Ranks


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
    ours = two_ranks(train, {"encoder": encoder}, num_ranks=2)
    assert len(ours[0].gradients) > 40
    for record in ours:
        assert_same(record, alone(), rtol=1e-6)  # float64, but norms and routers are float32
