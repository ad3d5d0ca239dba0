"""PARL's reward: what it pays for, what it does not, and that it fades."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonlit.agents.swarm.reward import ParlReward, r_finish, r_parallel
from moonlit.chat.messages import Message, ToolCall
from tests.swarm.orchestrating import untyped
from tests.swarm.traces import agent, orchestrator, worker

REWARD = ParlReward(parallel_weight=0.1, finish_weight=0.2, annealed_by=0.5, cap=4)


def parts(*children) -> tuple[float, float]:
    swarm = orchestrator(*children)
    return r_parallel(swarm, cap=4), r_finish(swarm)


def test_children_that_work_at_the_same_time_pay_up_to_the_cap():
    assert parts(worker(0), worker(1)) == (0.5, 1.0)
    assert parts(*map(worker, range(4))) == (1.0, 1.0)
    assert parts(*map(worker, range(9))) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("children", "wanted"),
    [
        ([], (0.0, 0.0)),  # nobody delegates
        ([worker(0)], (0.0, 0.0)),  # a lone child splits nothing
        ([worker(n, called_by=n) for n in range(4)], (0.0, 1.0)),  # one after another
        ([worker(n, work=0) for n in range(4)], (0.0, 0.0)),  # trivial children: no call that found
        ([worker(n, task="read page 1") for n in range(4)], (0.0, 0.0)),  # the same task
        ([worker(n, task="Read  PAGE 1" + "!" * n) for n in range(4)], (0.0, 0.0)),
        ([worker(0), *(worker(1, task="read page 1") for _ in range(3))], (0.5, 0.5)),
        ([worker(n, task=" ") for n in range(4)], (0.0, 0.0)),  # no task
        ([worker(n, name="w0") for n in range(4)], (0.0, 0.0)),  # one child does all
        ([worker(0), worker(1), worker(2, error="crashed")], (0.5, 2 / 3)),
        ([worker(0), worker(1), worker(2, stop_reason="turns")], (0.5, 2 / 3)),
        # lost, and done by another one: at the same time, later
        ([worker(0), worker(1, error="lost"), worker(2, task="read page 1")], (0.5, 2 / 3)),
        ([worker(0), worker(1, error="lost"), worker(2, 4, task="read page 1")], (0.0, 2 / 3)),
    ],
)
def test_what_does_not_pay(children, wanted):
    assert parts(*children) == pytest.approx(wanted)


def test_other_words_for_the_same_work_are_one_task():
    """Catches: paraphrases of one task that are paid as many."""
    some = [worker(n, task=f"please read page one, {'really ' * n}") for n in range(3)]
    for child in some:
        child.messages = [
            Message(role="assistant", content="", tool_calls=[ToolCall("open", {"page": 1})])
        ]
    assert parts(*some) == (0.0, 0.0)


def test_creating_without_using_pays_nothing():
    assert REWARD.total(agent(), performance=0.0, progress=0.0) == 0.0


def test_both_weights_fade_to_nothing():
    assert REWARD.lambdas(0.0) == (0.1, 0.2)
    assert REWARD.lambdas(0.25) == pytest.approx((0.05, 0.1))
    assert REWARD.lambdas(0.5) == REWARD.lambdas(1.0) == (0.0, 0.0)


def test_the_total_by_hand():
    swarm = orchestrator(worker(0), worker(1), worker(2, error="crashed"))
    assert REWARD.total(swarm, 0.8, 0.25) == pytest.approx(0.05 * 0.5 + 0.1 * 2 / 3 + 0.8)
    assert REWARD.total(swarm, 0.8, 1.0) == 0.8


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=8))
def test_the_parts_are_shares(children):
    some = [worker(n, called_by=stage, work=int(works)) for n, stage, works in children]
    assert all(0 <= part <= 1 for part in parts(*some))


@pytest.mark.parametrize(
    ("name", "value"),
    [("annealed_by", 0.0), ("parallel_weight", -1.0), ("parallel_weight", float("nan")),
     ("finish_weight", float("inf")), ("finish_weight", "much"), ("annealed_by", "late"),
     ("cap", 0), ("cap", 1), ("cap", -3), ("cap", 2.5)],
)  # fmt: skip
def test_weights_that_make_no_sense_are_refused(name: str, value: object):
    settings = {"parallel_weight": 0.1, "finish_weight": 0.1, "annealed_by": 0.5, "cap": 4}
    with pytest.raises(ValueError, match=rf"reward\.{name}={value!r}: want"):
        untyped(ParlReward, **settings | {name: value})
