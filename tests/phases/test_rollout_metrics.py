"""What an RL iteration logs, by hand: each number is what its name says."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from moonlit.batch import Group, Segment, Task, Trajectory
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text
from moonlit.losses.policy_gradient import clipped_ratio_loss, grpo_loss
from moonlit.phases.rollout_metrics import group_metrics, notes_of, token_metrics


def rollout(reward: float, *versions: int, **more: Any) -> Trajectory:
    """One prompt token, then one sampled token for each version."""
    segment = Segment(
        input_ids=[1] * (1 + len(versions)),
        is_sampled=[False] + [True] * len(versions),
        behavior_logprobs=[0.0] * (1 + len(versions)),
        policy_versions=[-1, *versions],
    )
    values = {"segments": [segment], "messages": [], "spans": [], "stop_reason": "answer"}
    return Trajectory(**values | {"reward": reward} | more)


def group(environment: str, *rollouts: Trajectory, picture: bool = False) -> Group:
    parts: list[Any] = [Text("How many?")]
    parts += [ImagePart(Image.new("RGB", (8, 8)))] if picture else []
    task = Task(
        prompt=[Message(role="user", content=parts)],
        domain="perception" if picture else "reasoning",
        environment=environment,
        answer=1,
    )
    return Group(task=task, trajectories=list(rollouts))


def test_means_are_over_the_judged_answers_of_all_ranks():
    lost = Trajectory(segments=[], messages=[], spans=[], stop_reason="error", error="lost")
    cut = rollout(0.0, 7, 7, stop_reason="length", metrics={"num_calls": 3.0})
    first = [group("counting", rollout(1.0, 5, 6, 7, 7), cut, lost, picture=True)]
    second = [group("exact", rollout(0.5, 7, 7, 7, metrics={"num_calls": 1.0}))]

    told = group_metrics(notes_of(groups, version=7) for groups in (first, second))

    assert told == pytest.approx(
        {
            "rl/error_fraction": 1 / 4,
            "rl/teaching_groups": 1 / 2,
            "rl/reward_mean": 1.5 / 3,
            "rl/reward_counting": 0.5,
            "rl/reward_perception": 0.5,
            "rl/reward_picture": 0.5,
            "rl/reward_exact": 0.5,
            "rl/reward_reasoning": 0.5,
            "rl/reward_text": 0.5,
            "rl/share_perception": 2 / 3,
            "rl/share_picture": 2 / 3,
            "rl/share_reasoning": 1 / 3,
            "rl/share_text": 1 / 3,
            "rl/tokens_per_answer": (4 + 2 + 3) / 3,
            "rl/finished_fraction": 2 / 3,
            "rl/staleness": 2 / 3,  # of the oldest token: 2, 0 and 0 versions
            "rl/num_calls": 2.0,
        }
    )


RATIOS = [0.25, 0.5, 1.0, 2.0, 8.0]
SAMPLED = {
    "log_ratio": [torch.tensor(RATIOS[:2]).log(), torch.tensor(RATIOS[2:]).log()],
    "entropy": [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0, 6.0])],
}


def test_ratios_of_policy_to_sampler_by_hand():
    told = {name: float(value) for name, value in token_metrics(SAMPLED, None).items()}

    logs = [math.log(ratio) for ratio in RATIOS]
    assert told["rl/entropy"] == pytest.approx(3.0)
    assert told["rl/log_ratio_abs_mean"] == pytest.approx(sum(map(abs, logs)) / 5)
    assert told["rl/kl_behavior"] == pytest.approx((sum(RATIOS) - 5 - sum(logs)) / 5)
    assert told["rl/ratio_p05"] == pytest.approx(0.25 * 2**0.2)  # a fifth of the way to the next
    assert told["rl/ratio_p50"] == pytest.approx(1.0)
    assert told["rl/ratio_p95"] == pytest.approx(8 / 4**0.2)


@pytest.mark.parametrize(
    "bounds",
    [
        {"low": 0.4, "high": 5.0},
        {"low": math.log(0.4), "high": math.log(5.0), "bounds_on": "log_ratio"},
    ],
)
def test_what_is_masked_is_what_the_objective_masks(bounds: dict[str, Any]):
    """One ratio lies on either side; catches: bounds of the log-ratio that are read as ratios."""
    told = token_metrics(SAMPLED, partial(clipped_ratio_loss, regularisation=0.0, **bounds))
    assert float(told["rl/masked_fraction"]) == pytest.approx(2 / 5)


def test_an_upper_bound_alone_masks_too():
    """Zero is a bound of the log-ratio like any other."""
    objective = partial(clipped_ratio_loss, low=0.0, high=1.0, bounds_on="log_ratio")
    assert float(token_metrics(SAMPLED, objective)["rl/masked_fraction"]) == pytest.approx(3 / 5)
    without = token_metrics(SAMPLED, partial(grpo_loss, clip_low=0.2, clip_high=0.2))
    assert "rl/masked_fraction" not in without


def test_a_kept_sets_loss_is_by_token_whatever_its_rows():
    """Two tokens at 3 nats, six at 1: not the mean of the rows' means."""
    kept = [torch.tensor([6.0, 2.0]), torch.tensor([6.0, 6.0]), torch.tensor([0.0, 0.0])]
    told = token_metrics({"ptx": kept, "log_ratio": [torch.zeros(0)]}, None)
    assert {name: float(value) for name, value in told.items()} == {"rl/ptx_nll_per_token": 1.5}
