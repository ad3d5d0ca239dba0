"""Toggle and other length rules against groups whose outcome is counted by hand."""

import pytest

from moonlit.batch import Group
from moonlit.rl.length_rules import HardCap, LengthReward, ShuffledRewards
from moonlit.rl.toggle import Toggle
from tests.rl.answers import group

SETTINGS = {"period": 2, "min_accuracy": 0.5, "percentile": 50.0, "estimate_iterations": 1}


def rewards(one: Group) -> list[float]:
    return [trajectory.reward for trajectory in one.trajectories]


def test_budgets_are_a_percentile_of_correct_lengths_by_kind_and_stay():
    """Correct lengths of counting: 2, 4, 10, whose median is 4; wrong ones do not count."""
    toggle = Toggle(**SETTINGS)
    first = [group((1.0, 2), (1.0, 10), (0.0, 90)), group((1.0, 4)), group((0.0, 7), kind="ocr")]

    toggle.apply(first)
    assert toggle.budgets == {"counting": 4.0}
    assert rewards(first[0]) == [1.0, 1.0, 0.0]  # nothing is constrained while it measures

    toggle.apply([group((1.0, 1), (1.0, 1))])
    assert toggle.budgets == {"counting": 4.0}


def test_ranks_measure_together():
    """Catches: budgets of their own on every rank, of which a checkpoint keeps the first's only."""
    toggle = Toggle(**SETTINGS)
    other = Toggle(**SETTINGS)
    other.apply([group((1.0, 10), (0.0, 99)), group((1.0, 7), kind="ocr")])
    toggle.apply([group((1.0, 2))], lambda mine: [mine, other.last])
    assert toggle.budgets == {"counting": 6.0, "ocr": 7.0}
    assert (toggle.last.num_groups, toggle.last.num_answers) == (3, 4)
    assert toggle.last.correct_lengths == {"counting": [2, 10], "ocr": [7]}


def test_phases_alternate_and_only_the_first_constrains():
    toggle = Toggle(**SETTINGS)
    toggle.apply([group((1.0, 4))])
    kept = []
    for _ in range(8):
        some = group((1.0, 4), (1.0, 5))
        toggle.apply([some])
        kept.append((toggle.last.is_budget_phase, rewards(some)))

    budget, scaling = (True, [1.0, 0.0]), (False, [1.0, 1.0])
    assert kept == [budget, budget, scaling, scaling] * 2


def test_a_group_below_lambda_is_left_alone():
    toggle = Toggle(**SETTINGS)
    toggle.apply([group((1.0, 4))])
    weak, strong = group((1.0, 9), (0.0, 9), (0.0, 9)), group((1.0, 9), (0.0, 9))

    toggle.apply([weak, strong])

    assert rewards(weak) == [1.0, 0.0, 0.0]
    assert rewards(strong) == [0.0, 0.0]
    assert (toggle.last.num_constrained, toggle.last.num_groups) == (1, 2)
    assert toggle.last.num_over_budget == toggle.last.num_answers == 5


def test_a_kind_without_a_correct_answer_is_never_constrained():
    toggle = Toggle(**SETTINGS)
    toggle.apply([group((1.0, 4)), group((0.0, 3), kind="ocr")])
    later = group((1.0, 99), (1.0, 99), kind="ocr")
    toggle.apply([later])
    assert rewards(later) == [1.0, 1.0]


def test_rollouts_that_were_lost_count_for_nothing():
    toggle = Toggle(**SETTINGS)
    toggle.apply([group((1.0, 4), lost=3)])
    some = group((1.0, 4), lost=3)
    toggle.apply([some])
    assert toggle.budgets == {"counting": 4.0}
    assert rewards(some) == [1.0, 0.0, 0.0, 0.0]  # a mean of 1 over the one that was judged


