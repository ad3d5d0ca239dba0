import math

import pytest

from moonlit.phases.guard import StepGuard, TrainingDivergedError


def calm_guard(**kwargs: float) -> StepGuard:
    guard = StepGuard(**({"spike_sigmas": 4.0, "window": 10, "max_skips_in_a_row": 3} | kwargs))
    for step in range(20):
        assert guard.reason_to_skip(2.0 + 0.1 * (-1) ** step, 1.0) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [(math.nan, 1.0, "loss of nan"), (2.0, math.inf, "gradient norm of inf"), (2.9, 1.0, "spike")],
)
def test_a_bad_step_is_skipped_with_its_reason(loss: float, grad_norm: float, reason: str):
    assert reason in calm_guard().reason_to_skip(loss, grad_norm)


def test_a_small_rise_and_any_fall_are_no_spikes():
    guard = calm_guard()
    assert guard.reason_to_skip(2.2, 1.0) is None
    assert guard.reason_to_skip(0.1, 1.0) is None


def test_a_skipped_loss_does_not_move_the_limit():
    guard = calm_guard()
    mean = guard.mean
    guard.reason_to_skip(50.0, 1.0)
    assert guard.mean == mean


def test_no_spike_is_called_before_the_window_is_full():
    guard = StepGuard(spike_sigmas=1.0, window=10, max_skips_in_a_row=3)
    assert [guard.reason_to_skip(loss, 1.0) for loss in (1.0, 1.0, 9.0)] == [None] * 3


def test_a_spike_is_called_as_soon_as_the_window_is_full():
    """Catches: a window that is one step longer than it says."""
    guard = StepGuard(spike_sigmas=1.0, window=3, max_skips_in_a_row=3)

    reasons = [guard.reason_to_skip(loss, 1.0) for loss in (1.0, 1.0, 1.0, 9.0)]

    assert reasons[:3] == [None] * 3
    assert "spike" in str(reasons[3])


def test_the_averages_forget_what_lies_before_the_window():
    """Catches: averages over the whole run, beside which a late spike is small."""
    guard = StepGuard(spike_sigmas=9.0, window=2, max_skips_in_a_row=3)

    for loss in (8.0, 0.0, 4.0, 0.0):
        guard.reason_to_skip(loss, 1.0)

    assert guard.mean == 2.0  # 8, 4, 4, 2; over the whole run it is 3


def test_the_run_stops_at_the_configured_number_in_a_row_only():
    guard = calm_guard()
    for loss in (math.nan, math.nan, 2.0, math.nan, math.nan):
        guard.reason_to_skip(loss, 1.0)
    with pytest.raises(TrainingDivergedError, match="3 optimizer steps in a row"):
        guard.reason_to_skip(math.nan, 1.0)


def test_the_running_variance_is_that_of_the_losses():
    guard = StepGuard(spike_sigmas=4.0, window=1000, max_skips_in_a_row=3)
    for loss in (1.0, 2.0, 4.0, 7.0):
        guard.reason_to_skip(loss, 1.0)
    assert (guard.mean, guard.variance) == pytest.approx((3.5, 5.25))  # population variance


def test_a_restored_guard_judges_the_same():
    guard, restored = calm_guard(), StepGuard(spike_sigmas=4.0, window=10, max_skips_in_a_row=3)
    guard.reason_to_skip(math.nan, 1.0)
    restored.load_state_dict(guard.state_dict())
    assert restored.state_dict() == guard.state_dict()
    assert restored.reason_to_skip(2.9, 1.0) == guard.reason_to_skip(2.9, 1.0)


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="window >= 1"):
        StepGuard(spike_sigmas=4.0, window=0, max_skips_in_a_row=3)
