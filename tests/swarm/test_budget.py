"""The budget of critical steps: a rollout ends with the turn that uses the last one."""

import asyncio

import pytest

from data_modules.tasks.wide_facts import answer, open_pages
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.batch import Trajectory
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
    told,
)

SERIAL = [calls(("open", f'{{"title": "{name}"}}'), first=n) for n, name in enumerate(NAMES)]
RIGHT = says(answer(TASK.answer))


def rolled_out(*turns: list[int], worker=READER, **limits) -> tuple[Trajectory, int]:
    """The rollout, and how many turns were sampled."""
    engine = Scripted(*turns)
    swarm = environment(worker, **limits).run(TASK, conversation(engine, max_turns=9), seed=3)
    return asyncio.run(swarm), len(engine.requests)


@pytest.mark.parametrize(
    ("budget", "num_turns", "ends", "outcome"),
    [(2, 2, "budget", 0.0), (3, 3, "budget", 0.0), (4, 4, "answer", 1.0)],
)
def test_who_works_alone_is_asked_no_further_once_the_steps_are_used(
    budget: int, num_turns: int, ends: str, outcome: float
):
    done, sampled = rolled_out(*SERIAL, RIGHT, max_critical_steps=budget)
    assert (sampled, done.stop_reason, done.reward) == (num_turns, ends, outcome)
    assert done.metrics["critical_steps"] == budget


@pytest.mark.parametrize(("budget", "ends", "outcome"), [(3, "budget", 0.0), (4, "answer", 1.0)])
def test_what_the_swarm_took_counts_and_its_own_rewards_stay(
    budget: int, ends: str, outcome: float
):
    """One turn and two steps of the slowest reader: with three there is none left to answer."""
    done, sampled = rolled_out(PARALLEL, RIGHT, max_critical_steps=budget)
    assert (sampled, done.stop_reason) == (1 + int(outcome), ends)
    assert done.metrics["performance"] == outcome
    assert done.reward == pytest.approx(0.1 * 1.0 + 0.1 * 1.0 + outcome)


def test_a_turn_may_take_more_than_is_left_and_is_the_last():
    many = calls(*(("open", f'{{"title": "{name}"}}') for name in NAMES))
    done, sampled = rolled_out(many, RIGHT, max_critical_steps=2)
    assert (sampled, done.stop_reason) == (1, "budget")
    assert done.metrics["critical_steps"] == 3


def test_a_sub_agent_ends_where_the_steps_do_and_is_not_tried_again():
    """Four in all, one for the turn: it opens three pages, and nobody asks it for more."""
    pages = Scripted(*SERIAL, says("never"))
    worker = PolicySubAgent(policy=conversation(pages, max_turns=9), toolbox=open_pages)
    turn = calls(creates(0), assigns(0, "all of them"))
    done, sampled = rolled_out(turn, RIGHT, worker=worker, max_critical_steps=4, max_retries=3)

    assert (len(pages.requests), sampled) == (3, 1)
    assert told(done)[-1] == "Error: w0 came to no answer (budget)"
    assert done.metrics["retries"] == 0
    assert done.metrics["critical_steps"] == 4


def test_a_lost_attempt_leaves_the_next_one_fewer_steps():
    """Six in all: 1 for the turn, 2 that are lost; the second attempt may take the 3 left."""

    class Overflows:
        def __init__(self) -> None:
            self.left: list[int] = []

        async def work(self, prompt, task, *, seed, swarm):
            self.left.append(swarm.limits.max_critical_steps)
            done = await READER.work(prompt, task, seed=seed, swarm=swarm)
            done.text, done.stop_reason = "", "context"
            return done

    worker = Overflows()
    turn = calls(creates(0), assigns(0, f"age of {NAMES[0]}"))
    done, _ = rolled_out(turn, says("x"), worker=worker, max_critical_steps=6, max_retries=9)

    assert worker.left == [5, 3, 1]
    assert done.stop_reason == "budget"
    assert done.metrics["critical_steps"] == 1 + 3 * 2
