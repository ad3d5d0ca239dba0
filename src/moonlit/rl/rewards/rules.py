"""The judge of verifiable tasks: the rule of a task's environment, and the form of the answer."""

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moonlit.agents.environment import VerifierError, close
from moonlit.batch import CORRECT, Task, Trajectory
from moonlit.rl.rewards.counting import counting
from moonlit.rl.rewards.exact import is_comparable, is_exact
from moonlit.rl.rewards.forms import is_well_formed
from moonlit.rl.rewards.grounding import grounding
from moonlit.rl.rewards.ocr import ocr
from moonlit.rl.rewards.pairs import pairs
from moonlit.rl.rewards.pointing import pointing
from moonlit.rl.rewards.reasoning import reasoning_gym
from moonlit.rl.rewards.segmentation import segmentation
from moonlit.rl.rewards.truths import PLACES

Rule = Callable[[str, Any], float | Awaitable[float]]
"""From an answer's words and the truth to [0, 1]; a rule that needs a process is awaited."""


def exact(answer: str, truth: Any) -> float:
    """1 if the answer is the truth, the whole of it and nothing else; else 0."""
    return float(is_exact(answer, truth))


RULES: dict[str, Rule] = {
    "counting": counting,
    "grounding": grounding,
    "pointing": pointing,
    "segmentation": segmentation,
    "ocr": ocr,
    "naming": exact,
    "colour": exact,
    "shape": exact,
    "position": exact,
    "puzzle": exact,
    "motion": exact,
    "caption": ocr,
    "chart_value": counting,
    "chart_name": exact,
    "wide_search": pairs,
    "reasoning_gym": reasoning_gym,
    "exact": exact,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleJudge:
    """Scores an answer by the rule of its task's environment.

    Args:
        rules: further rules by environment, or other ones for those of ``RULES``.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the rule's reward under its environment's name; without an answer it is 0.

        Raises:
            VerifierError: if there is no such rule, or it fails, or leaves [0, 1], or no answer
                could meet the truth.
        """
        name = task.environment
        rule = self.rules.get(name, RULES.get(name))
        if rule is None:
            raise VerifierError(f"no reward for environment {name!r}: there are {sorted(RULES)}")
        if task.answer is None:
            raise VerifierError(f"a task of environment {name!r} has no answer to compare with")
        self.check_truth(task)
        if trajectory.stop_reason != "answer":
            return {name: 0.0}
        trajectory.metrics["well_formed"] = float(is_well_formed(name, trajectory.text))
        return {name: await score(name, rule, trajectory.text, task.answer)}

    async def is_right(self, task: Task, answer: str) -> bool:
        """Whether an answer is the truth; where that is no such text, whether it earns all.

        Raises:
            VerifierError: if there is no rule for the task, or it fails, or leaves [0, 1], or no
                answer could meet the truth.
        """
        name = task.environment
        self.check_truth(task)
        if name not in self.rules and is_comparable(task.answer):
            return is_exact(answer, task.answer)
        rule = self.rules.get(name, RULES.get(name))
        if rule is None:
            raise VerifierError(f"nothing tells right from wrong in environment {name!r}")
        return await score(name, rule, answer, task.answer) >= CORRECT

    def check_truth(self, task: Task) -> None:
        """Refuse a place that no answer could name, whether there is an answer or not.

        Raises:
            VerifierError: saying what is wanted.
        """
        name = task.environment
        if name in self.rules or name not in PLACES:
            return
        try:
            PLACES[name](task.answer)
        except ValueError as error:
            raise VerifierError(f"a task of environment {name!r}: {error}") from error

    async def aclose(self) -> None:
        """Let go of what rules hold, such as processes."""
        for rule in self.rules.values():
            await close(rule)


async def score(name: str, rule: Rule, answer: str, truth: Any) -> float:
    """Return what an answer earns by a rule, which may be a coroutine.

    Raises:
        VerifierError: if the rule fails, or leaves [0, 1].
    """
    try:
        reward = rule(answer, truth)
        reward = float(await reward if inspect.isawaitable(reward) else reward)
    except VerifierError:
        raise
    except Exception as error:
        raise VerifierError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    return in_bounds(name, reward)


def in_bounds(name: str, reward: float) -> float:
    """Return a reward that is in [0, 1].

    Raises:
        VerifierError: if it is not, naming the reward.
    """
    if not math.isfinite(reward) or not 0 <= reward <= 1 + 1e-9:
        raise VerifierError(f"reward {name!r} returned {reward}: it promises [0, 1]")
    return min(reward, 1.0)
