"""Sub-agents: frozen, with a fresh context, tools and a step budget of their own.

Their rollouts are observations of the orchestrator: nothing in them is trained.

Source: technical report (arXiv:2602.02276), Sec. 3 and App. E.8.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from moonlit.agents.swarm.critical_steps import LOST_STEPS, own_steps
from moonlit.agents.swarm.reward import WORK
from moonlit.agents.tools import Toolset
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message, Text


@runtime_checkable
class SubAgent(Protocol):
    """Does one task and comes back with one message."""

    async def work(self, prompt: list[Message], task: Task, *, seed: int) -> Trajectory:
        """Return the rollout, whatever became of it.

        Args:
            prompt: the sub-agent's system prompt and its task.
            task: what the orchestrator works on: tools may depend on it.
            seed: of this attempt.
        """
        ...


class PolicySubAgent:
    """A sub-agent that a policy plays: an earlier checkpoint, a smaller model, a server.

    Args:
        policy: a ``Conversation`` whose engine nobody trains; ``max_turns`` is the step budget.
        tools: lends the tools of one rollout.
    """

    def __init__(
        self, policy: Any, tools: Callable[[Task], AbstractAsyncContextManager[Toolset]]
    ) -> None:
        self.policy, self.tools = policy, tools

    async def work(self, prompt: list[Message], task: Task, *, seed: int) -> Trajectory:
        """Let the policy answer."""
        async with self.tools(task) as tools:
            reply = await self.policy.reply(prompt, seed=seed, tools=tools)
        useful = sum(
            message.role == "tool" and not says(message).startswith("Error: ")
            for message in reply.messages
        )
        return Trajectory(
            segments=reply.segments(),
            messages=list(reply.messages),
            spans=list(reply.spans),
            stop_reason=reply.stop_reason,
            text=reply.text,
            metrics={WORK: float(useful)},
        )


def says(message: Message) -> str:
    """Return a message's words."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


async def attempt(
    worker: SubAgent,
    prompt: list[Message],
    task: Task,
    *,
    seed: int,
    max_retries: int,
    timeout_s: float | None,
) -> Trajectory:
    """Let a sub-agent try until it answers, each time with a fresh seed.

    A crash, a time-out, a loop that uses up its steps, a context that overflows: each costs this
    sub-agent's result only, and the steps it took.
    """
    lost_steps, retry, last = 0, 0, failed("nobody tried")
    for retry in range(max_retries + 1):
        try:
            async with asyncio.timeout(timeout_s):
                last = await worker.work(prompt, task, seed=seed + retry)
        except Exception as error:  # told to the orchestrator; the rollout goes on
            last = failed(f"{type(error).__name__}: {error}".removesuffix(": "))
        if last.error is None and last.stop_reason == "answer" and last.text.strip():
            break
        if retry < max_retries:
            lost_steps += max(1, own_steps(last))  # a crash has cost at least the step it died in
    if own_steps(last) == 0:  # nothing is left of the last attempt either
        lost_steps += 1
    last.metrics[LOST_STEPS] = float(lost_steps)
    last.metrics["num_retries"] = float(retry)
    return last


def failed(reason: str) -> Trajectory:
    """Return a rollout of which nothing is left."""
    return Trajectory(segments=[], messages=[], spans=[], stop_reason="error", error=reason)
