"""Critical steps against traces counted by hand, and between their bounds."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from moonlit.agents.swarm.assignment import Assignment
from moonlit.agents.swarm.critical_steps import (
    critical_steps,
    own_steps,
    tokens_by_role,
    total_steps,
    widest_stage,
)
from tests.swarm.traces import agent, orchestrator, turn, worker


def test_a_stage_costs_its_slowest_sub_agent():
    """Stage 1: 1 + max(2, 5, 3); stage 2: 1 + 4; the answer: 1."""
    three = [worker(n, called_by=1, steps=steps) for n, steps in enumerate((2, 5, 3))]
    later = worker(3, called_by=5, steps=4)

    swarm = orchestrator(*three, later, turns=3)

    assert critical_steps(swarm) == (1 + 5) + (1 + 4) + 1
    assert total_steps(swarm) == 3 + 2 + 5 + 3 + 4
    assert [child.agent for child in widest_stage(swarm)] == ["w0", "w1", "w2"]


def test_direct_calls_are_steps_one_by_one_however_many_a_turn_makes():
    assert own_steps(agent(turn("open", "open", "search"), turn())) == 4
    assert own_steps(agent(turn("create_subagent", "assign_task", "assign_task"), turn())) == 2
    assert own_steps(agent(turn("open", "assign_task"), turn())) == 3


def test_attempts_that_failed_were_steps_too():
    """The second sub-agent crashed after 3 steps before it needed 2: 5 in its stage."""
    assert critical_steps(orchestrator(worker(0, steps=4), worker(1, steps=2, lost=3))) == 2 + 5
    assert total_steps(orchestrator(worker(0, steps=4), worker(1, steps=2, lost=3))) == 2 + 9


def test_steps_are_exact_while_an_attempt_is_at_work():
    """Two attempts are lost, the second of them in its first turn; the third has taken 2 of 4."""
    one = Assignment(agent="w0", prompt=[], called_by=1)
    for critical, total in ((3, 5), (0, 0), (2, 4)):
        one.begin(SimpleNamespace(critical_steps=critical, total_steps=total))
    assert (one.critical_steps, one.total_steps) == (3 + 1 + 2, 5 + 1 + 4)


def test_a_swarm_in_a_swarm():
    """Inner: 1 + max(3, 1), then 1 to answer: 5. Outer: 1 + max(5, 2), then 1: 7."""
    inner = agent(
        turn("assign_task"), turn(), called_by=1,
        children=[worker(0, steps=3), worker(1, steps=1)],
    )  # fmt: skip
    assert critical_steps(inner) == 5
    assert critical_steps(orchestrator(inner, worker(2, steps=2))) == 7


def test_tokens_by_role():
    assert tokens_by_role(orchestrator(worker(0, steps=3), worker(1, steps=4))) == (2, 7)


def swarms(depth: int):
    children = st.lists(swarms(depth - 1), max_size=4) if depth else st.just([])
    return st.builds(
        lambda steps, below, stage, lost: agent(
            *[turn()] * steps, children=below, called_by=stage, lost=lost
        ),
        st.integers(1, 5), children, st.integers(0, 2), st.integers(0, 3),
    )  # fmt: skip


def longest_chain(swarm) -> int:
    """Steps that must come one after another whatever runs at the same time."""
    below = (longest_chain(child) for child in swarm.children)
    return own_steps(swarm) + max(below, default=0)


@given(swarms(2))
def test_never_more_than_all_steps_never_less_than_the_longest_chain(swarm):
    assert longest_chain(swarm) <= critical_steps(swarm) <= total_steps(swarm)
