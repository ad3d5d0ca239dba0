"""Rollouts by the group: coroutines that outlive an iteration (partial rollouts).

An iteration asks for so many finished groups of K rollouts. More may be in flight than are asked
for: what is unfinished when the iteration has enough is held while the policy is trained, and goes
on in the next one with the new weights; every token carries the version that sampled it. Nothing is
thrown away, so short answers are not favoured: they only come first.

The event loop has a thread of its own: while the policy is trained no token is sampled, but tools,
sandboxes and judges go on, and their time limits mean what they say.

Source: technical report (arXiv:2602.02276), App. D; Kimi k1.5 (arXiv:2501.12599), Sec. 2.6.2. The
numbers are NOT STATED.
"""

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from moonlit.agents.environment import Environment, GroupJudge, VerifierError, close
from moonlit.batch import Group, Task, Trajectory
from moonlit.rl.conversation import Conversation
from moonlit.rl.loop_thread import LoopThread
from moonlit.rl.rollout_limits import TimeLimits, TokenBudget
from moonlit.rl.task_order import InOrder, Outcome, TaskOrder, pass_rate

Result = TypeVar("Result")
LOST = "error"
"""Stop reason of a rollout that its environment lost."""


class TooManyErrorsError(RuntimeError):
    """Environments or verifiers fail too often for the rewards to mean anything."""


