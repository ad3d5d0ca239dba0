"""Trees of agents under the rollout manager: partial rollouts, time-outs, many at a time."""

import asyncio
import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from data_modules.tasks.wide_facts import answer, open_pages
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.batch import Trajectory
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.rollout_manager import RolloutManager
from tests.rl.scripted import Scripted, conversation, says
from tests.swarm.orchestrating import READER, TASK, environment
from tests.swarm.test_nesting import LEAD, readers

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "swarm_scale.py"


class Versioned(Scripted):
    """Says a script to each dialogue; holds while it is paused; stamps its version."""

    def __init__(self, *turns: list[int]) -> None:
        super().__init__()
        self.script, self.version, self.going = turns, 0, asyncio.Event()

    def session(self):
        return Turns(self.script)

    async def generate(self, request: Request) -> Completion:
        await self.going.wait()
        ids = request.session.pop(0)
        return Completion(
            token_ids=ids, behavior_logprobs=[-0.5] * len(ids),
            policy_versions=[self.version] * len(ids),
        )  # fmt: skip

    async def update_weights(self, module, version: int) -> None:
        self.version = version

    async def pause(self) -> None:
        self.going.clear()

    async def resume(self) -> None:
        self.going.set()


class Turns(list):
    """A session: the turns that are left."""

    def __enter__(self):
        return self

    def __exit__(self, *ended):
        pass


class SlowReader:
    """Readers of the second task wait for a word; everybody's work is counted."""

    def __init__(self) -> None:
        self.word, self.waiting, self.seen = asyncio.Event(), 0, Counter()

    async def work(self, prompt, task, *, seed, swarm):
        self.seen[task.tags["number"]] += 1
        if task.tags["number"] == "1":
            self.waiting += 1
            await self.word.wait()
        return await READER.work(prompt, task, seed=seed, swarm=swarm)


def numbered(number: int):
    return replace(TASK, tags={"number": str(number)})


def make_manager(reader, **settings) -> RolloutManager:
    """Two rollouts of each task; the orchestrator has a lead, who has three readers."""
    names = [name for name, _ in TASK.answer]
    policy = conversation(Versioned(readers(*names), says(answer(TASK.answer))), max_turns=6)
    policy.engine.going.set()
    below = PolicySubAgent(policy=policy, toolbox=open_pages, delegates=True)
    limits = settings.pop("limits", {})
    return RolloutManager(
        task_of=numbered,
        environment=environment({"w": reader, "lead": below}, max_depth=2, **limits),
        policy=conversation(Versioned(LEAD, says(answer(TASK.answer))), max_turns=6),
        group_size=2,
        **settings,
    )


def collected(reader, **settings) -> list[Trajectory]:
    """The rollouts of one group."""
    manager = make_manager(reader, **settings)
    try:
        (group,) = manager.collect(1)
    finally:
        manager.close()
    return group.trajectories


def test_subtrees_that_are_under_way_go_on_with_the_new_weights():
    """Group 0 is done; group 1 has readers at work two levels down while the policy trains."""
    reader = SlowReader()
    manager = make_manager(reader, num_ahead=1, max_staleness=2)
    try:
        (first,) = manager.collect(1)
        manager.thread.run(asyncio.sleep(0.3))
        assert reader.waiting == 2 * 3  # both rollouts of group 1: nothing of them is lost
        manager.update_weights(nn.Identity())
        manager.thread.call(reader.word.set)
        manager.thread.run(asyncio.sleep(0.3))  # the subtrees end, the orchestrators are held
        (second,) = manager.collect(1)
    finally:
        manager.close()

    assert [group.task.tags["number"] for group in (first, second)] == ["0", "1"]
    assert reader.seen["1"] == 2 * 3  # nobody worked twice
    for one in second.trajectories:
        assert one.rewards["wide_search"] == 1.0
        (below,) = one.children
        assert len(below.children) == 3
        assert one.metrics["critical_steps"] == 6
        (row,) = one.segments
        born = [v for v in row.policy_versions if v >= 0]
        assert (born[0], born[-1]) == (0, 1)  # delegated by the old weights, answered by the new
        assert {v for s in below.segments for v in s.policy_versions} == {-1, 0}


def test_a_subtree_that_times_out_costs_its_own_result_only():
    """The lead's readers never come back: it is given up, and its orchestrator answers."""

    class Never:
        async def work(self, prompt, task, *, seed, swarm):
            await asyncio.Event().wait()

    for one in collected(Never(), limits={"timeout_s": 0.3, "max_retries": 0}):
        assert one.error is None
        assert one.rewards["wide_search"] == 1.0
        assert one.children[0].error is not None or one.children[0].children[0].error is not None


def test_closing_the_manager_cancels_every_subtree():
    ended = []

    class Waits(SlowReader):
        async def work(self, prompt, task, *, seed, swarm):
            try:
                return await super().work(prompt, task, seed=seed, swarm=swarm)
            except asyncio.CancelledError:
                ended.append(prompt[-1].words)
                raise

    reader = Waits()
    manager = make_manager(reader, num_ahead=1, max_staleness=2)
    manager.collect(1)
    manager.thread.run(asyncio.sleep(0.3))
    manager.close()
    assert len(ended) == reader.waiting == 6


class Raises:
    """A reader with whom something is wrong that is no ``Exception``."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    async def work(self, prompt, task, *, seed, swarm):
        await asyncio.sleep(0)
        raise self.error("broken")


def test_a_sub_agent_that_something_of_its_own_cancelled_is_lost_like_by_a_fault():
    for one in collected(Raises(asyncio.CancelledError)):
        assert one.error is None
        assert [c.error for c in one.children[0].children] == ["CancelledError: broken"] * 3


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_sub_agent_that_wants_to_end_the_program_ends_the_run(error: type[BaseException]):
    """By an error that names it; the manager is closed as ever."""
    manager = make_manager(Raises(error))
    try:
        with pytest.raises(RuntimeError, match=rf"sub-agent w.* \(Raises\): {error.__name__}"):
            manager.collect(1)
    finally:
        manager.close()


def test_whatever_wants_to_end_the_program_on_the_loop_does_not_hang_who_waits():
    manager = make_manager(READER)

    async def leaves() -> None:
        raise SystemExit(3)

    try:
        with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
            manager.thread.run(leaves())
        (group,) = manager.collect(1)
        assert len(group.trajectories) == 2
    finally:
        manager.close()


@pytest.fixture
def scale():
    spec = importlib.util.spec_from_file_location("swarm_scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["swarm_scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_holds_as_many_agents_as_it_says(scale):
    """Its gate opens only once every reader of every tree is under way, and all trees finish."""
    measured = scale.measure(2 * scale.AGENTS_PER_GROUP)
    assert scale.AGENTS_PER_GROUP == 100
    assert measured["size"] == 200
    assert 0 < measured["start_s"] < measured["total_s"]
