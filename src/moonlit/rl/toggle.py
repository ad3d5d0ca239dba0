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
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from moonlit.batch import Group, Task, Trajectory
from moonlit.rl.length_rules import OverRanks, alone


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What an iteration's judged answers were like, before a reward was taken."""

    is_budget_phase: bool
    num_groups: int = 0
    num_constrained: int = 0
    """Groups that were held to their budget."""
    num_over_budget: int = 0
    """Answers longer than their budget, constrained or not."""
    rewards: list[float] = field(default_factory=list)
    """What was verified, of each answer."""
    correct_lengths: dict[str, list[int]] = field(default_factory=dict)
    """Of the correct answers, by kind [tokens]."""
    saved_tokens: list[float] = field(default_factory=list)
    """Of each correct answer: how much shorter it is than its kind's were at the start [tokens]."""
    budgets: dict[str, list[float]] = field(default_factory=dict)
    """Of each answer whose kind has one, by domain [tokens]."""

    @property
    def num_answers(self) -> int:
        """Answers that were judged."""
        return len(self.rewards)


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
        self.start_tokens: dict[str, float] = {}
        self.last: Outcome | None = None

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
        """Rewrite the rewards of an iteration, and keep in ``last`` what it was like.

        All ranks measure together, so all have the same budgets. The callback ``toggle_budget``
        logs it.
        """
        seen = self.look(groups)
        if self.is_budget_phase:
            seen.num_constrained = sum(map(self.constrain, groups))
        self.last = together(over_ranks(seen))
        if self.is_estimating:
            for kind, some in self.last.correct_lengths.items():
                self.lengths[kind] += some
        self.iteration += 1
        if not self.is_estimating and not self.budgets:
            self.settle()
        return {}

    def look(self, groups: Sequence[Group]) -> Outcome:
        """Measure this rank's answers, before a reward is taken."""
        seen = Outcome(is_budget_phase=self.is_budget_phase, num_groups=len(groups))
        for group in groups:
            kind, some = kind_of(group.task), sound([group])
            correct = [one.num_tokens for one in some if one.is_correct]
            seen.rewards += [one.verified_reward for one in some]
            seen.num_over_budget += sum(self.is_over(group, one) for one in some)
            seen.correct_lengths[kind] = seen.correct_lengths.get(kind, []) + correct
            if kind in self.start_tokens:
                seen.saved_tokens += [self.start_tokens[kind] - length for length in correct]
            if kind in self.budgets:
                of_domain = seen.budgets.setdefault(group.task.domain, [])
                of_domain += [self.budgets[kind]] * len(some)
        return seen

    def constrain(self, group: Group) -> bool:
        """Take the reward of answers over the budget; say whether the group was constrained."""
        some = sound([group])
        budget = self.budgets.get(kind_of(group.task))
        if budget is None or not some:
            return False
        if fmean(one.verified_reward for one in some) < self.min_accuracy:
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
        measured = {kind: lengths for kind, lengths in self.lengths.items() if lengths}
        for kind, lengths in measured.items():
            self.budgets[kind] = float(np.percentile(lengths, self.percentile))
            self.start_tokens[kind] = fmean(lengths)
        self.lengths.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration, what was measured at the start, and the lengths so far."""
        return {
            "iteration": self.iteration,
            "budgets": dict(self.budgets),
            "start_tokens": dict(self.start_tokens),
            "lengths": {kind: list(some) for kind, some in self.lengths.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same budgets."""
        self.iteration, self.budgets = state["iteration"], dict(state["budgets"])
        self.start_tokens = dict(state["start_tokens"])
        self.lengths = defaultdict(list, {k: list(v) for k, v in state["lengths"].items()})


def kind_of(task: Task) -> str:
    """Return the name under which tasks share a budget."""
    return "_".join([task.environment, *filter(None, [task.tags.get("difficulty")])])


def sound(groups: Sequence[Group]) -> list[Trajectory]:
    """Return the rollouts that were judged."""
    return [one for group in groups for one in group.trajectories if one.error is None]


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return what the answers of all ranks were like."""
    first, *others = outcomes
    for one in others:
        first.num_groups += one.num_groups
        first.num_constrained += one.num_constrained
        first.num_over_budget += one.num_over_budget
        first.rewards += one.rewards
        first.saved_tokens += one.saved_tokens
        for kind, lengths in one.correct_lengths.items():
            first.correct_lengths[kind] = first.correct_lengths.get(kind, []) + lengths
        for domain, budgets in one.budgets.items():
            first.budgets[domain] = first.budgets.get(domain, []) + budgets
    return first
