"""How the length of answers enters their rewards: rules over whole groups, and a control."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from moonlit.batch import Group

OverRanks = Callable[[Any], list[Any]]
"""From this rank's value to the values of all ranks, in order."""


def alone(value: Any) -> list[Any]:
    """Return the value of the only rank."""
    return [value]


@runtime_checkable
class LengthRule(Protocol):
    """Changes the rewards of an iteration's groups in place."""

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Rewrite ``trajectory.reward`` of a rank's groups; return what is worth logging."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        ...


class NoRule:
    """Length does not matter."""

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Change nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class ShuffledRewards(NoRule):
    """The control of every claim that rewards teach: each group's rewards, dealt out at random.

    Args:
        seed: of the deal.
    """

    def __init__(self, *, seed: int) -> None:
        self.random = random.Random(seed)

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Shuffle the rewards within each group."""
        for group in groups:
            some = [one for one in group.trajectories if one.error is None]
            rewards = [one.reward for one in some]
            self.random.shuffle(rewards)
            for one, reward in zip(some, rewards, strict=True):
                one.reward = reward
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return how far the deal is."""
        return {"random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on dealing."""
        self.random.setstate(state["random"])


class HardCap(NoRule):
    """An answer longer than a fixed number of tokens earns nothing: what Toggle is compared with.

    Args:
        max_tokens: that an answer may have.
    """

    def __init__(self, *, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens = max_tokens

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Take the reward of longer answers."""
        judged = [one for group in groups for one in group.trajectories if one.error is None]
        longer = [one for one in judged if one.num_tokens > self.max_tokens]
        for one in longer:
            one.reward = min(one.reward, 0.0)  # a penalty stays
        return {"length/over_cap": len(longer) / max(1, len(judged))}


class LengthReward(NoRule):
    r"""Kimi k1.5's length reward, relative to the group.

    $\lambda = 0.5 - (len - min) / (max - min)$ over the group's answers; a correct one gets
    $\lambda$, a wrong one $\min(0, \lambda)$, all get 0 where lengths are equal. It is added with a
    weight.

    Source: Kimi k1.5 (arXiv:2501.12599), Sec. 2.3.3; the weight is NOT STATED.

    Args:
        weight: of the length reward.
    """

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def apply(self, groups: Sequence[Group], over_ranks: OverRanks = alone) -> dict[str, float]:
        """Add it."""
        for group in groups:
            judged = [one for one in group.trajectories if one.error is None]
            lengths = [one.num_tokens for one in judged]
            if not judged or max(lengths) == min(lengths):
                continue
            for one in judged:
                span = max(lengths) - min(lengths)
                shorter = 0.5 - (one.num_tokens - min(lengths)) / span
                one.reward += self.weight * (shorter if one.is_correct else min(0.0, shorter))
        return {}
