"""A share of a preparation, for a job array."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Part:
    """One of several equal shares of the work; the first is 1."""

    index: int
    count: int

    @classmethod
    def named(cls, name: str | None) -> "Part | None":
        """Read ``2/8``; None is all of the work.

        Raises:
            ValueError: if there is no such part.
        """
        if name is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", name)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"source.part={name}: want INDEX/COUNT, such as 2/8")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items that are this part's: every ``count``-th."""
        return items[self.index - 1 :: self.count]

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{self.index}/{self.count}"
