"""What ends an iteration or a rollout early: a budget of tokens, and limits of time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from moonlit.batch import Trajectory
from moonlit.rl.conversation import Conversation

BUDGET_LOOK_S = 0.02
"""How often a token budget is looked at."""


class TokenBudget:
    """Tokens that an iteration may sample.

    Args:
        policy: whose engine counts them.
        max_tokens: None: as many as it takes.
    """

    def __init__(self, policy: Conversation, max_tokens: int | None) -> None:
        self.engine, self.max_tokens = policy.engine, max_tokens
        self.began_at = policy.engine.num_sampled_tokens

    @property
    def is_spent(self) -> bool:
        """Whether as many were sampled."""
        if self.max_tokens is None:
            return False
        return self.engine.num_sampled_tokens - self.began_at >= self.max_tokens

    async def wait(self, event: asyncio.Event) -> None:
        """Wait for an event; where there is a budget, not for long."""
        if self.max_tokens is None:
            await event.wait()
            return
        try:
            async with asyncio.timeout(BUDGET_LOOK_S):
                await event.wait()
        except TimeoutError:  # the caller looks at the budget
            pass


class TimeLimits:
    """The time limits of rollouts, which stand still while rollouts are held.

    Args:
        timeout_s: of each; None: no limit.
    """

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}: want it above 0")
        self.timeout_s = timeout_s
        self.left_s: dict[asyncio.Timeout, float] = {}  # while held
        self.active: set[asyncio.Timeout] = set()
        self.is_held = False

    async def limited(self, rollout: Coroutine[Any, Any, Trajectory]) -> Trajectory:
        """Run a rollout to its end or its limit.

        Raises:
            TimeoutError: at the limit, naming it.
        """
        if self.timeout_s is None:
            return await rollout
        limit = asyncio.timeout(self.timeout_s)
        try:
            async with limit:
                self.active.add(limit)
                if self.is_held:  # it takes the place of a group that was dropped meanwhile
                    self.hold(limit)
                try:
                    return await rollout
                finally:
                    self.active.discard(limit)
                    self.left_s.pop(limit, None)
        except TimeoutError as error:
            if not limit.expired():  # one of the environment's own
                raise
            raise TimeoutError(f"no end after timeout_s={self.timeout_s:g}") from error

    def pause(self) -> None:
        """Stop the clocks."""
        self.is_held = True
        for limit in self.active:
            self.hold(limit)

    def hold(self, limit: asyncio.Timeout) -> None:
        """Stop one clock."""
        if (when_s := limit.when()) is not None and not limit.expired():
            self.left_s[limit] = when_s - asyncio.get_running_loop().time()
            limit.reschedule(None)

    def resume(self) -> None:
        """Start them again."""
        self.is_held = False
        now_s = asyncio.get_running_loop().time()
        for limit, left_s in self.left_s.items():
            limit.reschedule(now_s + left_s)
        self.left_s.clear()