@dataclass(slots=True, eq=False)
class Flight:
    """A group on its way."""

    number: int
    task_number: int
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
        task_order: which task a group works on; None: task after task.
        environment: what a rollout runs in.
        group_judge: compares the rollouts of a group; None: each is worth what it earned alone.
        policy: how the policy is talked to; may be replaced between iterations.
        group_size: K.
        num_ahead: groups in flight beyond those an iteration asks for (0: it waits for the last).
        max_staleness: a group is delivered at most so many versions after it began: an iteration
            waits for those that would be older by the next one.
        max_iteration_tokens: an iteration that has sampled so many ends with what is finished, if
            anything is; None: it ends with the groups it asked for.
        drop_equal_rewards: a group whose rewards are all equal teaches nothing; ask for another.
        max_drops: of an iteration, for each group it wants; then equal ones are delivered.
        max_error_fraction: of all rollouts; more stop the run.
        timeout_s: of one rollout, the time it is held not counted; None: none.
        seed: of everything sampled.
        rank: of this process among those that roll out ...
        num_ranks: ... which share the numbers out.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(
        self,
        *,
        task_of: Callable[[int], Task],
        task_order: TaskOrder | None = None,
        environment: Environment,
        group_judge: GroupJudge | None = None,
        policy: Conversation,
        group_size: int,
        num_ahead: int = 0,
        max_staleness: int = 0,
        max_iteration_tokens: int | None = None,
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
        if min(num_ahead, max_staleness) < 0 or (num_ahead > 0 and max_staleness == 0):
            raise ValueError(
                f"num_ahead={num_ahead}, max_staleness={max_staleness}: groups that are left in "
                "flight are stale when they come; want a max_staleness of at least 1 with them"
            )
        if max_iteration_tokens is not None and (max_iteration_tokens < 1 or max_staleness == 0):
            raise ValueError(
                f"max_iteration_tokens={max_iteration_tokens}, max_staleness={max_staleness}: what "
                "a budget cuts off goes on later; want both at least 1"
            )
        if not 0 <= max_error_fraction <= 1:
            raise ValueError(f"max_error_fraction={max_error_fraction}: want it in [0, 1]")
        self.task_of, self.environment, self.policy = task_of, environment, policy
        self.task_order = task_order or InOrder()
        self.outcomes: list[Outcome] = []  # since they were taken
        self.begun_tasks: dict[int, int] = {}  # of groups that a checkpoint left unfinished
        self.group_judge = group_judge
        self.group_size, self.num_ahead, self.max_staleness = group_size, num_ahead, max_staleness
        self.max_iteration_tokens = max_iteration_tokens
        self.drop_equal_rewards, self.max_drops, self.drops_left = drop_equal_rewards, max_drops, 0
        self.max_error_fraction, self.seed = max_error_fraction, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.version = 0
        self.counts = Counts()
        self.last_error = ""
        self.has_told = False
        self.fault: BaseException | None = None
        self.next_number = rank
        self.redo: deque[int] = deque()
        self.wanted = 0
        self.flights: dict[int, Flight] = {}
        self.began: Counter[int] = Counter()  # of those in flight, by version
        self.finished: dict[int, Flight] = {}  # in the order they finished
        self.running: set[asyncio.Task[None]] = set()
        self.limits = TimeLimits(timeout_s)
        self.something_finished = asyncio.Event()
        self.thread = LoopThread("rollouts")

    def collect(self, num_groups: int) -> list[Group]:
        """Return so many finished groups, or more where older ones may not wait any longer.

        Fewer only where ``max_iteration_tokens`` ended the iteration.

        Raises:
            TooManyErrorsError: past ``max_error_fraction``, naming the last error.
        """
        return self.thread.run(self.sampling(self._collect(num_groups)))

    def evaluate(self, tasks: Sequence[Task], policy: Conversation) -> list[Trajectory]:
        """Run every task once, beside what is in flight."""

        async def all_of_them() -> list[Trajectory]:
            rollouts = (self.work(task, policy, seed=n) for n, task in enumerate(tasks))
            return list(await asyncio.gather(*map(caught, tasks, rollouts)))

        return self.thread.run(self.sampling(all_of_them()))

    def take_outcomes(self) -> list[Outcome]:
        """Return how the groups did that were delivered or dropped since the last call."""
        taken, self.outcomes = self.outcomes, []
        return taken

    def update_weights(self, module: nn.Module) -> None:
        """Give the engine the weights that an iteration has trained: the next version."""
        self.version += 1
        self.thread.run(self.policy.engine.update_weights(module, self.version))

    async def sampling(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Let the engine sample until a coroutine is done; then hold all requests."""
        await self.policy.engine.resume()
        self.limits.resume()
        try:
            return await coroutine
        finally:
            await self.policy.engine.pause()
            self.limits.pause()

    # An iteration

    async def _collect(self, num_groups: int) -> list[Group]:
        self.drops_left = self.max_drops * num_groups
        self.wanted = num_groups + self.num_ahead
        budget = TokenBudget(self.policy, self.max_iteration_tokens)
        self.fill()
        while not self.has_enough(num_groups, budget):
            self.something_finished.clear()
            await budget.wait(self.something_finished)
            if self.fault is not None:
                raise self.fault
            self.refuse_many_errors()
        chosen = self.choose(num_groups)
        for flight in chosen:
            del self.finished[flight.number]
            self.note_outcome(flight)
        # In order of their numbers: which one happened to finish first shall not matter.
        chosen.sort(key=lambda flight: flight.number)
        groups = [flight.group for flight in chosen if flight.group is not None]
        self.tell_environments({group.task.environment for group in groups})
        return groups

    def tell_environments(self, names: set[str]) -> None:
        """Tell the environment, once, which kinds of tasks came, if it wants to hear."""
        hear = getattr(self.environment, "hear_environments", None)
        if hear is not None and not self.has_told:
            hear(names)
        self.has_told = True

    def has_enough(self, num_groups: int, budget: TokenBudget) -> bool:
        """Whether the iteration may end: with all that it wants, or with what its budget bought."""
        if any(self.is_overdue(version) for version in self.began):
            return False
        return len(self.finished) >= num_groups or (bool(self.finished) and budget.is_spent)

    def is_overdue(self, began_version: int) -> bool:
        """Whether a group would be too stale if it came with the next version."""
        return self.version - began_version >= self.max_staleness

    def choose(self, num_groups: int) -> list[Flight]:
        """Take all that are overdue, then those that finished first."""
        flights = list(self.finished.values())
        overdue = [flight for flight in flights if self.is_overdue(flight.began_version)]
        others = [flight for flight in flights if not self.is_overdue(flight.began_version)]
        return [*overdue, *others[: max(0, num_groups - len(overdue))]]

    def fill(self) -> None:
        """Start groups until as many are in flight or finished as the iteration wants."""
        while len(self.flights) + len(self.finished) < self.wanted:
            if self.redo:
                number = self.redo.popleft()
            else:
                number = self.next_number
                self.next_number += self.num_ranks
            task_number = self.begun_tasks.pop(number, None)
            if task_number is None:
                task_number = self.task_order.pick(number, seed=self.seed, task_of=self.task_of)
            flight = self.flights[number] = Flight(number, task_number, self.version)
            self.began[flight.began_version] += 1
            running = self.thread.loop.create_task(self.fly(flight))
            self.running.add(running)
            running.add_done_callback(self.landed)

    async def fly(self, flight: Flight) -> None:
        """Roll a task out K times."""
        task = self.task_of(flight.task_number)
        seeds = (seed_of(self.seed, flight.number, k) for k in range(self.group_size))
        trajectories = await asyncio.gather(*(self.rollout(task, seed) for seed in seeds))
        flight.group = Group(task=task, trajectories=list(trajectories))
        await self.compare(flight)
        del self.flights[flight.number]
        self.began -= Counter([flight.began_version])  # keeps no zeros
        if self.drop_equal_rewards and self.drops_left > 0 and not flight.group.teaches:
            self.drops_left -= 1
            self.counts.dropped_groups += 1
            self.note_outcome(flight)
            self.fill()
        else:
            self.finished[flight.number] = flight

    def note_outcome(self, flight: Flight) -> None:
        """Keep how well a group did, unless all of it was lost."""
        rate = None if flight.group is None else pass_rate(flight.group)
        if rate is not None:
            self.outcomes.append((flight.number, flight.task_number, rate))

    async def compare(self, flight: Flight) -> None:
        """Let the group judge add to the rewards; what it cannot judge is lost, and counted."""
        if self.group_judge is None or flight.group is None:
            return
        group = flight.group
        sound = [one for one in group.trajectories if one.error is None]
        seed = seed_of(self.seed, flight.number, self.group_size)
        try:
            await self.group_judge.judge_group(
                group.task, group.trajectories, step=self.version, seed=seed
            )
        except VerifierError as error:
            for one in sound:
                one.error = f"group judge: {error}"
        for one in (one for one in sound if one.error is not None):
            self.counts.errors += 1
            self.last_error = f"{group.task.environment}: {one.error}"

    def landed(self, running: asyncio.Task[None]) -> None:
        """Let go of a group's coroutine; a fault of its own, such as a bad task, ends the run."""
        self.running.discard(running)
        if not running.cancelled():
            self.fault = running.exception() or self.fault
        self.something_finished.set()

    async def rollout(self, task: Task, seed: int) -> Trajectory:
        """Run one environment; its faults are counted, and never a reward of zero."""
        self.counts.rollouts += 1
        running = self.limits.limited(self.work(task, self.policy, seed=seed))
        trajectory = await caught(task, running)
        if trajectory.error is not None:
            self.counts.errors += 1
            self.last_error = trajectory.error
        return trajectory

    async def work(self, task: Task, policy: Conversation, *, seed: int) -> Trajectory:
        """Run the environment.

        Raises:
            TypeError: if it returns no rollout.
        """
        returned: Any = await self.environment.run(task, policy, seed=seed)
        if not isinstance(returned, Trajectory):
            raise TypeError(
                f"{type(self.environment).__name__}.run returned {returned!r:.80}: want a "
                "moonlit.batch.Trajectory"
            )
        return returned

    def refuse_many_errors(self) -> None:
        """Stop where verifiers or environments fail too often."""
        errors, rollouts = self.counts.errors, self.counts.rollouts
        if errors > max(self.max_error_fraction * rollouts, self.group_size - 1):
            raise TooManyErrorsError(
                f"{errors} of {rollouts} rollouts were lost to environments or verifiers, more than"
                f" max_error_fraction={self.max_error_fraction} allows; the last: {self.last_error}"
            )

    # Resume: numbers, no half rollouts

    def state_dict(self) -> dict[str, Any]:
        """Return which groups come next, and which had begun and were not delivered."""

        def unfinished() -> dict[int, int | None]:
            begun = {**self.flights, **self.finished}
            waiting = {number: self.begun_tasks.get(number) for number in self.redo}
            return waiting | {number: flight.task_number for number, flight in begun.items()}

        return {
            "next_number": self.next_number,
            "unfinished": dict(sorted(self.thread.call(unfinished).items())),
            "version": self.version,
            "task_order": self.task_order.state_dict(),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where so many ranks stopped, on any number of ranks; nothing is left out or twice.

        Args:
            states: of all ranks, in order.
        """
        stride, top = len(states), max(state["next_number"] for state in states)
        missing = {number for state in states for number in state["unfinished"]}
        begun = {n: task for state in states for n, task in state["unfinished"].items()}
        self.begun_tasks = {number: task for number, task in begun.items() if task is not None}
        self.task_order.load_state_dict(states[0]["task_order"])
        for state in states:
            missing |= set(range(state["next_number"], top, stride))
        self.version = max(state["version"] for state in states)
        self.redo = deque(sorted(missing)[self.rank :: self.num_ranks])
        self.next_number = top + (self.rank - top) % self.num_ranks

    def close(self) -> None:
        """Cancel what is in flight, close the environment, end the loop."""
        self.thread.run(self._close())
        self.thread.close()

    async def _close(self) -> None:
        for running in self.running:
            running.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await close(self.environment)
        await close(self.group_judge)


async def caught(task: Task, rollout: Coroutine[Any, Any, Trajectory]) -> Trajectory:
    """Return a rollout, or one that only names what its environment or verifier failed of."""
    try:
        return await rollout
    except Exception as error:  # a named state, that is counted and stops the run past a share
        told = ": ".join(filter(None, (task.environment, type(error).__name__, str(error))))
        return Trajectory(segments=[], messages=[], spans=[], stop_reason=LOST, error=told)


def seed_of(seed: int, number: int, k: int) -> int:
    """Seed of one rollout: another for every run, task and k."""
    digest = hashlib.sha256(f"{seed}/{number}/{k}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
