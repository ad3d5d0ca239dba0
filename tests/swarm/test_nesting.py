"""Sub-agents of sub-agents: how deep, how many, and how long they took, to the step."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from data_modules.tasks.wide_facts import answer, open_pages
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.swarm.critical_steps import critical_steps, total_steps
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.agents.swarm.swarm import Swarm
from moonlit.agents.toolbox import Toolboxes
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.library import Library, Page
from moonlit.batch import Trajectory
from moonlit.chat.messages import Message
from moonlit.rl.dialogue_environment import SandboxToolbox
from tests.rl.scripted import Scripted, conversation, says
from tests.swarm.orchestrating import (
    NAMES,
    READER,
    TASK,
    assigns,
    calls,
    creates,
    environment,
    run,
    told,
    untyped,
)

LEAD = calls(
    ("create_subagent", '{"name": "lead", "system_prompt": "split"}'),
    ("assign_task", '{"agent": "lead", "prompt": "ages"}'),
)


def lead(*turns: list[int]) -> PolicySubAgent:
    policy = conversation(Scripted(*turns), max_turns=6)
    return PolicySubAgent(policy=policy, toolbox=open_pages, delegates=True)


def readers(*names: str, first: int = 0) -> list[int]:
    numbers = range(first, first + len(names))
    made = [creates(n) for n in numbers]
    given = [assigns(n, f"age of {name}") for n, name in zip(numbers, names, strict=True)]
    return calls(*made, *given)


def nested(**settings) -> Trajectory:
    """The orchestrator has a lead, who has two readers in one turn and then one more."""
    below = lead(readers(*NAMES[:2]), readers(NAMES[2], first=2), says(answer(TASK.answer)))
    workers = {"w": READER, "lead": below}
    return run(LEAD, says(answer(TASK.answer)), worker=workers, max_depth=2, **settings)


def test_a_sub_agent_has_sub_agents_and_its_steps_are_counted_to_the_last():
    """Lead: (1 + max(2, 2)) + (1 + 2) + 1 = 7. Orchestrator: (1 + 7) + 1 = 9. All: 2 + 3 + 6."""
    swarm = nested()

    (below,) = swarm.children
    assert [child.agent for child in below.children] == ["w0", "w1", "w2"]
    assert [child.called_by for child in below.children] == [2, 2, 7]
    assert critical_steps(below) == 7
    assert below.metrics["num_useful_calls"] == 3  # readers that worked; creating them is no work
    assert swarm.metrics["critical_steps"] == critical_steps(swarm) == 9
    assert swarm.metrics["total_steps"] == total_steps(swarm) == 11
    assert swarm.rewards["wide_search"] == 1.0


def test_who_was_used_and_tried_again_is_counted_at_every_depth():
    """The lead's first reader is lost once; lead and three readers were created and used."""

    class LostOnce:
        seen = 0

        async def work(self, prompt, task, *, seed, swarm):
            self.seen += 1
            if self.seen == 1:
                raise ConnectionError("gone")
            return await READER.work(prompt, task, seed=seed, swarm=swarm)

    below = lead(readers(*NAMES), says("12"))
    swarm = run(LEAD, says("x"), worker={"w": LostOnce(), "lead": below}, max_depth=2)
    names = ("agents_created", "agents_used", "tasks_assigned", "retries")
    assert [swarm.metrics[name] for name in names] == [4, 4, 4, 1]


def test_what_sub_agents_disagree_about_is_no_work_of_who_is_told_so():
    """Catches: a lead of trivial sub-agents that is paid for having done something."""

    class Guesses:
        async def work(self, prompt, task, *, seed, swarm):
            text = f"age: {swarm.agent}"
            return Trajectory(
                segments=[], messages=[Message(role="assistant", content=text)], spans=[],
                stop_reason="answer", text=text,
            )  # fmt: skip

    below = lead(readers(*NAMES[:2]), says("12"))
    swarm = run(LEAD, says("x"), worker={"w": Guesses(), "lead": below}, max_depth=2)
    (child,) = swarm.children
    assert child.messages[-2].name == "conflicts"
    assert child.metrics["num_useful_calls"] == 0


def test_deeper_than_configured_is_a_tool_error():
    """At depth 1 the lead is told so, whatever tools it names, and goes on."""
    below = lead(readers(NAMES[0]), says("12"))
    swarm = run(LEAD, says("x"), worker={"w": READER, "lead": below}, max_depth=1)

    (child,) = swarm.children
    assert told(child) == ["Error: sub-agents may be nested 1 deep: do it yourself"] * 2
    assert (child.text, child.children) == ("12", [])
    assert child.metrics["num_useful_calls"] == 0