def test_a_resume_keeps_iteration_budgets_and_half_measured_lengths():
    settings = SETTINGS | {"estimate_iterations": 2}
    before, after = Toggle(**settings), Toggle(**settings)
    before.apply([group((1.0, 2))])

    after.load_state_dict(before.state_dict())
    after.apply([group((1.0, 6))])

    assert after.budgets == {"counting": 4.0}
    again = Toggle(**settings)
    again.load_state_dict(after.state_dict())
    assert (again.iteration, again.budgets, again.is_budget_phase) == (2, {"counting": 4.0}, True)
    again.apply([group((1.0, 3))])
    assert again.last.saved_tokens == [1.0]


@pytest.mark.parametrize(
    "change",
    [{"period": 0}, {"min_accuracy": 1.5}, {"percentile": 101.0}, {"estimate_iterations": 0}],
)
def test_numbers_out_of_range_are_refused(change: dict):
    with pytest.raises(ValueError, match=next(iter(change))):
        Toggle(**SETTINGS | change)


def test_a_hard_cap():
    some = group((1.0, 4), (1.0, 5), lost=1)
    assert HardCap(max_tokens=4).apply([some]) == {"length/over_cap": 0.5}
    assert rewards(some)[:2] == [1.0, 0.0]


def test_k1_5s_length_reward_by_hand():
    some = group((1.0, 2), (1.0, 6), (0.0, 2), (0.0, 6))
    LengthReward(weight=0.1).apply([some])
    assert rewards(some) == pytest.approx([1.05, 0.95, 0.0, -0.05])
    equal = group((1.0, 3), (0.0, 3))
    LengthReward(weight=0.1).apply([equal])
    assert rewards(equal) == [1.0, 0.0]
    lost = group((1.0, 2), (1.0, 6), lost=1)  # whose length of 0 is nobody's
    LengthReward(weight=0.1).apply([lost])
    assert rewards(lost) == pytest.approx([1.05, 0.95, 0.0])


def test_shuffled_rewards_are_the_groups_own_dealt_out_anew_and_a_resume_deals_on():
    def deal(rule: ShuffledRewards) -> list[float]:
        some = group(*((float(n), n) for n in range(1, 9)), lost=1)
        assert rule.apply([some]) == {}
        assert some.trajectories[-1].reward == 0
        return rewards(some)[:-1]

    whole = ShuffledRewards(seed=0)
    first, second, third = (deal(whole) for _ in range(3))
    assert sorted(first) == [float(n) for n in range(1, 9)]
    assert first != sorted(first)
    assert first != second

    before, after = ShuffledRewards(seed=0), ShuffledRewards(seed=0)
    assert [deal(before), deal(before)] == [first, second]
    after.load_state_dict(before.state_dict())
    assert deal(after) == third


def test_what_a_generative_judge_adds_makes_no_answer_correct():
    """Catches: style that opens the accuracy gate, or lengths of wrong answers in the budget."""
    praised = group((1.1, 2), (1.1, 90))
    praised.trajectories[1].bonus = 0.2  # 0.9 was verified
    toggle = Toggle(**SETTINGS)
    toggle.apply([praised])
    assert toggle.budgets == {"counting": 2.0}

    wrong = group((0.3, 4), (1.3, 5))
    for one in wrong.trajectories:
        one.bonus = 0.9
    toggle.apply([wrong])
    assert rewards(wrong) == [0.3, 1.3]


def test_a_penalty_is_not_lifted_for_being_too_long():
    toggle, cap = Toggle(**SETTINGS), HardCap(max_tokens=4)
    toggle.apply([group((1.0, 4))])
    for rule in (toggle, cap):
        some = group((1.0, 2), (1.0, 2), (-0.1, 90))
        rule.apply([some])
        assert rewards(some) == [1.0, 1.0, -0.1]


def test_kinds_are_told_apart_by_how_hard_they_are():
    """Lengths 2 and 8 share an environment; a budget of both would cut the longer ones."""
    easy, hard = group((1.0, 2), (1.0, 2)), group((1.0, 8), (1.0, 8))
    easy.task.tags["difficulty"], hard.task.tags["difficulty"] = "1", "9"
    toggle = Toggle(**SETTINGS)
    toggle.apply([easy, hard])
    toggle.apply([easy, hard])
    assert toggle.budgets == {"counting_1": 2.0, "counting_9": 8.0}
    assert rewards(hard) == [1.0, 1.0]
