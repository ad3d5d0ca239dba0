"""Reinforcement on two ranks: each rolls its own tasks out, and both train one policy."""

import sys
from pathlib import Path

import torch
from parallel_run import strategy, whole
from ranks import Ranks

sys.path.append(str(Path(__file__).parents[1] / "phases"))


def train_policy(num_ranks: int) -> tuple[list[int], torch.Tensor, list[float]]:
    """Return the tasks this rank saw, the weights, and the gap to the engine at every step."""
    sys.path.append(str(Path(__file__).parents[1] / "phases"))
    from policy_run import make_phase, run

    phase = make_phase()
    logged = run(phase, max_steps=2, strategy=strategy(), devices=num_ranks)
    weights = torch.cat([whole(p).flatten() for p in phase.model.parameters()])
    seen = sorted(phase.environment.judge.seen)  # pyright: ignore
    return seen, weights, [one["rl/log_ratio_abs_mean"] for one in logged]


def test_two_ranks_share_the_tasks_out_and_train_one_policy(two_ranks: Ranks):
    (seen, weights, gaps), (other_seen, other_weights, other_gaps) = two_ranks(train_policy, 2)

    assert seen == list(range(0, 16, 2))
    assert other_seen == list(range(1, 16, 2))
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=0)
    assert max(gaps + other_gaps) < 1e-3