def test_recursion_without_an_end_is_bounded():
    """A lead whose every turn creates another lead: all depths together have five agents."""

    class Endless:
        async def work(self, prompt, task, *, seed, swarm):
            outputs = []
            for n in range(4):
                made = await swarm.create({"name": f"w{n}", "system_prompt": "split"})
                given = await swarm.assign({"agent": f"w{n}", "prompt": f"part {n}"})
                outputs += [made.error or "", given.error or ""]
            return Trajectory(
                segments=[], messages=[Message(role="assistant", content="done")], spans=[],
                stop_reason="answer", text="; ".join(outputs) + "done",
            )  # fmt: skip

    swarm = run(readers("x"), says("x"), worker=Endless(), max_depth=50, max_agents=5)

    assert swarm.metrics["agents_created"] == 5
    assert swarm.metrics["tasks_assigned"] == 5
    assert swarm.stop_reason == "answer"


def test_what_is_below_may_take_the_steps_that_are_left():
    """Seven in all: one turn is taken, so the lead has six; its readers need three each time."""
    swarm = nested(max_critical_steps=7)
    (below,) = swarm.children
    assert told(below)[-1].startswith("w2: ")  # 1 + 2 + 1 are used: there are some left
    tight = nested(max_critical_steps=5)
    assert told(tight.children[0])[-1] == "Error: the 4 critical steps are used"


class Dies:
    """Has two readers, then is lost at its first ``times`` attempts, one way or another."""

    def __init__(self, way: str, times: int) -> None:
        self.way, self.times, self.seen = way, times, 0

    async def work(self, prompt, task, *, seed, swarm):
        self.seen += 1
        if self.seen > self.times:
            return await READER.work(
                [Message(role="user", content=NAMES[0])], task, seed=seed, swarm=swarm
            )
        policy = conversation(Scripted(readers(*NAMES[:2]), says("never")), max_turns=6)
        tools = Toolset(swarm.tools)
        seen = swarm.watch

        def watch(message: Message) -> None:
            seen(message)
            if message.role == "assistant" and not message.tool_calls:
                raise ConnectionError("gone")

        if self.way == "crash":
            await policy.reply(prompt, seed=seed, tools=tools, watch=watch)
        await policy.reply(prompt, seed=seed, tools=tools, watch=seen)
        await asyncio.Event().wait()
        raise AssertionError("never")


@pytest.mark.parametrize("way", ["crash", "hang"])
def test_steps_of_nested_sub_agents_of_a_lost_attempt_count(way: str):
    """The lost attempt: 1 + max(2, 2) + 1 = 4, 6 in all; then a reader's 2."""
    workers = {"w": READER, "lead": Dies(way, 1)}
    swarm = run(LEAD, says("x"), worker=workers, max_depth=2, timeout_s=2.0, max_retries=1)

    (child,) = swarm.children
    assert child.metrics["lost_steps"] == 4
    assert child.metrics["lost_total_steps"] == 6
    assert swarm.metrics["critical_steps"] == (1 + 4 + 2) + 1
    assert swarm.metrics["total_steps"] == 2 + 6 + 2
    assert swarm.metrics["retries"] == 1


def test_one_subtree_can_be_cancelled_and_its_siblings_go_on():
    """The second lead hangs with a reader done below it; it is cancelled, and costs its steps."""
    swarms = []

    class Keeps(Dies):
        async def work(self, prompt, task, *, seed, swarm):
            swarms.append(swarm)
            return await super().work(prompt, task, seed=seed, swarm=swarm)

    async def both() -> Swarm:
        workers = {"w": READER, "lead": Keeps("hang", 9)}
        limits = SwarmLimits(max_depth=2)
        swarm = Swarm(workers, TASK, limits=limits, num_prompt=1, seed=0)
        for name in ("w0", "lead"):
            await swarm.create({"name": name, "system_prompt": "s"})
        reading = asyncio.ensure_future(swarm.assign({"agent": "w0", "prompt": NAMES[0]}))
        leading = asyncio.ensure_future(swarm.assign({"agent": "lead", "prompt": "p"}))
        while not (swarms and swarms[0].critical_steps == 4):
            await asyncio.sleep(0.01)
        swarm.assignments[1].cancel("no longer needed")
        assert (await reading).error is None
        assert (await leading).error == "lead failed: cancelled: no longer needed"
        return swarm

    swarm = asyncio.run(both())
    assert [child.metrics["lost_steps"] for child in swarm.children] == [0, 4]
    assert swarm.critical_steps == 4
    assert swarm.total_steps == 2 + 6


