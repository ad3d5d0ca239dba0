"""Which task comes next: one after another, the failed ones more often, or the easy ones first.

Source: Kimi k1.5 (arXiv:2501.12599), Sec. 2.3.4: a problem is drawn with a probability proportional
to one minus its success rate; a curriculum goes from easy problems to hard ones. How rates are kept
over time, what a problem never tried counts as, and the curriculum's pace are NOT STATED.

Every group has a number of its own; its task is a pure function of the seed, that number and what
was known when the iteration began. All ranks are told the outcomes of all ranks, so they know the
same, and a resume goes on with it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moonlit.batch import Group, Task

Outcome = tuple[int, int, float]
"""A group's number, its task's, and the share of its answers that were correct."""


@runtime_checkable
class TaskOrder(Protocol):
    """Picks tasks."""

    def pick(self, number: int, *, seed: int, task_of: Callable[[int], Task]) -> int:
        """Return the number of the task that group ``number`` works on."""
        ...

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """End an iteration: what it brought, on all ranks, by the groups' numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        ...


class InOrder:
    """Task after task, each once."""

    def pick(self, number: int, *, seed: int, task_of: Callable[[int], Task]) -> int:
        """Return the group's own number."""
        return number

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class Prioritised:
    r"""Draws from a pool of tasks with a probability proportional to $1 - s_i$.

    The rate $s_i$ of a task moves towards each new group's share of correct answers; a task never
    tried counts as failed.

    Args:
        pool_size: tasks 0 to ``pool_size`` - 1 are trained on, again and again.
        rate_step: how far a rate moves to the newest group, in (0, 1]; 1: only that one counts.
        min_weight: of a task that is always solved, in (0, 1]: it may be unlearnt.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(self, *, pool_size: int, rate_step: float, min_weight: float) -> None:
        if pool_size < 1:
            raise ValueError(f"pool_size={pool_size}: want at least 1")
        if not 0 < rate_step <= 1 or not 0 < min_weight <= 1:
            raise ValueError(f"rate_step={rate_step}, min_weight={min_weight}: want both in (0, 1]")
        self.pool_size, self.rate_step, self.min_weight = pool_size, rate_step, min_weight
        self.rates: dict[int, float] = {}

    def pick(self, number: int, *, seed: int, task_of: Callable[[int], Task]) -> int:
        """Draw a task."""
        return drawn(self.weights(), number, seed)

    def weights(self) -> np.ndarray:
        """Return the weight of every task of the pool."""
        weights = np.ones(self.pool_size)
        weights[list(self.rates)] -= list(self.rates.values())
        return weights.clip(self.min_weight)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Move the rates of the tasks that were worked on."""
        for _, task, rate in outcomes:
            before = self.rates.get(task, rate)
            self.rates[task] = before + self.rate_step * (rate - before)

    def state_dict(self) -> dict[str, Any]:
        """Return the rates."""
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        self.rates = dict(state["rates"])


class Curriculum:
    """Opens a pool of tasks from the easiest on; draws evenly from what is open.

    Args:
        pool_size: tasks 0 to ``pool_size`` - 1, ordered by the number in ``tags["difficulty"]``.
        first_share: of the pool that is open at the start, in (0, 1].
        iterations: until all of it is.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(self, *, pool_size: int, first_share: float, iterations: int) -> None:
        if min(pool_size, iterations) < 1:
            raise ValueError(f"pool_size={pool_size}, iterations={iterations}: want at least 1")
        if not 0 < first_share <= 1:
            raise ValueError(f"first_share={first_share}: want it in (0, 1]")
        self.pool_size, self.first_share, self.iterations = pool_size, first_share, iterations
        self.iteration = 0
        self.by_difficulty: list[int] = []  # once it is known

    def pick(self, number: int, *, seed: int, task_of: Callable[[int], Task]) -> int:
        """Draw a task from the open part.

        Raises:
            ValueError: if a task of the pool does not say how hard it is.
        """
        if not self.by_difficulty:
            hardness = [difficulty_of(task_of(one), one) for one in range(self.pool_size)]
            self.by_difficulty = np.argsort(hardness, kind="stable").tolist()
        return self.by_difficulty[drawn(np.ones(self.num_open), number, seed)]

    @property
    def num_open(self) -> int:
        """Tasks that may be drawn: linear in the iterations."""
        done = min(1.0, self.iteration / self.iterations)
        share = self.first_share + (1 - self.first_share) * done
        return max(1, round(share * self.pool_size))

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Count the iteration."""
        self.iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self.iteration = state["iteration"]


def drawn(weights: np.ndarray, number: int, seed: int) -> int:
    """Draw a place by weight: a pure function."""
    rng = np.random.default_rng([seed, number])
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def difficulty_of(task: Task, number: int) -> float:
    """Return how hard a task says it is.

    Raises:
        ValueError: if it does not say so in a number.
    """
    said = task.tags.get("difficulty", "")
    try:
        return float(said)
    except ValueError as error:
        raise ValueError(
            f"task {number} ({task.environment}) has the difficulty {said!r}: a curriculum wants a "
            'number in its tags["difficulty"]; leave its source out'
        ) from error


def pass_rate(group: Group) -> float | None:
    """Return the share of a group's judged answers that were correct; None if none was judged."""
    judged = [one.is_correct for one in group.trajectories if one.error is None]
    return sum(judged) / len(judged) if judged else None
