"""One task of one sub-agent: its attempts, what they cost, and what is left of it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from moonlit.agents.environment import ContextOverflowError, RunEndingError
from moonlit.agents.swarm.critical_steps import (
    LOST_STEPS,
    LOST_TOTAL_STEPS,
    critical_steps,
    total_steps,
)
from moonlit.agents.swarm.findings import is_garbage
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

FAULTS = (OSError, FloatingPointError, ContextOverflowError)
"""What an attempt may be lost to: files, connections and time-outs, an engine's numbers, a prompt
that does not fit. Whatever else is raised is a fault of ours and no sub-agent's."""


FAILURES = (
    "crash", "timeout", "garbage", "context", "turns", "length", "budget", "cancelled", "other",
)  # fmt: skip
"""Kinds of failures: what a task that has no answer was lost to in its last attempt."""
KIND_OF_ERROR = {
    "TimeoutError": "timeout",
    "ContextOverflowError": "context",
    "garbage": "garbage",
    "budget": "budget",
    "cancelled": "cancelled",
}
"""By what stands before an error's colon; any other is a crash."""


@dataclass(slots=True, eq=False, kw_only=True)
class Assignment:
    """A task on its way.

    Steps are exact at any moment: of attempts that are lost, and of the one at work, whose swarm
    sees its messages as they come.
    """

    agent: str
    prompt: list[Message]
    called_by: int
    """The turn of the agent that assigned it."""
    swarm: Any = None
    """Of the attempt at work (``Swarm``)."""
    child: Trajectory | None = None
    """None until it is finished."""
    lost_steps: int = 0
    """Critical steps of lost attempts ..."""
    lost_total_steps: int = 0
    """... and all their steps."""
    num_attempts: int = 0
    last: Trajectory | None = None
    """What the last attempt returned; None: it was lost."""
    running: asyncio.Task[Any] | None = field(default=None, repr=False)
    cancelled_for: str | None = None

    def begin(self, swarm: Any) -> None:
        """Begin an attempt; what the one before it took is lost."""
        self.lose()
        self.swarm, self.num_attempts = swarm, self.num_attempts + 1

    async def attempt(
        self, worker: Any, task: Task, *, seed: int, timeout_s: float | None
    ) -> Trajectory:
        """Return what a sub-agent does, or names the fault it was lost to.

        Raises:
            RunEndingError: if it wants to end the program.
            TypeError: if it returns no rollout.
        """
        try:
            async with asyncio.timeout(timeout_s):
                done = await worker.work(self.prompt, task, seed=seed, swarm=self.swarm)
        except FAULTS as error:  # told to the orchestrator; the rollout goes on
            return failed(told(error))
        except asyncio.CancelledError as error:
            attempt = asyncio.current_task()
            if attempt is None or attempt.cancelling():
                raise
            return failed(told(error))  # nobody cancelled it: something of its own was
        except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the whole loop
            kind = type(worker).__qualname__
            raise RunEndingError(f"sub-agent {self.agent} ({kind}): {told(error)}") from error
        if not isinstance(done, Trajectory):
            kind = type(worker).__qualname__
            raise TypeError(f"sub-agent {self.agent}: {kind}.work returned {done!r:.100}, "
                            "want a Trajectory")  # fmt: skip
        self.last = done
        if done.error is None and done.stop_reason == "answer" and is_garbage(done.text):
            done.error = "garbage: no word in its answer"
        return done

    def lose(self) -> None:
        """Count the steps of an attempt of which nothing is kept: at least the one it died in."""
        if self.swarm is None:
            return
        total = self.swarm.total_steps if self.last is None else total_steps(self.last)
        self.lost_steps = self.steps_if_lost
        self.lost_total_steps += max(1, total)
        self.swarm = self.last = None

    @property
    def steps_if_lost(self) -> int:
        """Critical steps of lost attempts, if the one at work is lost too."""
        if self.swarm is None:
            return self.lost_steps
        seen = self.last
        return self.lost_steps + max(
            1, self.swarm.critical_steps if seen is None else critical_steps(seen)
        )

    def finish(self, child: Trajectory) -> None:
        """Keep what came of it."""
        if self.last is None or critical_steps(child) == 0:
            self.lose()
        child.agent, child.prompt, child.called_by = self.agent, self.prompt, self.called_by
        child.metrics[LOST_STEPS] = float(self.lost_steps)
        child.metrics[LOST_TOTAL_STEPS] = float(self.lost_total_steps)
        child.metrics["num_retries"] = float(max(0, self.num_attempts - 1))
        self.child, self.swarm, self.last = child, None, None

    @property
    def critical_steps(self) -> int:
        """Critical steps so far, one attempt after another."""
        if self.child is not None:
            return self.lost_steps + critical_steps(self.child)
        return self.lost_steps + (0 if self.swarm is None else self.swarm.critical_steps)

    @property
    def total_steps(self) -> int:
        """Steps of everybody so far."""
        if self.child is not None:
            return self.lost_total_steps + total_steps(self.child)
        return self.lost_total_steps + (0 if self.swarm is None else self.swarm.total_steps)

    # Cancelling one task and all below it

    async def cancellable(self, attempts: Coroutine[Any, Any, Trajectory]) -> Trajectory:
        """Await the attempts; where they alone are cancelled, say what for."""
        self.running = asyncio.ensure_future(attempts)
        try:
            return await self.running
        except asyncio.CancelledError:
            self.running.cancel()
            outer = asyncio.current_task()
            if self.cancelled_for is None or (outer is not None and outer.cancelling()):
                raise
            return failed(f"cancelled: {self.cancelled_for}")
        finally:
            self.running = None

    def cancel(self, reason: str) -> None:
        """End this task and all below it; its agent is told why, and goes on."""
        if self.running is not None:
            self.cancelled_for = reason
            self.running.cancel()


def failure_of(child: Trajectory) -> str | None:
    """Return which kind of failure a sub-agent's rollout ended by; None: it answered."""
    if child.error is not None:
        return KIND_OF_ERROR.get(child.error.partition(":")[0], "crash")
    if child.stop_reason == "answer":
        return None
    return child.stop_reason if child.stop_reason in FAILURES else "other"


def told(error: BaseException) -> str:
    """Say what was raised."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def failed(reason: str) -> Trajectory:
    """Return a rollout of which nothing is left."""
    return Trajectory(segments=[], messages=[], spans=[], stop_reason="error", error=reason)
