"""How much of a swarm one rollout may have."""

from dataclasses import dataclass

from moonlit.checks import is_count, is_number

LEAST = {
    "max_agents": 1,
    "max_assignments": 1,
    "max_depth": 1,
    "max_critical_steps": 1,
    "max_result_chars": 1,
    "max_retries": 0,
}
"""Whole numbers, and what each must be at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmLimits:
    """Bounds of one rollout, all below it included. The report states step limits only.

    Args:
        max_agents: that may be created.
        max_assignments: that may be made.
        max_depth: of nesting: 1, the orchestrator's sub-agents create none themselves.
        max_critical_steps: no task is assigned past them (the report bounds episodes by these).
        max_result_chars: of a sub-agent's message; the rest is cut off, and said so.
        max_retries: of a sub-agent that failed, each with a fresh seed.
        timeout_s: of one attempt; None: none.

    Raises:
        ValueError: if a number is outside its range.
    """

    max_agents: int = 32
    max_assignments: int = 64
    max_depth: int = 1
    max_critical_steps: int = 100
    max_result_chars: int = 4000
    max_retries: int = 1
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not is_count(value, least):
                raise ValueError(f"limits.{name}={value!r}: want a whole number, at least {least}")
        timeout_s = self.timeout_s
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
            raise ValueError(f"limits.timeout_s={timeout_s!r}: want a number above 0, or null")


@dataclass(slots=True)
class Tally:
    """What a rollout and all below it have used of their limits."""

    num_agents: int = 0
    num_assigned: int = 0
