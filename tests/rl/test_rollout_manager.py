"""Groups of rollouts: all come, once, not too late, whatever their length or their faults."""

import asyncio
import heapq
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest

from moonlit.agents.environment import Environment, VerifierError
from moonlit.batch import Group, Segment, Task, Trajectory
from moonlit.rl.rollout_limits import TimeLimits, TokenBudget
from moonlit.rl.rollout_manager import RolloutManager, TooManyErrorsError, seed_of
from moonlit.rl.trained_segments import trained_segments
from tests.rl.managers import MADE
from tests.rl.scripted import Scripted, conversation

K = 2


class Clock(Scripted):
    """An engine whose time passes only when everybody waits: any length costs nothing.

    While it is paused, its time stands still.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.numbers = 0.0, count()
        self.alarms: list[tuple[float, int, asyncio.Event]] = []
        self.is_open = asyncio.Event()
        self.ticking: asyncio.Task[None] | None = None

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.now)

    async def pause(self) -> None:
        self.is_open.clear()

    async def resume(self) -> None:
        self.is_open.set()

    async def sleep(self, length: float) -> None:
        rung = asyncio.Event()
        heapq.heappush(self.alarms, (self.now + length, next(self.numbers), rung))
        if self.ticking is None or self.ticking.done():
            self.ticking = asyncio.ensure_future(self.tick())
        await rung.wait()

    async def tick(self) -> None:
        while self.alarms:
            for _ in range(9):  # let everybody who can run come to rest
                await asyncio.sleep(0)
            await self.is_open.wait()
            self.now, _, rung = heapq.heappop(self.alarms)
            rung.set()


class Lengths:
    """A rollout takes as long as its task says; what goes wrong is said there too."""

    closed = False

    async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
        await policy.engine.sleep(task.answer)
        if "crash" in task.tags:
            raise OSError("the page is gone")
        segment = Segment(
            input_ids=[1, 2],
            is_sampled=[False, True],
            behavior_logprobs=[0.0, -1.0],
            policy_versions=[-1, 0],
        )
        return Trajectory(
            segments=[segment],
            messages=[],
            spans=[],
            stop_reason="answer",
            reward=0.5 if "equal" in task.tags else float(seed % 1000),
        )

    async def aclose(self) -> None:
        self.closed = True


def make(
    length_of: Callable[[int], float] = lambda number: 1.0,
    tags_of: Callable[[int], dict[str, str]] = lambda number: {},
    **settings: Any,
) -> RolloutManager:
    def task_of(number: int) -> Task:
        return Task(
            prompt=[number],
            domain="d",
            environment="lengths",
            answer=length_of(number),
            tags=tags_of(number),
        )

    manager = RolloutManager(
        task_of=task_of,
        policy=conversation(Clock()),
        **{"environment": Lengths(), "group_size": K, **settings},
    )
    MADE.append(manager)
    return manager


def numbers(groups: list[Group]) -> list[int]:
    return [group.task.prompt[0] for group in groups]


def long_tail(number: int) -> float:
    return 100.0 if number % 5 == 3 else 1.0


def collect_many(manager: RolloutManager, iterations: int, num_groups: int) -> list[list[int]]:
    delivered = []
    for _ in range(iterations):
        delivered.append(numbers(manager.collect(num_groups)))
        manager.version += 1
    return delivered


def test_an_iteration_waits_for_the_last_unless_more_are_in_flight():
    waiting, ahead = make(long_tail), make(long_tail, num_ahead=4, max_staleness=3)

    assert numbers(waiting.collect(5)) == [0, 1, 2, 3, 4]
    assert numbers(ahead.collect(5)) == [0, 1, 2, 4, 5]  # without the long one, number 3
    assert waiting.policy.engine.now == 100
    assert ahead.policy.engine.now == 1


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_none_is_older_than_allowed_and_none_is_lost(max_staleness: int):
    manager = make(long_tail, num_ahead=6, max_staleness=max_staleness)
    began: dict[int, int] = {}
    came: dict[int, int] = {}
    for version in range(20):
        groups = manager.collect(4)
        came |= dict.fromkeys(numbers(groups), version)
        began |= {flight.number: flight.began_version for flight in manager.flights.values()}
        began |= {n: began.get(n, version) for n in numbers(groups)}
        manager.version += 1

    assert max(came[n] - began[n] for n in came) == max_staleness
    missing = set(range(max(came))) - set(came)
    assert missing == {n for n in (*manager.flights, *manager.finished) if n < max(came)}


def test_short_answers_are_not_favoured():
    """A fifth of the tasks takes a hundred times as long: a fifth of what is delivered does."""
    manager = make(long_tail, num_ahead=8, max_staleness=4)

    delivered = [n for some in collect_many(manager, 50, 4) for n in some]

    share = sum(n % 5 == 3 for n in delivered) / len(delivered)
    assert share == pytest.approx(0.2, abs=0.03)
    assert max(Counter(delivered).values()) == 1


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 1), (2, 3), (4, 1)])
def test_a_resume_neither_skips_nor_repeats(ranks_before: int, ranks_after: int):
    settings = {"num_ahead": 3, "max_staleness": 2}
    before = [
        make(long_tail, rank=rank, num_ranks=ranks_before, **settings)
        for rank in range(ranks_before)
    ]
    done = [n for manager in before for some in collect_many(manager, 3, 2) for n in some]

    after = [
        make(long_tail, rank=rank, num_ranks=ranks_after, **settings) for rank in range(ranks_after)
    ]
    for manager in after:
        manager.load_state_dicts([one.state_dict() for one in before])
    rest = [n for manager in after for some in collect_many(manager, 12, 2) for n in some]

    assert max(Counter(done + rest).values()) == 1
    top = max(done)
    in_flight = {n for manager in after for n in (*manager.flights, *manager.finished)}
    assert set(range(top)) <= set(done) | set(rest) | in_flight
    assert len([n for n in in_flight if n < top]) == 0
    assert {manager.version for manager in after} == {15}


def test_a_crash_is_counted_and_is_no_zero():
    crashing = {"crash": "yes"}
    manager = make(tags_of=lambda n: crashing if n == 2 else {}, max_error_fraction=0.5)

    groups = manager.collect(4)

    lost = list(groups[2].trajectories)
    assert [one.error for one in lost] == ["lengths: OSError: the page is gone"] * K
    assert all(one.segments == [] for one in lost)
    assert all(one.error is None for group in groups[:2] for one in group.trajectories)
    assert (manager.counts.errors, manager.counts.rollouts) == (2, 8)
    assert not groups[2].teaches


def test_too_many_crashes_stop_the_run_and_name_the_last():
    manager = make(tags_of=lambda n: {"crash": "yes"})
    with pytest.raises(TooManyErrorsError, match=r"rollouts were lost.*the page is gone"):
        manager.collect(4)


def test_a_rollout_that_never_ends_is_cut_and_counted():
    class Endless(Lengths):
        async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
            if task.prompt[0] == 1:
                await asyncio.Event().wait()
            return await super().run(task, policy, seed=seed)

    manager = make(environment=Endless(), timeout_s=0.2, max_error_fraction=1.0)

    groups = manager.collect(3)

    told = "lengths: TimeoutError: no end after timeout_s=0.2"
    assert [one.error for one in groups[1].trajectories] == [told] * K


def test_a_time_out_of_the_environments_own_stays_its_own():
    class Impatient(Lengths):
        async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
            raise TimeoutError

    manager = make(environment=Impatient(), timeout_s=60.0, max_error_fraction=1.0)

    (group,) = manager.collect(1)

    assert [one.error for one in group.trajectories] == ["lengths: TimeoutError"] * K


def test_an_environment_that_returns_no_rollout_is_named_and_counted():
    class Forgets(Lengths):
        async def run(self, task: Task, policy: Any, *, seed: int) -> Any:
            await super().run(task, policy, seed=seed)

    manager = make(environment=Forgets(), max_error_fraction=1.0)

    (group,) = manager.collect(1)
    (answer,) = manager.evaluate([group.task], manager.policy)

    told = r"lengths: TypeError: Forgets\.run returned None: want a moonlit\.batch\.Trajectory"
    for one in (*group.trajectories, answer):
        assert re.fullmatch(told, one.error or "")
    assert manager.counts.errors == K


def test_an_environment_without_aclose_has_nothing_to_close():
    class Open:
        run = Lengths.run

    manager = make(environment=Open())
    manager.collect(1)

    MADE.remove(manager)
    manager.close()

    assert not manager.thread.thread.is_alive()


def test_a_time_limit_stands_still_while_rollouts_are_held():
    manager = make(long_tail, num_ahead=4, max_staleness=1, timeout_s=0.3)
    manager.collect(5)
    time.sleep(0.5)  # the policy is trained
    manager.version += 1
    assert 3 in numbers(manager.collect(5))
    assert manager.counts.errors == 0


def test_a_rollout_that_begins_while_others_are_held_is_held_too():
    """Catches: the time of training on the clock of a group that takes a dropped one's place."""

    async def run() -> Trajectory:
        limits, go = TimeLimits(0.2), asyncio.Event()

        async def rollout() -> Trajectory:
            await go.wait()
            return Trajectory(segments=[], messages=[], spans=[], stop_reason="answer")

        limits.pause()
        running = asyncio.ensure_future(limits.limited(rollout()))
        await asyncio.sleep(0.5)  # the policy is trained
        limits.resume()
        go.set()
        return await running

    assert asyncio.run(run()).stop_reason == "answer"


