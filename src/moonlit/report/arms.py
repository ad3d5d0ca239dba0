r"""The arms of an experiment side by side, from what their evaluations wrote down.

A run is ``FOLDER/ARM-SEED``. Compared are the outcome (item-F1) and the critical steps of held-out
answers, and the form of the report's Figure 8: critical steps that are needed to reach a target
F1. An answer counts once its rollout is over, so with a budget of b critical steps

$$F(b) = \mathrm{mean}_i\, F1_i\, [\mathrm{CriticalSteps}_i \le b]$$

and the steps to a target are the smallest b at which F(b) reaches it.

Source: technical report (arXiv:2602.02276), Sec. 3 and 5.2, Figures 4 and 8; the form of F is ours.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moonlit.rl.records import HELD_OUT_ANSWERS

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
Answer = dict[str, Any]
NAMES = {"step", "set", "task", "tags", "error", "metrics"}
"""What is read of one."""


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed: the held-out answers of each evaluation by its step."""

    arm: str
    seed: int
    evaluations: dict[int, list[Answer]]

    @property
    def first(self) -> list[Answer]:
        """Answers before training."""
        return self.evaluations[min(self.evaluations)]

    @property
    def last(self) -> list[Answer]:
        """Answers after it."""
        return self.evaluations[max(self.evaluations)]


def read_runs(folder: Path) -> list[Run]:
    """Read every run of an experiment that has been evaluated, by arm and seed.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = []
    for file in sorted(folder.glob(f"*-*/{HELD_OUT_ANSWERS.format(rank='')}")):
        arm, _, seed = file.parent.name.rpartition("-")
        runs.append(Run(arm, int(seed), read_evaluations(file.parent)))
    if not runs:
        raise FileNotFoundError(f"{folder}: no ARM-SEED/{HELD_OUT_ANSWERS.format(rank='')} in it")
    return runs


def read_evaluations(run: Path) -> dict[int, list[Answer]]:
    """Return a run's held-out answers by step; of one task the last line counts.

    Raises:
        ValueError: if a line is no answer, naming file and line.
    """
    answers: dict[tuple[int, str, int], Answer] = {}
    for file in sorted(run.glob(HELD_OUT_ANSWERS.format(rank="*"))):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                one = read_answer(line, f"{file}, line {number}")
                answers[one["step"], one["set"], one["task"]] = one
    evaluations: dict[int, list[Answer]] = {}
    for (step, _, _), one in sorted(answers.items()):
        if one["error"] is None:
            evaluations.setdefault(step, []).append(one)
    return evaluations


def read_answer(line: bytes, place: str) -> Answer:
    """Read one line."""
    try:
        one = json.loads(line.decode())
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{place}: no answer of an evaluation: {error}") from error
    if not isinstance(one, dict) or not set(one) >= NAMES:
        raise ValueError(f"{place}: no answer of an evaluation: want {', '.join(sorted(NAMES))}")
    return one


def item_f1(answer: Answer) -> float:
    """Outcome of an answer, without what PARL's reward adds."""
    return answer["metrics"]["performance"]


def steps(answer: Answer) -> float:
    """Critical steps of an answer."""
    return answer["metrics"]["critical_steps"]


def measured(name: str) -> Callable[[Answer], float]:
    """Return what reads one metric."""
    return lambda answer: answer["metrics"][name]


def mean(answers: Sequence[Answer], value: Callable[[Answer], float]) -> float:
    """Mean over answers; nan where there are none."""
    return fmean(map(value, answers)) if answers else float("nan")


def f1_within(answers: Sequence[Answer], budget: int) -> float:
    """Item-F1 where answers that take more critical steps than the budget count 0."""
    return fmean(item_f1(one) if steps(one) <= budget else 0.0 for one in answers)


def steps_to(answers: Sequence[Answer], target: float) -> int | None:
    """Smallest budget of critical steps that reaches a target F1; None: none does."""
    for budget in sorted({int(steps(one)) for one in answers}):
        if f1_within(answers, budget) >= target:
            return budget
    return None


def by_tag(answers: Sequence[Answer], tag: str) -> dict[int, list[Answer]]:
    """Group answers by a number that their tasks are tagged with."""
    groups: dict[int, list[Answer]] = {}
    for one in answers:
        groups.setdefault(int(one["tags"][tag]), []).append(one)
    return dict(sorted(groups.items()))


def arms_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by arm, in the order they come."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms
