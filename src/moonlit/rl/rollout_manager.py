"""Rollouts by the group: coroutines that outlive an iteration, on a loop that runs only inside it.

An iteration asks for so many finished groups of K rollouts. More may be in flight than are asked
for: what is unfinished when the iteration has enough stands still while the policy is trained, and
goes on in the next one with the new weights (partial rollouts; every token carries the version that
sampled it). Nothing is thrown away, so short answers are not favoured: they only come first.

Source: technical report (arXiv:2602.02276), App. D; Kimi k1.5 (arXiv:2501.12599), Sec. 2.6.2. The
numbers are NOT STATED.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moonlit.agents.environment import Environment
from moonlit.batch import Group, Task, Trajectory
from moonlit.rl.conversation import Conversation

Result = TypeVar("Result")
NO_ROLLOUT = "error"
"""Stop reason of a rollout that its environment lost."""


class TooManyErrorsError(RuntimeError):
    """Environments or verifiers fail too often for the rewards to mean anything."""


@dataclass(slots=True)
class Flight:
    """A group on its way."""

    number: int
    began_version: int
    group: Group | None = None
    """None until it is finished."""


@dataclass(slots=True)
class Counts:
    """What happened since the manager was made."""

    rollouts: int = 0
    errors: int = 0
    """Rollouts lost to a fault of environment or verifier, never the policy's."""
    dropped_groups: int = 0
    """Groups whose rewards were all equal, where these are dropped."""


