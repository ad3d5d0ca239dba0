"""Faults on purpose: as often as told, each at the cost of its own result only."""

import asyncio
from collections import Counter

import pytest

from data_modules.tasks.wide_facts import WideFacts, answer, open_pages
from moonlit.agents.swarm.assignment import FAILURES, failure_of
from moonlit.agents.swarm.faults import DeadAgents, FaultRates, Faulty, UnlikeAgents
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.batch import Trajectory
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.remote import EngineServerError
from tests.rl.scripted import Scripted, conversation, says
from tests.swarm.orchestrating import (
    NAMES,
    PARALLEL,
    READER,
    TASK,
    assigns,
    calls,
    creates,
    environment,
    found,
    run,
    told,
)

EACH = FaultRates(crash=0.1, hang=0.1, loop=0.1, overflow=0.1, garbage=0.1)
WORDS = {
    "crash": "ConnectionError",
    "hang": "TimeoutError",
    "loop": "came to no answer (turns)",
    "overflow": "came to no answer (context)",
    "garbage": "garbage",
}


KINDS = {"crash": "crash", "hang": "timeout", "loop": "turns", "overflow": "context",
         "garbage": "garbage"}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "stop_reason", "kind"),
    [(None, "answer", None), (None, "budget", "budget"), (None, "length", "length"),
     (None, "stop of its own", "other"), ("cancelled: too slow", "error", "cancelled"),
     ("ContextOverflowError: the prompt has", "error", "context"), ("KeyError", "error", "crash")],
)  # fmt: skip
def test_a_failure_is_of_one_kind(error: str | None, stop_reason: str, kind: str | None):
    child = Trajectory(segments=[], messages=[], spans=[], stop_reason=stop_reason, error=error)
    assert failure_of(child) == kind


@pytest.mark.parametrize("fault", WORDS)
def test_each_fault_costs_its_own_result_and_the_orchestrator_is_told(fault: str):
    """The second sub-agent has the fault at every attempt, its siblings never."""

    class Second:
        def __init__(self) -> None:
            self.faulty = Faulty(READER, FaultRates(**{fault: 1.0}))

        async def work(self, prompt, task, *, seed, swarm):
            worker = self.faulty if NAMES[1] in prompt[-1].words else READER
            return await worker.work(prompt, task, seed=seed, swarm=swarm)

    swarm = run(PARALLEL, says("x"), worker=Second(), max_retries=2, timeout_s=0.2)

    assert told(swarm)[3] == found(0)
    assert WORDS[fault] in told(swarm)[4]
    assert told(swarm)[4].startswith("Error: w1 ")
    assert told(swarm)[5] == found(2)
    assert swarm.metrics["retries"] == 2
    failed = {kind: swarm.metrics[f"failed_{kind}"] for kind in FAILURES}
    assert {kind for kind, share in failed.items() if share} == {KINDS[fault]}
    assert sum(failed.values()) == pytest.approx(1 / 3)
    assert swarm.rewards["finish"] == pytest.approx(2 / 3)
    assert (swarm.stop_reason, swarm.error) == ("answer", None)


def test_a_loop_costs_what_it_did_again_and_again():
    swarm = run(PARALLEL, says("x"), worker=Faulty(READER, FaultRates(loop=1.0)), max_retries=1)
    assert swarm.metrics["critical_steps"] == 1 + 2 * (3 * 2) + 1


def test_faults_come_as_often_as_told_and_are_the_seeds():
    drawn = Counter(EACH.draw(seed) for seed in range(4000))
    assert all(340 < drawn[fault] < 460 for fault in WORDS)
    assert drawn[None] == 4000 - sum(drawn[fault] for fault in WORDS)
    assert [EACH.draw(seed) for seed in range(99)] == [EACH.draw(seed) for seed in range(99)]
    assert FaultRates().draw(3) is None


