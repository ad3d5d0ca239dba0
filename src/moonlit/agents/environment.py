"""What a rollout runs in: an environment lets a policy work on a task, a judge measures the work.

Source: technical report (arXiv:2602.02276), App. D: a core agent loop with pluggable toolset, judge
and prompt variation; every agent task is a coroutine, and may start others.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from moonlit.batch import Task, Trajectory


class VerifierError(RuntimeError):
    """A judge could not tell: its own fault, never the policy's, and never a reward of zero."""


class ContextOverflowError(ValueError):
    """A prompt leaves no room for an answer."""


class RunEndingError(BaseException):
    """What no rollout may be lost to: a part that is set up wrongly, or that ends the program.

    No ``Exception``: whoever counts faults, or tells them to a model, must not take it for one.
    """


@runtime_checkable
class Judge(Protocol):
    """Measures a finished rollout."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return what was measured, by name.

        Raises:
            VerifierError: if it cannot tell.
        """
        ...


@runtime_checkable
class GroupJudge(Protocol):
    """Measures the rollouts of a group against each other, once each has been judged alone."""

    async def judge_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, step: int, seed: int
    ) -> None:
        """Add to every rollout's reward, or name the ``error`` that kept it from being judged.

        Args:
            task: of the group.
            trajectories: the group's; those with an ``error`` are lost already.
            step: version of the policy.
            seed: of all that is drawn.

        Raises:
            VerifierError: if it can tell of none.
        """
        ...

    async def aclose(self) -> None:
        """Let go of what it holds."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Lets a policy work on a task.

    What rollouts share, such as a pool of sandboxes, it lets go in an ``aclose``, if it has one.
    """

    async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
        """Return the rollout, judged.

        Args:
            task: what to do.
            policy: how the policy is talked to (``moonlit.rl.conversation.Conversation``).
            seed: of all that is drawn.
        """
        ...


async def close(part: object) -> None:
    """Let a part of an environment go: call its ``aclose`` if it has one."""
    closing = getattr(part, "aclose", None)
    if closing is not None and inspect.isawaitable(closed := closing()):
        await closed
