"""How long an answer may be, by the kind of task, and what it costs to be cut off."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from moonlit.batch import Task, Trajectory
from moonlit.rl.conversation import Conversation

PENALTY = "truncation"
"""Name of the reward that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCaps:
    """Cuts an answer, all its turns together, at its task's cap; a cut answer pays a penalty.

    Source: K2 report (arXiv:2507.20534), Sec. 3.2.3: a token budget for each sample by its type of
    task, truncation and a penalty. Caps and penalty are NOT STATED.

    Args:
        tokens: by environment of the task.
        default: of the others; None: as long as a turn may be.
        penalty: taken off the reward of an answer that was cut, whoever cut it; at least 0.

    Raises:
        ValueError: if a number is outside its range.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    default: int | None = None
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, cap in {**self.tokens, "default": self.default}.items():
            if cap is not None and cap < 1:
                raise ValueError(f"caps.{name}={cap}: want at least 1 token")
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"caps.penalty={self.penalty}: want at least 0, and finite")

    def capped(self, policy: Conversation, task: Task) -> Conversation:
        """Return the policy with the task's cap."""
        return replace(policy, max_reply_tokens=self.tokens.get(task.environment, self.default))

    def warn_of_unseen(self, environments: Collection[str]) -> None:
        """Say which caps no task has met: names come with the tasks, a misspelt one caps nothing.

        Args:
            environments: of all tasks so far.
        """
        unseen = sorted(set(self.tokens) - set(environments))
        if unseen:
            warnings.warn(
                f"caps.tokens.{', caps.tokens.'.join(unseen)}: no task of the first iteration has "
                f"such an environment; there were {', '.join(sorted(environments))}",
                stacklevel=2,
            )

    def charge(self, trajectory: Trajectory) -> dict[str, float]:
        """Return the penalty, as a reward by name, if an answer was cut."""
        return {PENALTY: -self.penalty} if trajectory.stop_reason == "length" else {}