def test_a_swarm_with_a_tenth_of_each_fault_gets_through_by_retrying():
    """64 rollouts of three sub-agents: half of the attempts fail, one assignment in 16 does."""

    async def all_of_them():
        swarm = environment(faults=EACH, max_retries=3, timeout_s=0.5)
        return await asyncio.gather(
            *(
                swarm.run(TASK, conversation(Scripted(PARALLEL, says(answer(TASK.answer)))), seed=n)
                for n in range(64)
            )
        )

    rollouts = asyncio.run(all_of_them())
    assert all(one.error is None and one.stop_reason == "answer" for one in rollouts)
    finished = sum(one.metrics["finish_rate"] for one in rollouts) / 64
    assert 0.85 < finished < 0.99
    assert 1.5 < sum(one.metrics["retries"] for one in rollouts) / 64 < 4.5


def test_shares_above_one_and_a_hang_without_an_end_are_refused():
    with pytest.raises(ValueError, match="at most 1 together"):
        FaultRates(crash=0.6, loop=0.6)
    with pytest.raises(ValueError, match=r"faults\.hang=0\.1"):
        environment(faults=EACH)


class Gone(Scripted):
    """An engine server that goes away after one turn."""

    async def generate(self, request):
        if self.requests:
            raise EngineServerError("engine server http://10.0.0.1:18500: refused")
        return await super().generate(request)


def test_a_server_that_goes_away_and_a_prompt_that_does_not_fit_are_faults():
    first = calls(("open", f'{{"title": "{NAMES[0]}"}}'))

    def told_of(policy: Conversation, prompt: str):
        worker = PolicySubAgent(policy=policy, toolbox=open_pages)
        turn = calls(creates(0), assigns(0, prompt))
        return run(turn, says("x"), worker=worker, max_retries=0)

    gone = told_of(conversation(Gone(first)), "p")
    assert "EngineServerError: engine server http://10.0.0.1" in told(gone)[1]
    assert gone.children[0].metrics["lost_steps"] == 1
    full = told_of(conversation(Scripted(first), max_positions=200), "far too long " * 200)
    assert "ContextOverflowError: the prompt has" in told(full)[1]
    assert full.metrics["critical_steps"] == 1 + 1 + 1


def test_a_dead_agent_loses_all_that_it_is_assigned_and_another_one_does_it():
    """Also what it is assigned later, whatever the seed; at another task somebody else is dead."""
    dead = DeadAgents(READER, names=["w1"], share=1.0)
    again = calls(*(assigns(n, f"age of {NAMES[1]}") for n in (1, 2)), first=6)
    swarm = run(PARALLEL, again, says("x"), worker=dead, max_retries=1)

    lost = "Error: w1 failed: ConnectionError: w1 is dead (on purpose)"
    assert told(swarm)[3:6] == [found(0), lost, found(2)]
    assert told(swarm)[6:] == [lost, found(1).replace("w1", "w2")]
    everybody = DeadAgents(READER, names=["w1", "w2"], share=0.5)
    tasks = [WideFacts(seed=0, min_people=3, max_people=3)("train", n) for n in range(300)]
    drawn = Counter(map(everybody.dead_at, tasks))
    assert drawn[None] == pytest.approx(150, abs=40)
    assert min(drawn["w1"], drawn["w2"]) > 40
    for wrong in ({"names": [], "share": 0.5}, {"names": ["w1"], "share": 1.5}):
        with pytest.raises(ValueError, match="a share in"):
            DeadAgents(READER, **wrong)


def test_unlike_agents_are_lost_as_often_as_their_names_say():
    """A retry may come through; who has no name there is never lost."""
    swarm = run(PARALLEL, says("x"), worker=UnlikeAgents(READER, success={"w1": 0.0}))
    assert told(swarm)[3] == found(0)
    assert told(swarm)[4].startswith("Error: w1 failed: ConnectionError: w1 was lost")
    assert told(swarm)[5] == found(2)

    unlike = UnlikeAgents(READER, success={"w1": 0.3})
    tried = [
        run(PARALLEL, says("x"), worker=unlike, seed=seed, max_retries=0) for seed in range(200)
    ]
    assert sum(told(one)[4] == found(1) for one in tried) == pytest.approx(60, abs=25)
    with pytest.raises(ValueError, match="w2"):
        UnlikeAgents(READER, success={"w1": 1.0, "w2": 1.5})
