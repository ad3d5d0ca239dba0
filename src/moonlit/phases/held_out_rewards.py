"""Held-out scores of an RL phase: mean reward and solved share of answers made by generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moonlit.batch import Task, Trajectory


@dataclass(frozen=True, slots=True)
class HeldOutAnswer:
    """One held-out task and how it was answered."""

    name: str
    """Of the held-out set."""
    number: int
    """Of the task in it, however many ranks share it."""
    task: Task
    trajectory: Trajectory


@dataclass(slots=True)
class RewardScore:
    """Running sums of one held-out set."""

    reward_sum: float = 0.0
    num_solved: int = 0
    num_answers: int = 0
    num_tokens: int = 0
    num_errors: int = 0
    """Answers that no verifier could judge; they are in no mean."""
    sums: list[float] = field(default_factory=list)
    """Of what is watched besides."""

    def mean(self, value: int | float) -> float:
        """Divide by the judged answers; nan before there are any."""
        return value / self.num_answers if self.num_answers else float("nan")


@dataclass(slots=True)
class HeldOutRewards:
    """Scores by the name of the held-out set.

    Args:
        watched: names of metrics that every answer has, to be told beside its reward.
    """

    watched: tuple[str, ...] = ()
    scores: dict[str, RewardScore] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything: a new pass begins."""
        self.scores.clear()

    def add(self, name: str, trajectories: Sequence[Trajectory]) -> None:
        """Count some answers."""
        score = self.scores.setdefault(name, RewardScore(sums=[0.0] * len(self.watched)))
        for one in trajectories:
            if one.error is not None:
                score.num_errors += 1
                continue
            score.reward_sum += one.reward
            score.num_solved += one.is_correct
            score.num_answers += 1
            score.num_tokens += one.num_tokens
            for place, metric in enumerate(self.watched):
                score.sums[place] += one.metrics[metric]

    def sum_over_ranks(self, global_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what every rank counted on its own tasks."""
        if not self.scores:
            return
        sums = [
            [one.num_solved, one.num_answers, one.num_tokens, one.num_errors, one.reward_sum,
             *one.sums]
            for one in self.scores.values()
        ]  # fmt: skip
        totals = global_sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        for name, row in zip(list(self.scores), totals, strict=True):
            counts, (reward_sum, *sums) = map(int, row[:4]), row[4:]
            self.scores[name] = RewardScore(reward_sum, *counts, sums=sums)

    def metrics(self) -> dict[str, float]:
        """Return ``held_out/NAME/{reward,solved,tokens_per_answer,errors}``, and the watched."""
        return {
            f"held_out/{name}/{what}": value
            for name, score in self.scores.items()
            for what, value in {
                "reward": score.mean(score.reward_sum),
                "solved": score.mean(score.num_solved),
                "tokens_per_answer": score.mean(score.num_tokens),
                "errors": float(score.num_errors),
                **dict(zip(self.watched, map(score.mean, score.sums), strict=True)),
            }.items()
        }
