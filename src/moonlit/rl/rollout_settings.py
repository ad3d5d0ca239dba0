"""How answers are sampled, and how many: the numbers of a rollout."""

from dataclasses import dataclass, field

from moonlit.agents.context import ContextStrategy, KeepAll
from moonlit.checks import is_count

LEAST = {
    "group_size": 2, "groups_per_iteration": 1, "groups_ahead": 0, "max_staleness": 0,
    "max_token_staleness": 0, "max_new_tokens": 1, "max_turns": 1, "row_tokens": 1,
}  # fmt: skip
"""Of counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How answers are sampled, and how many. None of the numbers is stated by the report.

    Args:
        group_size: K, answers to a task.
        groups_per_iteration: over all ranks.
        groups_ahead: in flight beyond those, over all ranks: partial rollouts.
        max_staleness: an answer is trained at most so many versions after it began [versions].
        max_token_staleness: tokens sampled more versions ago are context only; None: all train.
        updates_per_iteration: optimizer steps into which an iteration's groups are dealt.
        drop_equal_rewards: ask for another group where all rewards are equal.
        temperature: of sampling.
        final_temperature: reached at the end of the run (K2 decays it, arXiv:2507.20534, Sec.
            3.2.3); None: it stays.
        max_new_tokens: of one turn.
        max_turns: of the policy in one answer.
        thinking: let it think first.
        row_tokens: of a packed row that is trained [tokens].
        share_prompts: answers of one prompt train beside one copy of it.
        max_error_fraction: of rollouts lost to environments or verifiers; more stop the run.
        timeout_s: of one rollout; None: none.
        context: what is done where a dialogue grows too long.
    """

    group_size: int
    groups_per_iteration: int
    groups_ahead: int = 0
    max_staleness: int = 0
    max_token_staleness: int | None = None
    updates_per_iteration: int = 1
    drop_equal_rewards: bool = False
    temperature: float = 1.0
    final_temperature: float | None = None
    max_new_tokens: int
    max_turns: int = 1
    thinking: bool = False
    row_tokens: int = 4096
    share_prompts: bool = True
    max_error_fraction: float = 0.1
    timeout_s: float | None = None
    context: ContextStrategy = field(default_factory=KeepAll)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            is_left_out = value is None and name == "max_token_staleness"
            if not is_left_out and not is_count(value, least):
                raise ValueError(
                    f"phase.rollouts.{name}={value!r}: want a whole number of at least {least}"
                )
        if not 1 <= self.updates_per_iteration <= self.groups_per_iteration:
            raise ValueError(
                f"updates_per_iteration={self.updates_per_iteration}, groups_per_iteration="
                f"{self.groups_per_iteration}: want 1 <= updates <= groups"
            )
        temperatures = (self.temperature, self.final_temperature)
        if any(one is not None and one <= 0 for one in temperatures):
            raise ValueError("temperature must be above 0: greedy answers have no probability")