def test_what_does_not_sample_goes_on_while_rollouts_are_held():
    """A judge that is waiting for its answer must not find its connection timed out."""
    judged = threading.Event()

    class Judged(Lengths):
        async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
            trajectory = await super().run(task, policy, seed=seed)
            if task.prompt[0] == 5:
                await asyncio.sleep(0.1)
                judged.set()
            return trajectory

    slow = {4: 2.0}  # number 5 has sampled its last token before 4 has
    manager = make(lambda n: slow.get(n, 1.0), environment=Judged(), num_ahead=1, max_staleness=1)
    assert numbers(manager.collect(5)) == [0, 1, 2, 3, 4]
    assert judged.wait(timeout=10)


def test_a_token_budget_ends_an_iteration_with_what_is_finished():
    manager = make(lambda n: 10.0 * (n + 1), max_staleness=3, max_iteration_tokens=25)

    delivered = collect_many(manager, 5, 4)

    # The third ends at 30 tokens: whether it is there when the budget is looked at is luck.
    assert delivered[0] in ([0, 1], [0, 1, 2])
    assert sorted(n for some in delivered for n in some) == list(range(sum(map(len, delivered))))


def test_a_token_budget_counts_from_where_its_iteration_began():
    engine = Clock()
    engine.now = 100.0
    budget, none = (TokenBudget(conversation(engine), tokens) for tokens in (25, None))
    spent = []
    for engine.now in (100.0, 124.0, 125.0):
        spent.append(budget.is_spent)
    assert spent == [False, False, True]
    assert not none.is_spent


