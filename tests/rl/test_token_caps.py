"""Caps by the kind of task: answers are cut there, and being cut costs."""

import asyncio
import warnings
from typing import Any

import pytest

from moonlit.agents.tools import Tool, ToolOutput, Toolset
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.rl.dialogue_environment import DialogueEnvironment
from moonlit.rl.rewards.rules import RuleJudge
from moonlit.rl.rollout_manager import RolloutManager
from moonlit.rl.token_caps import TokenCaps
from tests.rl.managers import MADE
from tests.rl.scripted import Scripted, calls, conversation, says


def run(engine: Scripted, caps: TokenCaps, environment: str = "counting") -> Trajectory:
    task = Task(
        prompt=[Message(role="user", content="How many?")], domain="perception",
        environment=environment, answer=4,
    )  # fmt: skip
    rollouts = DialogueEnvironment(judge=RuleJudge(), caps=caps)
    return asyncio.run(rollouts.run(task, conversation(engine), seed=0))


def asked(engine: Scripted) -> list[int]:
    return [request.sampling.max_new_tokens for request in engine.requests]


def test_a_cap_is_that_of_the_tasks_kind():
    caps = TokenCaps(tokens={"counting": 8}, default=20)
    counting, other, uncapped = Scripted(says("4")), Scripted(says("4")), Scripted(says("4"))
    run(counting, caps)
    run(other, caps, "exact")
    run(uncapped, TokenCaps(penalty=1.0))
    assert (asked(counting), asked(other), asked(uncapped)) == ([8], [20], [64])


def test_a_cut_answer_pays_and_a_finished_one_does_not():
    caps = TokenCaps(tokens={"counting": 8}, penalty=0.5)
    cut, whole = run(Scripted(says("4")[:-1]), caps), run(Scripted(says("4")), caps)
    assert (cut.reward, cut.rewards) == (-0.5, {"counting": 0.0, "truncation": -0.5})
    assert (whole.reward, whole.rewards) == (1.0, {"counting": 1.0})


def test_a_cap_holds_over_all_turns():
    """The first turn takes what it takes; the second has only what is left, the third nothing."""
    turn = calls('{"x": 1}', name="look")
    engine = Scripted(turn, turn, turn, says("4"))

    async def look(arguments: dict[str, Any]) -> ToolOutput:
        return ToolOutput(text="seen")

    tool = Tool(name="look", description="Look.", parameters={"type": "object"}, call=look)
    policy = conversation(engine, max_reply_tokens=2 * len(turn))
    prompt = [Message(role="user", content="How many?")]
    reply = asyncio.run(policy.reply(prompt, seed=0, tools=Toolset([tool])))

    assert asked(engine) == [min(64, 2 * len(turn)), len(turn)]
    assert reply.stop_reason == "length"
    assert reply.num_tokens == 2 * len(turn)


def test_a_cap_that_no_task_meets_is_told_of_once_after_an_iteration():
    """Names come with the tasks, so a misspelt one can only be seen when they have come."""
    task = Task(
        prompt=[Message(role="user", content="How many?")], domain="perception",
        environment="counting", answer=4,
    )  # fmt: skip
    manager = RolloutManager(
        task_of=lambda number: task,
        environment=DialogueEnvironment(
            judge=RuleJudge(), caps=TokenCaps(tokens={"countin": 8, "counting": 8})
        ),
        policy=conversation(Scripted(*[says("4")] * 4)),
        group_size=2,
    )
    MADE.append(manager)
    told = r"^caps\.tokens\.countin: no task .* such an environment; there were counting$"
    with pytest.warns(UserWarning, match=told) as warned:
        manager.collect(1)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.collect(1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": {"counting": 0}}, r"caps\.counting=0"),
        ({"default": 0}, r"caps\.default=0"),
        ({"penalty": -0.1}, r"caps\.penalty=-0\.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        TokenCaps(**change)
