"""A reward for the form of an answer, beside the one for what it says."""

from dataclasses import dataclass

from moonlit.agents.environment import Judge, close
from moonlit.batch import Task, Trajectory
from moonlit.rl.rewards.forms import is_well_formed


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatJudge:
    r"""Mixes the form in: $(1 - w)\, r + w \cdot form$, so that only what is right earns 1.

    The form is kept by a finished answer that can be read (``forms.FORMS``) and whose tool calls
    could all be read. Well-formed nonsense earns ``weight`` and no more.

    Source: K2's and Kimi-Researcher's format rewards; form and weight are NOT STATED: ours.

    Args:
        content: judges what an answer says; its rewards are promised to add up to [0, 1].
        weight: of the form, in (0, 0.5).

    Raises:
        ValueError: if the weight is outside its range.
    """

    content: Judge
    weight: float

    def __post_init__(self) -> None:
        if not 0 < self.weight < 0.5:
            raise ValueError(f"format: weight={self.weight}: want it in (0, 0.5)")

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the content's rewards, and the form's as ``format``.

        Raises:
            VerifierError: if the content cannot be judged.
        """
        rewards = await self.content.judge(task, trajectory)
        is_kept = (
            trajectory.stop_reason == "answer"
            and is_well_formed(task.environment, trajectory.text)
            and not trajectory.metrics.get("num_malformed", 0.0)
        )
        scaled = {name: (1 - self.weight) * reward for name, reward in rewards.items()}
        return scaled | {"format": self.weight * is_kept}

    async def aclose(self) -> None:
        """Close the content's judge."""
        await close(self.content)
