"""Policy objectives against gradients made by hand, finite differences and the plain formula."""

import math
from functools import partial

import pytest
import torch

from moonlit.losses.policy_gradient import (
    clipped_ratio_loss,
    group_advantages,
    grpo_loss,
    sequence_loss,
)

CU = torch.tensor([0, 3, 5])
MASK = torch.tensor([False, True, True, True, True])
BEHAVIOR = torch.tensor([-9.0, -1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
RATIOS = torch.tensor([1.0, 0.4, 0.9, 2.0, 7.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([5.0, 0.25, 0.25, -0.5, -0.5], dtype=torch.float64)
K2_5 = partial(clipped_ratio_loss, low=0.5, high=5.0, regularisation=0.03)


def policy() -> torch.Tensor:
    return (BEHAVIOR + RATIOS.log()).requires_grad_()


def gradient(objective) -> torch.Tensor:
    logprobs = policy()
    objective(logprobs, BEHAVIOR, ADVANTAGES, MASK, CU).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def test_the_gradient_is_ratio_times_advantage_inside_and_nothing_outside():
    """Ratios 0.4 and 7 lie outside [0.5, 5], on either side and with either sign of advantage."""
    wanted = torch.tensor([0.0, 0.0, -0.9 * 0.25, 2.0 * 0.5, 0.0], dtype=torch.float64)

    grad = gradient(partial(K2_5, regularisation=0.0))

    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mask_does_not_look_at_the_advantages_sign(sign: float):
    logprobs = policy()

    loss = K2_5(logprobs, BEHAVIOR, sign * ADVANTAGES.abs(), MASK, CU, regularisation=0.0)
    loss.backward()

    assert logprobs.grad is not None
    assert logprobs.grad.nonzero().flatten().tolist() == [2, 3]


def test_the_squared_log_ratio_pulls_clipped_tokens_back_unless_told_otherwise():
    pull = 2 * 0.03 * RATIOS.log()
    kept, dropped = gradient(K2_5), gradient(partial(K2_5, regularise_clipped=False))

    torch.testing.assert_close(kept[[1, 4]], pull[[1, 4]], rtol=0, atol=1e-12)
    assert dropped[[1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(kept[[2, 3]], dropped[[2, 3]])
    torch.testing.assert_close(kept[2], -0.9 * ADVANTAGES[2] + pull[2], rtol=0, atol=1e-12)


def test_bounds_on_the_log_ratio_are_the_logarithms_of_bounds_on_the_ratio():
    logs = partial(K2_5, low=math.log(0.5), high=math.log(5.0), bounds_on="log_ratio")

    torch.testing.assert_close(gradient(logs), gradient(K2_5))


@pytest.mark.parametrize(
    "objective",
    [
        K2_5,
        partial(sequence_loss, regularisation=0.1),
        partial(grpo_loss, clip_low=0.2, clip_high=0.28),
    ],
)
def test_gradients_match_finite_differences(objective):
    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return objective(logprobs, BEHAVIOR, ADVANTAGES, MASK, CU)

    assert torch.autograd.gradcheck(loss, policy())


def test_the_value_is_the_formula():
    wanted = sum(
        0.03 * math.log(r) ** 2 - min(max(r, 0.5), 5.0) * a
        for r, a, m in zip(RATIOS.tolist(), ADVANTAGES.tolist(), MASK.tolist(), strict=True)
        if m
    )

    assert K2_5(policy(), BEHAVIOR, ADVANTAGES, MASK, CU).item() == pytest.approx(wanted, abs=1e-12)


def test_k1_5_regularises_whole_answers():
    """The log-ratios of an answer add up before they are squared."""
    sums = [math.log(0.4) + math.log(0.9), math.log(2.0) + math.log(7.0)]
    advantage = ADVANTAGES.tolist()
    wanted = [0.0] + [0.1 * sums[i // 3] - advantage[i] for i in (1, 2, 3, 4)]

    grad = gradient(partial(sequence_loss, regularisation=0.1))

    torch.testing.assert_close(grad, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def test_grpo_stops_only_moves_that_the_advantage_already_rewarded():
    """Ratio 2 with a negative advantage still has a gradient, ratio 0.4 with a positive one too."""
    grad = gradient(partial(grpo_loss, clip_low=0.2, clip_high=0.28))

    assert grad.nonzero().flatten().tolist() == [1, 2, 3, 4]
    flipped = policy()
    grpo_loss(flipped, BEHAVIOR, -ADVANTAGES, MASK, CU, clip_low=0.2, clip_high=0.28).backward()
    assert flipped.grad is not None
    assert flipped.grad.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("low", "high", "bounds_on"),
    [(1.2, 5.0, "ratio"), (0.0, 5.0, "ratio"), (0.5, 0.9, "ratio"), (0.5, 5.0, "log_ratio")],
)
def test_bounds_that_leave_no_room_for_the_policy_itself_are_refused(low, high, bounds_on):
    with pytest.raises(ValueError, match=f"low={low}, high={high} on the {bounds_on}"):
        K2_5(policy(), BEHAVIOR, ADVANTAGES, MASK, CU, low=low, high=high, bounds_on=bounds_on)


def test_advantages_have_no_mean_and_keep_their_scale():
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([0.5, 0.5]) == [0.0, 0.0]
    assert group_advantages([10.0, 0.0]) == [5.0, -5.0]
    assert group_advantages([10.0, 0.0], normalise=True) == pytest.approx(
        [0.7071, -0.7071], abs=1e-3
    )
    with pytest.raises(ValueError, match="want finite"):
        group_advantages([1.0, float("nan")])
