"""Faults on purpose: sub-agents that are lost as often as told, for experiments."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from moonlit.agents.environment import close
from moonlit.agents.swarm.swarm import SubAgent, Swarm
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

GARBAGE = "\ufffd" * 40


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """Shares of attempts, each in [0, 1], all together at most 1.

    Args:
        crash: its connection is lost.
        hang: it never comes back: wants a time-out.
        loop: it does the same again and again until its turns are used up.
        overflow: its context is full before it answers.
        garbage: it answers with what are no words.

    Raises:
        ValueError: if they are no shares.
    """

    crash: float = 0.0
    hang: float = 0.0
    loop: float = 0.0
    overflow: float = 0.0
    garbage: float = 0.0

    def __post_init__(self) -> None:
        shares = self.shares
        if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"faults={shares}: want shares of at most 1 together")

    @property
    def shares(self) -> dict[str, float]:
        """The rates by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def draw(self, seed: int) -> str | None:
        """Return the fault of an attempt; None: it has none."""
        left = random.Random(f"fault/{seed}").random()
        for name, share in self.shares.items():
            if (left := left - share) < 0:
                return name
        return None


class Faulty:
    """A sub-agent with faults, drawn from the seed of every attempt.

    Args:
        worker: which does the work otherwise.
        rates: of the faults.
    """

    def __init__(self, worker: SubAgent, rates: FaultRates) -> None:
        self.worker, self.rates = worker, rates

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: Swarm
    ) -> Trajectory:
        """Do the work, or what is left of it.

        Raises:
            ConnectionError: as a crash.
        """
        fault = self.rates.draw(seed)
        if fault == "crash":
            raise ConnectionError("the sub-agent was lost (on purpose)")
        if fault == "hang":
            await asyncio.Event().wait()
        done = await self.worker.work(prompt, task, seed=seed, swarm=swarm)
        if fault == "loop":
            done.messages, done.spans = done.messages * 3, done.spans * 3
        if fault in ("loop", "overflow"):
            done.stop_reason, done.text = {"loop": "turns", "overflow": "context"}[fault], ""
        if fault == "garbage":
            done.text = GARBAGE
        return done

    async def aclose(self) -> None:
        """Let the worker go."""
        await close(self.worker)


class DeadAgents:
    """Sub-agents one of whom is dead at a share of the tasks: all that it is assigned is lost.

    Args:
        worker: which does the work otherwise.
        names: of the agents; who of them is dead, and at which tasks, follows from a task's words.
        share: of the tasks, in [0, 1].

    Raises:
        ValueError: if the share is none, or there is no name.
    """

    def __init__(self, worker: SubAgent, *, names: Sequence[str], share: float) -> None:
        if not 0 <= share <= 1 or not names:
            raise ValueError(f"names={list(names)}, share={share}: want a name, a share in [0, 1]")
        self.worker, self.names, self.share = worker, tuple(names), share

    def dead_at(self, task: Task) -> str | None:
        """Return who is dead at a task; None: nobody."""
        draw = random.Random(f"dead/{task.prompt[-1].words}")
        return draw.choice(self.names) if draw.random() < self.share else None

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: Swarm
    ) -> Trajectory:
        """Do the work.

        Raises:
            ConnectionError: if it is dead.
        """
        if swarm.agent == self.dead_at(task):
            raise ConnectionError(f"{swarm.agent} is dead (on purpose)")
        return await self.worker.work(prompt, task, seed=seed, swarm=swarm)

    async def aclose(self) -> None:
        """Let the worker go."""
        await close(self.worker)


class UnlikeAgents:
    """Sub-agents that are not equally good: whoever's name is here is lost as often as it says.

    Args:
        worker: which does the work.
        success: by an agent's name, the share of its attempts that are not lost, in [0, 1]; 1 where
            a name is missing.

    Raises:
        ValueError: if a share is none.
    """

    def __init__(self, worker: SubAgent, *, success: Mapping[str, float]) -> None:
        if bad := {name: share for name, share in success.items() if not 0 <= share <= 1}:
            raise ValueError(f"success={bad}: want shares in [0, 1]")
        self.worker, self.success = worker, dict(success)

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: Swarm
    ) -> Trajectory:
        """Do the work.

        Raises:
            ConnectionError: as often as the agent is lost.
        """
        draw = random.Random(f"success/{seed}").random()
        if draw >= self.success.get(swarm.agent, 1.0):
            raise ConnectionError(f"{swarm.agent} was lost (on purpose)")
        return await self.worker.work(prompt, task, seed=seed, swarm=swarm)

    async def aclose(self) -> None:
        """Let the worker go."""
        await close(self.worker)