class RolloutManager:
    """Runs environments over groups of K.

    Args:
        task_of: the task of a number, a pure function.
        environment: what a rollout runs in.
        policy: how the policy is talked to; may be replaced between iterations.
        group_size: K.
        num_ahead: groups in flight beyond those an iteration asks for (0: it waits for the last).
        max_staleness: a group is delivered at most so many versions after it began: an iteration
            waits for those that would be older by the next one.
        drop_equal_rewards: a group whose rewards are all equal teaches nothing; ask for another.
        max_drops: of an iteration, for each group it wants; then equal ones are delivered.
        max_error_fraction: of all rollouts; more stop the run.
        timeout_s: of one rollout's running time; None: none.
        seed: of everything sampled.
        rank: of this process among those that roll out ...
        num_ranks: ... which share the numbers out.
    """

    def __init__(
        self,
        *,
        task_of: Callable[[int], Task],
        environment: Environment,
        policy: Conversation,
        group_size: int,
        num_ahead: int = 0,
        max_staleness: int = 0,
        drop_equal_rewards: bool = False,
        max_drops: int = 4,
        max_error_fraction: float = 0.1,
        timeout_s: float | None = None,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"group_size={group_size}: a baseline needs at least 2 rollouts")
        if num_ahead < 0 or max_staleness < 0 or (num_ahead > 0) != (max_staleness > 0):
            raise ValueError(
                f"num_ahead={num_ahead}, max_staleness={max_staleness}: groups that are left in "
                "flight are stale when they come; want both 0, or both above 0"
            )
        if not 0 <= max_error_fraction <= 1:
            raise ValueError(f"max_error_fraction={max_error_fraction}: want it in [0, 1]")
        self.task_of, self.environment, self.policy = task_of, environment, policy
        self.group_size, self.num_ahead, self.max_staleness = group_size, num_ahead, max_staleness
        self.drop_equal_rewards, self.max_drops = drop_equal_rewards, max_drops
        self.max_error_fraction, self.timeout_s, self.seed = max_error_fraction, timeout_s, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.version = 0
        self.counts = Counts()
        self.last_error = ""
        self.fault: BaseException | None = None
        self.redo: list[int] = []
        self.next_number = rank
        self.flights: dict[int, Flight] = {}
        self.finished: dict[int, Flight] = {}  # in the order they finished
        self.running: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.something_finished = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run the loop until a coroutine is done; then everything stands still."""
        try:
            return self.loop.run_until_complete(coroutine)
        finally:
            self.policy.engine.pause()

    def collect(self, num_groups: int) -> list[Group]:
        """Return so many finished groups, or more where older ones may not wait any longer.

        Raises:
            TooManyErrorsError: past ``max_error_fraction``, naming the last error.
        """
        return self.run(self._collect(num_groups))

    async def _collect(self, num_groups: int) -> list[Group]:
        drops_left = self.max_drops * num_groups
        self.fill(num_groups + self.num_ahead)
        while True:
            if self.drop_equal_rewards and drops_left > 0:
                drops_left -= self.drop_finished(drops_left)
                self.fill(num_groups + self.num_ahead)
            if len(self.finished) >= num_groups and not any(map(self.is_overdue, self.unfinished)):
                break
            self.something_finished.clear()
            await self.something_finished.wait()
            if self.fault is not None:
                raise self.fault
            self.refuse_many_errors()
        chosen = self.choose(num_groups)
        for flight in chosen:
            del self.finished[flight.number]
        # In order of their numbers: which one happened to finish first shall not matter.
        chosen.sort(key=lambda flight: flight.number)
        return [flight.group for flight in chosen if flight.group is not None]

    @property
    def unfinished(self) -> list[Flight]:
        """Groups still at work."""
        return list(self.flights.values())

    def is_overdue(self, flight: Flight) -> bool:
        """Whether a group would be too stale if it came with the next version."""
        return self.version - flight.began_version >= self.max_staleness

    def choose(self, num_groups: int) -> list[Flight]:
        """Take all that are overdue, then those that finished first."""
        overdue = [flight for flight in self.finished.values() if self.is_overdue(flight)]
        others = [flight for flight in self.finished.values() if not self.is_overdue(flight)]
        return [*overdue, *others[: max(0, num_groups - len(overdue))]]

    def fill(self, num_groups: int) -> None:
        """Start groups until so many are in flight or finished."""
        while len(self.flights) + len(self.finished) < num_groups:
            number = self.redo.pop(0) if self.redo else self.next_number
            if number == self.next_number:
                self.next_number += self.num_ranks
            flight = self.flights[number] = Flight(number, self.version)
            running = self.loop.create_task(self.fly(flight))
            self.running.add(running)
            running.add_done_callback(self.landed)

    def landed(self, running: asyncio.Task[None]) -> None:
        """Let go of a group's coroutine; a fault of its own, such as a bad task, ends the run."""
        self.running.discard(running)
        if not running.cancelled() and (fault := running.exception()) is not None:
            self.fault = fault
            self.something_finished.set()

    async def fly(self, flight: Flight) -> None:
        """Roll a task out K times."""
        task = self.task_of(flight.number)
        trajectories = await asyncio.gather(
            *(
                self.rollout(task, seed_of(self.seed, flight.number, k))
                for k in range(self.group_size)
            )
        )
        flight.group = Group(task=task, trajectories=list(trajectories))
        self.finished[flight.number] = self.flights.pop(flight.number)
        self.something_finished.set()

    async def rollout(self, task: Task, seed: int) -> Trajectory:
        """Run one environment; its faults are written down, and never a reward of zero."""
        self.counts.rollouts += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.environment.run(task, self.policy, seed=seed)
        except Exception as error:  # counted, named, and past a share it stops the run
            self.counts.errors += 1
            self.last_error = f"{task.environment}: {type(error).__name__}: {error}"
            return Trajectory(
                segments=[], messages=[], spans=[], stop_reason=NO_ROLLOUT, error=self.last_error
            )

    def drop_finished(self, most: int) -> int:
        """Forget finished groups without a difference in reward; return how many."""
        equal = [
            flight.number
            for flight in self.finished.values()
            if flight.group is not None and not teaches(flight.group)
        ][:most]
        for number in equal:
            del self.finished[number]
        self.counts.dropped_groups += len(equal)
        return len(equal)

    def refuse_many_errors(self) -> None:
        """Stop where verifiers or environments fail too often."""
        errors, rollouts = self.counts.errors, self.counts.rollouts
        if errors > max(self.max_error_fraction * rollouts, self.group_size - 1):
            raise TooManyErrorsError(
                f"{errors} of {rollouts} rollouts were lost to environments or verifiers, more than"
                f" max_error_fraction={self.max_error_fraction} allows; the last: {self.last_error}"
            )

    async def evaluate(self, tasks: Sequence[Task], policy: Conversation) -> list[Trajectory]:
        """Run every task once, beside what is in flight."""

        async def one(number: int, task: Task) -> Trajectory:
            try:
                return await self.environment.run(task, policy, seed=number)
            except Exception as error:
                told = f"{task.environment}: {type(error).__name__}: {error}"
                return Trajectory(
                    segments=[], messages=[], spans=[], stop_reason=NO_ROLLOUT, error=told
                )

        return list(await asyncio.gather(*(one(n, task) for n, task in enumerate(tasks))))

    # Resume: numbers, no half rollouts

    def state_dict(self) -> dict[str, Any]:
        """Return which tasks come next, and which had begun and were not delivered."""
        unfinished = sorted([*self.flights, *self.finished, *self.redo])
        return {"next_number": self.next_number, "unfinished": unfinished, "version": self.version}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where so many ranks stopped, on any number of ranks; nothing is left out or twice.

        Args:
            states: of all ranks, in order.
        """
        stride, top = len(states), max(state["next_number"] for state in states)
        missing = {number for state in states for number in state["unfinished"]}
        for state in states:
            missing |= set(range(state["next_number"], top, stride))
        self.version = max(state["version"] for state in states)
        self.redo = sorted(missing)[self.rank :: self.num_ranks]
        self.next_number = top + (self.rank - top) % self.num_ranks

    def close(self) -> None:
        """Cancel what is in flight, close the environment, end the loop."""
        self.loop.run_until_complete(self._close())
        self.loop.close()

    async def _close(self) -> None:
        for running in self.running:
            running.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.environment.aclose()


def teaches(group: Group) -> bool:
    """Whether the rewards of a group differ."""
    rewards = [one.reward for one in group.trajectories if one.error is None]
    return bool(rewards) and max(rewards) > min(rewards)


def seed_of(seed: int, number: int, k: int) -> int:
    """Seed of one rollout: another for every run, task and k."""
    digest = hashlib.sha256(f"{seed}/{number}/{k}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