def test_cancelling_a_rollout_ends_everything_below():
    """Catches: sub-agents that go on without their orchestrator."""
    ended = []

    class Waits:
        async def work(self, prompt, task, *, seed, swarm):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(prompt[-1].words)

    async def cancelled() -> None:
        policy = conversation(Scripted(readers(*NAMES)), max_turns=6)
        rollout = asyncio.ensure_future(environment(Waits()).run(TASK, policy, seed=0))
        await asyncio.sleep(0.3)
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout

    asyncio.run(cancelled())
    assert ended == [f"age of {name}" for name in NAMES]


def test_a_bug_of_ours_is_no_fault_of_a_sub_agent():
    """It ends the rollout, once the siblings of its turn are done, at whatever depth it was."""
    done = []

    class Buggy:
        async def work(self, prompt, task, *, seed, swarm):
            if NAMES[1] in prompt[-1].words:
                raise KeyError("ours")
            await asyncio.sleep(0.05)
            done.append(prompt[-1].words)
            return await READER.work(prompt, task, seed=seed, swarm=swarm)

    with pytest.raises(KeyError, match="ours"):
        run(readers(*NAMES), says("x"), worker=Buggy())
    assert len(done) == 2

    below = lead(readers(*NAMES), says("x"))
    with pytest.raises(KeyError, match="ours"):
        run(LEAD, says("x"), worker={"w": Buggy(), "lead": below}, max_depth=2)


def test_the_orchestrator_has_its_own_tools_beside_the_swarms():
    """``search``, ``open`` and ``ipython`` answer in the same turn as a sub-agent does."""
    library = Library([Page(name, f"{name} {age}") for name, age in TASK.answer])

    def box(task):
        return lent(library)

    sandboxes = SandboxToolbox(Pool(num_warm=1))
    toolbox = Toolboxes(boxes={"library": box, "sandbox": sandboxes})
    turn = calls(
        creates(0), assigns(0, f"age of {NAMES[0]}"),
        ("search", f'{{"query": "{NAMES[1]}"}}'), ("open", f'{{"title": "{NAMES[2]}"}}'),
        ("ipython", '{"code": "6 * 7"}'),
    )  # fmt: skip

    async def rollout() -> Trajectory:
        swarm = environment(toolbox=toolbox)
        policy = conversation(Scripted(turn, says(answer(TASK.answer))), max_turns=6)
        done = await swarm.run(TASK, policy, seed=3)
        await swarm.aclose()
        return done

    done = asyncio.run(rollout())
    assert [NAMES[1] in told(done)[2], told(done)[3]] == [True, f"{NAMES[2]} {TASK.answer[2][1]}"]
    assert "42" in told(done)[4]
    assert done.metrics["critical_steps"] == (3 + 1) + 2 + 1
    assert not sandboxes.is_open


@asynccontextmanager
async def lent(library: Library):
    yield Toolset(library.tools())


def test_a_sandbox_toolbox_serves_one_event_loop_after_another():
    """Catches: a validation after training that loses rollouts to a lock of the loop before."""
    box = SandboxToolbox(Pool(num_warm=1))

    async def opened() -> None:
        async with box(TASK):
            pass

    async def at_the_same_time() -> None:
        await asyncio.gather(*(opened() for _ in range(3)))
        await box.aclose()

    for _ in range(2):
        asyncio.run(at_the_same_time())


def test_two_boxes_with_one_tool_are_refused():
    async def open_both() -> None:
        async with Toolboxes(boxes={"a": open_pages, "b": open_pages})(TASK):
            pass

    with pytest.raises(ValueError, match="two have one name"):
        asyncio.run(open_both())


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_depth", 0), ("max_depth", "two"), ("max_retries", -1), ("max_agents", 0),
     ("max_agents", 2.5), ("max_agents", "many"), ("max_agents", True), ("max_assignments", -1),
     ("max_critical_steps", 0), ("max_critical_steps", -9), ("max_result_chars", 0),
     ("timeout_s", 0.0), ("timeout_s", "soon"), ("timeout_s", float("nan"))],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(name: str, value: object):
    with pytest.raises(ValueError, match=rf"limits\.{name}={value!r}: want a"):
        untyped(SwarmLimits, **{name: value})
