"""Schedules at the steps that can be worked out by hand."""

import pytest

from moonlit.optim.schedule import constant, cosine_with_cooldown, warmup_stable_decay

WSD = {"warmup": 4, "decay": 10, "final_fraction": 0.1}
COOLDOWN = {
    "warmup": 2,
    "cosine_final_fraction": 0.1,
    "cooldown": 10,
    "rewarm": 2,
    "rewarm_fraction": 0.3,
}


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [
        (0, 0.25), (3, 1.0), (4, 1.0), (89, 1.0),  # up, then flat
        (94, 0.55),  # half-way: the mean of 1 and 0.1
        (99, 0.1), (250, 0.1),  # the last step, and past it
    ],
)  # fmt: skip
def test_wsd_warms_up_holds_and_decays_by_a_cosine(step: int, multiplier: float):
    assert warmup_stable_decay(step, 100, **WSD) == pytest.approx(multiplier)


def test_a_share_of_the_run_is_a_count_of_steps():
    shares = {"warmup": 0.04, "decay": 0.1, "final_fraction": 0.1}

    for step in range(101):
        assert warmup_stable_decay(step, 100, **shares) == warmup_stable_decay(step, 100, **WSD)


def test_a_share_is_rounded_to_the_nearest_step():
    """Catches: a share cut down to whole steps: 0.29 * 100 is a little less than 29."""
    assert warmup_stable_decay(27, 100, warmup=0.29, decay=0, final_fraction=0.1) == 28 / 29


def test_wsd_without_warmup_and_decay_is_constant():
    values = {warmup_stable_decay(s, 9, warmup=0, decay=0, final_fraction=0.1) for s in range(12)}

    assert values == {constant(0, 9)} == {1.0}


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [
        (0, 0.5), (1, 1.0),  # up
        (45, 0.55), (89, 0.1),  # cosine: half-way, and its end
        (90, 0.2), (91, 0.3),  # up again
        (95, 0.15), (99, 0.0), (250, 0.0),  # straight down
    ],
)  # fmt: skip
def test_the_cooldown_goes_up_once_more_and_then_straight_to_zero(step: int, multiplier: float):
    assert cosine_with_cooldown(step, 100, **COOLDOWN) == pytest.approx(multiplier, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 1.5}, r"warmup as a float is a share .* got 1.5"),
        ({"warmup": -1}, "warmup must be at least 0 steps, got -1"),
        ({"final_fraction": 2.0}, r"final_fraction must lie in \[0, 1\], got 2.0"),
        ({"warmup": 95}, r"warmup \(95\) \+ decay \(10\) must fit in 100 steps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        warmup_stable_decay(0, 100, **(WSD | changes))


def test_a_rewarming_longer_than_the_cooldown_is_refused():
    with pytest.raises(ValueError, match=r"rewarm \(11\) must fit in 10 steps"):
        cosine_with_cooldown(0, 100, **(COOLDOWN | {"rewarm": 11}))