def test_an_evaluation_names_what_it_could_not_judge_and_counts_it_nowhere():
    manager = make(tags_of=lambda n: {"crash": "yes"} if n == 1 else {})
    tasks = [manager.task_of(number) for number in range(3)]
    answers = manager.evaluate(tasks, manager.policy)
    assert [one.error for one in answers] == [None, "lengths: OSError: the page is gone", None]
    assert (manager.counts.errors, manager.counts.rollouts) == (0, 0)


def test_a_bad_task_ends_the_run_instead_of_hanging_it():
    def explode(number: int) -> float:
        raise ValueError(f"no task {number}")

    with pytest.raises(ValueError, match="no task 0"):
        make(explode).collect(1)


def test_groups_of_equal_rewards_are_replaced_up_to_a_limit():
    equal = {"equal": "yes"}
    manager = make(tags_of=lambda n: equal if n < 3 else {}, drop_equal_rewards=True)
    assert numbers(manager.collect(4)) == [3, 4, 5, 6]
    assert manager.counts.dropped_groups == 3

    hopeless = make(tags_of=lambda n: equal, drop_equal_rewards=True, max_drops=2)
    assert len(hopeless.collect(4)) == 4
    assert hopeless.counts.dropped_groups == 8
    hopeless.version += 1
    assert len(hopeless.collect(4)) == 4
    assert hopeless.counts.dropped_groups == 16  # the limit is of an iteration


