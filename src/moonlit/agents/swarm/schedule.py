"""Which frozen sub-agents serve when: small ones first, larger ones later.

Source: technical report (arXiv:2602.02276), Sec. 3; at which steps is NOT STATED.
"""

from collections.abc import Mapping

from moonlit.agents.environment import close
from moonlit.agents.swarm.swarm import SubAgent, require_sub_agent


class Stage:
    """Who serves from an optimizer step on, until another stage begins.

    No dataclass: OmegaConf would take one inside a mapping for configuration.

    Raises:
        ValueError: if the worker is no sub-agent.
    """

    def __init__(self, *, from_step: int, worker: SubAgent) -> None:
        require_sub_agent("stage.worker", worker)
        self.from_step, self.worker = from_step, worker


class SubAgentSchedule:
    """Sub-agents by stages.

    A rollout keeps those of the step at which it began. The step is the run's own, so a resume
    goes on with whom it stopped with.

    Args:
        stages: by a name for ``conf/``; one of them from step 0.

    Raises:
        ValueError: if nobody serves from step 0, or two stages begin at one step.
    """

    def __init__(self, *, stages: Mapping[str, Stage]) -> None:
        steps = {name: stage.from_step for name, stage in stages.items()}
        if not steps or min(steps.values()) != 0 or len(set(steps.values())) < len(steps):
            raise ValueError(f"stages begin at {steps}: want unlike steps, one of them 0")
        self.stages = sorted(stages.values(), key=lambda stage: stage.from_step)

    def at(self, step: int) -> SubAgent:
        """Return who serves a rollout that begins at a step."""
        return [stage.worker for stage in self.stages if stage.from_step <= step][-1]

    async def aclose(self) -> None:
        """Let all of them go."""
        for stage in self.stages:
            await close(stage.worker)
