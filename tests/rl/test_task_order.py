"""Which task comes next: by pass rate, from easy to hard, over ranks and resumes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moonlit.batch import Group, Task, Trajectory
from moonlit.rl.rollout_manager import RolloutManager
from moonlit.rl.task_order import Curriculum, InOrder, Prioritised, TaskOrder, pass_rate
from tests.rl.managers import MADE
from tests.rl.scripted import Scripted, conversation

POOL = 10


class OddIsSolved:
    """Answers to odd tasks are right, to task 4 every second one is."""

    async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
        is_right = task.answer % 2 == 1 or (task.answer == 4 and seed % 2 == 1)
        return Trajectory(
            segments=[], messages=[], spans=[], stop_reason="answer", reward=float(is_right)
        )

    async def aclose(self) -> None:
        pass


def task_of(number: int) -> Task:
    tags = {"difficulty": str(-number)}
    return Task(prompt=[], domain="d", environment="odd", answer=number, tags=tags)


def make(order: TaskOrder, **settings: Any) -> RolloutManager:
    manager = RolloutManager(
        task_of=task_of, task_order=order, environment=OddIsSolved(),
        policy=conversation(Scripted()), **{"group_size": 2, **settings},
    )  # fmt: skip
    MADE.append(manager)
    return manager


def prioritised() -> Prioritised:
    return Prioritised(pool_size=POOL, rate_step=0.5, min_weight=0.05)


def curriculum() -> Curriculum:
    return Curriculum(pool_size=POOL, first_share=0.2, iterations=4)


def iterate(managers: list[RolloutManager], times: int, num_groups: int = 4) -> list[list[int]]:
    """What every iteration worked on, over all ranks, in the order of the groups' numbers."""
    worked_on = []
    for _ in range(times):
        some = [
            [group.task.answer for group in manager.collect(num_groups // len(managers))]
            for manager in managers
        ]
        outcomes = [outcome for manager in managers for outcome in manager.take_outcomes()]
        for manager in managers:
            manager.task_order.learn(sorted(outcomes))
            manager.version += 1
        worked_on.append([number for row in zip(*some, strict=True) for number in row])
    return worked_on


def test_failed_tasks_come_in_proportion_to_one_minus_their_pass_rate():
    order = prioritised()
    order.learn([(number, number, 1.0) for number in range(POOL)])
    order.learn([(10, 2, 0.0), (11, 3, 0.5)])  # rates 0.5 and 0.75

    counts = Counter(order.pick(n, seed=0, task_of=task_of) for n in range(4000))

    weights = np.array([0.05, 0.05, 0.5, 0.25, *[0.05] * 6])
    for number, share in enumerate(weights / weights.sum()):
        assert counts[number] / 4000 == pytest.approx(share, abs=0.025)


def test_what_was_never_tried_counts_as_failed_and_solved_tasks_fade():
    order = prioritised()
    first, later = (
        Counter(n for some in iterate([make(order, seed=seed)], num) for n in some)
        for seed, num in ((0, 5), (1, 50))
    )

    weights = order.weights().tolist()
    assert weights[:4] + weights[5:] == [1.0, 0.05, 1.0, 0.05, 0.05, 1.0, 0.05, 1.0, 0.05]
    odd = sum(later[n] for n in range(1, POOL, 2)) / sum(later.values())
    assert odd < 0.12 < sum(first[n] for n in range(1, POOL, 2)) / sum(first.values())


def test_a_curriculum_opens_the_easiest_first():
    """Difficulty is minus the number: 9 and 8 are the easiest fifth."""
    per_iteration = iterate([make(curriculum())], 30, 8)

    assert set(per_iteration[0]) == {8, 9}
    assert set(per_iteration[2]) <= {4, 5, 6, 7, 8, 9}
    assert {n for some in per_iteration[4:] for n in some} == set(range(POOL))


@pytest.mark.parametrize("order", [InOrder, prioritised, curriculum])
def test_a_resume_goes_on_with_the_very_same_tasks(order: Callable[[], TaskOrder]):
    """Catches: rates or iterations that start again, and a begun group that gets another task."""
    settings = {"num_ahead": 3, "max_staleness": 2}
    whole = iterate([make(order(), **settings)], 12)

    before = make(order(), **settings)
    first = iterate([before], 5)
    after = make(order(), **settings)
    after.load_state_dicts([before.state_dict()])

    assert first + iterate([after], 7) == whole


@pytest.mark.parametrize("order", [InOrder, prioritised, curriculum])
def test_ranks_work_on_what_one_process_would(order: Callable[[], TaskOrder]):
    one = iterate([make(order())], 10)
    two = iterate([make(order(), rank=rank, num_ranks=2) for rank in range(2)], 10)
    assert two == one


def test_a_resume_on_other_ranks_keeps_rates_and_begun_tasks():
    settings = {"num_ahead": 2, "max_staleness": 2}
    before = [make(prioritised(), rank=rank, num_ranks=2, **settings) for rank in range(2)]
    iterate(before, 6)
    begun = {n: task for one in before for n, task in one.state_dict()["unfinished"].items()}

    after = make(prioritised(), **settings)
    after.load_state_dicts([one.state_dict() for one in before])

    assert after.task_order.state_dict() == before[0].task_order.state_dict()
    assert len(begun) == 4
    assert begun.items() <= after.state_dict()["unfinished"].items()
    assert iterate([after], 1)[0] == [begun[number] for number in sorted(begun)]


def test_dropped_groups_are_learnt_from_too():
    order = prioritised()
    manager = make(order, drop_equal_rewards=True, max_drops=50)
    iterate([manager], 3, 2)
    assert manager.counts.dropped_groups > 0
    assert {n for n, rate in order.rates.items() if rate == 1.0} >= {1}


def test_rollouts_that_were_lost_say_nothing_of_a_task():
    right, lost = (
        Trajectory(segments=[], messages=[], spans=[], stop_reason="answer", reward=r, error=e)
        for r, e in ((1.0, None), (0.0, "lost"))
    )
    assert pass_rate(Group(task=task_of(0), trajectories=[right, lost])) == 1.0
    assert pass_rate(Group(task=task_of(0), trajectories=[lost])) is None


def test_a_curriculum_over_tasks_that_do_not_say_how_hard_they_are_is_refused():
    silent = Task(prompt=[], domain="d", environment="ocr", answer=1)
    with pytest.raises(ValueError, match=r"task 0 \(ocr\) has the difficulty ''"):
        curriculum().pick(0, seed=0, task_of=lambda number: silent)


@pytest.mark.parametrize(
    ("make_order", "told"),
    [
        (lambda: Prioritised(pool_size=0, rate_step=0.5, min_weight=0.1), "pool_size=0"),
        (lambda: Prioritised(pool_size=1, rate_step=0.0, min_weight=0.1), r"rate_step=0\.0"),
        (lambda: Prioritised(pool_size=1, rate_step=0.5, min_weight=0.0), r"min_weight=0\.0"),
        (lambda: Curriculum(pool_size=1, first_share=0.0, iterations=1), r"first_share=0\.0"),
        (lambda: Curriculum(pool_size=1, first_share=0.5, iterations=0), "iterations=0"),
    ],
)
def test_numbers_out_of_range_are_refused(make_order: Callable[[], TaskOrder], told: str):
    with pytest.raises(ValueError, match=told):
        make_order()