def test_closing_cancels_what_is_in_flight():
    manager = make(long_tail, num_ahead=3, max_staleness=2)
    manager.collect(4)

    MADE.remove(manager)
    manager.close()

    assert manager.environment.closed
    assert not manager.thread.thread.is_alive()
    assert not manager.running


def test_seeds_differ_by_run_task_and_answer():
    seeds = {seed_of(s, n, k) for s in range(5) for n in range(50) for k in range(8)}
    assert len(seeds) == 2000


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"num_ahead": 2}, "num_ahead=2, max_staleness=0"),
        ({"max_iteration_tokens": 9}, "max_iteration_tokens=9, max_staleness=0"),
        ({"timeout_s": 0.0}, "timeout_s=0"),
        ({"max_error_fraction": 2.0}, "max_error_fraction=2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        make(**settings)


def test_the_test_environment_is_an_environment():
    assert isinstance(Lengths(), Environment)


def test_ranks_that_stopped_at_unlike_places_leave_no_gap():
    """Rank 0 had begun all even numbers below 10, rank 1 the odd ones below 5."""
    states = [
        {"next_number": 10, "unfinished": {2: 2}, "version": 4, "task_order": {}},
        {"next_number": 5, "unfinished": {}, "version": 4, "task_order": {}},
    ]
    one = make()
    one.load_state_dicts(states)
    assert (list(one.redo), one.next_number) == ([2, 5, 7, 9], 10)
    second = make(rank=1, num_ranks=2)
    second.load_state_dicts(states)
    assert (list(second.redo), second.next_number) == ([5, 9], 11)


class Compares:
    """A group judge: the later the seed in the group, the better; some tasks it cannot judge."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.seeds: set[int] = set()
        self.closed = False

    async def judge_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, step: int, seed: int
    ) -> None:
        self.asked.append((task.prompt[0], step))
        self.seeds.add(seed)
        if "unclear" in task.tags:
            raise VerifierError("the judge is silent")
        for place, one in enumerate(trajectories):
            if one.error is None:
                one.reward += place
        if "one unclear" in task.tags:
            trajectories[0].error = "grm: cut off"

    async def aclose(self) -> None:
        self.closed = True


def test_a_group_judge_makes_equal_answers_teach():
    judge = Compares()
    manager = make(tags_of=lambda n: {"equal": "yes"}, group_judge=judge, drop_equal_rewards=True)
    groups = manager.collect(3)
    manager.version += 1
    manager.collect(1)

    assert [[one.reward for one in group.trajectories] for group in groups] == [[0.5, 1.5]] * 3
    assert manager.counts.dropped_groups == 0
    assert sorted(judge.asked) == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert len(judge.seeds) == 4
    MADE.remove(manager)
    manager.close()
    assert judge.closed


def test_what_a_group_judge_cannot_judge_is_lost_and_counted():
    tags = {1: {"unclear": "yes"}, 2: {"one unclear": "yes"}}
    manager = make(
        tags_of=lambda n: tags.get(n, {}), group_judge=Compares(), max_error_fraction=1.0
    )
    _, silent, half = manager.collect(3)

    assert [one.error for one in silent.trajectories] == ["group judge: the judge is silent"] * K
    assert [one.error for one in half.trajectories] == ["grm: cut off", None]
    assert manager.counts.errors == 3
    none = trained_segments([silent], version=0, max_token_staleness=None, normalise=False)
    assert none == []


def test_a_judge_that_fails_too_often_stops_the_run():
    manager = make(tags_of=lambda n: {"unclear": "yes"}, group_judge=Compares())
    with pytest.raises(TooManyErrorsError, match=r"rollouts were lost.*the judge is silent"):
        manager.collect(4)
