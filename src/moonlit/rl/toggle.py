"""Toggle: iterations that hold correct answers to a budget of tokens, and iterations that do not.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 4.4.2. With phase = floor(t / m) mod 2:

- phase 0, budget: r is kept where the group's mean reward is below lambda or the answer is no
  longer than the task's budget, else it is 0;
- phase 1, scaling: r is kept.

The budget is the rho-th percentile of the lengths of a task's correct answers, estimated once at
the start and kept. lambda, m and rho are NOT STATED: our defaults are in ``conf/``.

What the report leaves open, and we chose:
- Tasks are rarely seen twice here, so budgets are by *kind* of task: its environment and, where its
  source says so, how hard it is (``Task.tags["difficulty"]``).
- They come from the first ``estimate_iterations`` iterations, in which nothing is constrained.
- A kind without a correct answer until then has no budget: it is never constrained.
- Percentiles interpolate linearly; lengths count what the policy wrote, thinking included, and no
  tool's output.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moonlit.batch import Group, Task, Trajectory
from moonlit.rl.length_rules import OverRanks, alone


class Toggle:
    """Alternates between the two phases.

    Args:
        period: m, iterations of a phase.
        min_accuracy: lambda, mean reward from which a group is constrained.
        percentile: rho, of the lengths of correct answers.
        estimate_iterations: iterations that only measure lengths.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(
        self,
        *,
        period: int,
        min_accuracy: float,
        percentile: float,
        estimate_iterations: int,
    ) -> None:
        if period < 1 or estimate_iterations < 1:
            raise ValueError(
                f"period={period}, estimate_iterations={estimate_iterations}: want at least 1"
            )
        if not 0 <= min_accuracy <= 1 or not 0 <= percentile <= 100:
            raise ValueError(
                f"min_accuracy={min_accuracy}, percentile={percentile}: want [0, 1] and [0, 100]"
            )
        self.period, self.min_accuracy = period, min_accuracy
        self.percentile, self.estimate_iterations = percentile, estimate_iterations
        self.iteration = 0
        self.lengths: dict[str, list[int]] = defaultdict(list)
        self.budgets: dict[str, float] = {}

    @property
    def is_estimating(self) -> bool:
        """Whether lengths are still measured."""
        return self.iteration < self.estimate_iterations

    @property
    def is_budget_phase(self) -> bool:
        """Whether answers are held to their budget in this iteration."""
        return (
            not self.is_estimating
            and ((self.iteration - self.estimate_iterations) // self.period) % 2 == 0
        )

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Rewrite the rewards of an iteration; return what is worth logging.

        All ranks measure together, so all have the same budgets.
        """
        if self.is_estimating:
            self.measure(over_ranks(correct_lengths(groups)))
        before = [one.verified_reward for one in sound(groups)]
        correct = [one.num_tokens for one in sound(groups) if one.is_correct]
        over = num_constrained = 0
        for group in groups:
            over += sum(self.is_over(group, one) for one in sound([group]))
            if self.is_budget_phase:
                num_constrained += self.constrain(group)
        told = {
            "toggle/phase": 0.0 if self.is_budget_phase else 1.0,
            "toggle/constrained_groups": num_constrained / max(1, len(groups)),
            "toggle/over_budget": over / max(1, len(before)),
            "toggle/correct_tokens": mean(correct),
            f"toggle/reward_{'budget' if self.is_budget_phase else 'scaling'}_phase": mean(before),
            **{f"toggle/budget_{kind}": budget for kind, budget in self.budgets.items()},
        }
        self.iteration += 1
        if not self.is_estimating and not self.budgets:
            self.settle()
        return {name: value for name, value in told.items() if np.isfinite(value)}

    def measure(self, lengths_of_ranks: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Keep lengths of correct answers, by kind."""
        for lengths in lengths_of_ranks:
            for kind, some in lengths.items():
                self.lengths[kind] += some

    def constrain(self, group: Group) -> bool:
        """Take the reward of answers over the budget; say whether the group was constrained."""
        some = sound([group])
        accuracy = mean([one.verified_reward for one in some])
        budget = self.budgets.get(kind_of(group.task))
        if budget is None or not some or accuracy < self.min_accuracy:
            return False
        for one in some:
            if one.num_tokens > budget:
                one.reward = min(one.reward, 0.0)  # a penalty stays
        return True

    def is_over(self, group: Group, one: Trajectory) -> bool:
        """Whether an answer is longer than its budget, constrained or not."""
        return one.num_tokens > self.budgets.get(kind_of(group.task), float("inf"))

    def settle(self) -> None:
        """Fix the budgets for the rest of the run."""
        self.budgets = {
            kind: float(np.percentile(lengths, self.percentile))
            for kind, lengths in self.lengths.items()
            if lengths
        }
        self.lengths.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration, the budgets, and the lengths measured so far."""
        return {
            "iteration": self.iteration,
            "budgets": dict(self.budgets),
            "lengths": {kind: list(some) for kind, some in self.lengths.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same budgets."""
        self.iteration, self.budgets = state["iteration"], dict(state["budgets"])
        self.lengths = defaultdict(list, {k: list(v) for k, v in state["lengths"].items()})


def kind_of(task: Task) -> str:
    """Return the name under which tasks share a budget."""
    return "_".join([task.environment, *filter(None, [task.tags.get("difficulty")])])


def correct_lengths(groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the lengths of correct answers, by kind of task."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for group in groups:
        lengths[kind_of(group.task)] += [one.num_tokens for one in sound([group]) if one.is_correct]
    return dict(lengths)


def sound(groups: Sequence[Group]) -> list[Trajectory]:
    """Return the rollouts that were judged."""
    return [one for group in groups for one in group.trajectories if one.error is None]


def mean(values: Sequence[int] | Sequence[float]) -> float:
    """Return the mean; nan of nothing."""
    return sum(values) / len(values) if values else float("nan")
