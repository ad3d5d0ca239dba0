"""The standard environment: how a task is put, and what its judge's rewards add up to."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.rl.dialogue_environment import DialogueEnvironment
from tests.rl.scripted import TOKENIZER, Scripted, conversation, says

TASK = Task(
    prompt=[Message(role="user", content="How many?")],
    domain="perception",
    environment="counting",
    answer=4,
)


class Twofold:
    """Measures two things."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        return {"right": 1.0, "short": 0.5}


def run(
    engine: Scripted, seed: int = 0, weights: Mapping[str, float] | None = None, **parts: object
) -> Trajectory:
    environment = DialogueEnvironment(judge=Twofold(), reward_weights=weights, **parts)
    return asyncio.run(environment.run(TASK, conversation(engine), seed=seed))


def test_rewards_add_up_by_their_weights():
    assert run(Scripted(says("4"))).reward == 1.5
    weighted = run(Scripted(says("4")), weights={"right": 2.0, "short": 0.2})
    assert weighted.reward == pytest.approx(2.1)
    assert weighted.rewards == {"right": 1.0, "short": 0.5}
    with pytest.raises(ValueError, match=r"no weight for \['short'\]"):
        run(Scripted(says("4")), weights={"right": 1.0})


def test_a_task_is_put_as_its_variation_says_by_the_rollouts_seed():
    def varied(task: Task, seed: int) -> Sequence[Message]:
        return [Message(role="system", content=f"Way {seed}."), *task.prompt]

    engine = Scripted(says("4"))
    trajectory = run(engine, seed=7, variation=varied)
    plain = run(Scripted(says("4")))

    assert "Way 7." in TOKENIZER.decode(list(engine.requests[0].input_ids))
    assert [message.role for message in trajectory.prompt or ()] == ["system", "user"]
    assert plain.prompt is None
