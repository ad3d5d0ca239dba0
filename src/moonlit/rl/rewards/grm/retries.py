"""What happens when a judge does not answer well: it is asked again, later and later."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from moonlit.agents.environment import VerifierError

Result = TypeVar("Result")


class TransientError(VerifierError):
    """A judge did not answer, or not in the form asked for; another try may go well.

    Args:
        told: what happened.
        retry_after_s: how long the judge asked us to wait; None: it did not say.
    """

    def __init__(self, told: str, retry_after_s: float | None = None) -> None:
        super().__init__(told)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Exponential back-off with jitter. The numbers are ours.

    Args:
        max_attempts: tries in all.
        backoff_s: wait before the second try; it doubles with each.
        max_backoff_s: no wait is longer, not even one that the judge asks for.

    Raises:
        ValueError: if a number is outside its range.
    """

    max_attempts: int
    backoff_s: float
    max_backoff_s: float

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or not 0 <= self.backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"max_attempts={self.max_attempts}, backoff_s={self.backoff_s}, max_backoff_s="
                f"{self.max_backoff_s}: want at least 1, and 0 <= backoff_s <= max_backoff_s"
            )

    async def run(self, attempt: Callable[[int], Awaitable[Result]]) -> Result:
        """Return what an attempt returns.

        Args:
            attempt: is given its number, from 0.

        Raises:
            VerifierError: the last attempt's error, or the first that no other try can mend.
        """
        for number in range(self.max_attempts - 1):
            try:
                return await attempt(number)
            except TransientError as error:
                await asyncio.sleep(self.wait_s(number, error.retry_after_s))
        try:
            return await attempt(self.max_attempts - 1)
        except TransientError as error:
            raise VerifierError(f"after {self.max_attempts} attempts: {error}") from error

    def wait_s(self, number: int, asked_s: float | None) -> float:
        """Return the wait after attempt ``number`` [s]."""
        ours_s = self.backoff_s * 2**number * random.uniform(0.5, 1)
        return min(self.max_backoff_s, max(ours_s, asked_s or 0.0))
