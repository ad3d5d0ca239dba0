"""How the length of answers enters their rewards: rules over whole groups."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from moonlit.batch import Group


@runtime_checkable
class LengthRule(Protocol):
    """Changes the rewards of an iteration's groups in place."""

    def apply(self, groups: Sequence[Group]) -> dict[str, float]:
        """Rewrite ``trajectory.reward``; return what is worth logging, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        ...


class NoRule:
    """Length does not matter."""

    def apply(self, groups: Sequence[Group]) -> dict[str, float]:
        """Change nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
