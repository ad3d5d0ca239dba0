"""The orchestrator's environment: a dialogue in which some tool calls are whole rollouts.

Source: technical report (arXiv:2602.02276), Sec. 3.
"""

from collections.abc import Mapping

from moonlit.agents.environment import Judge, close
from moonlit.agents.swarm.critical_steps import (
    critical_steps,
    tokens_by_role,
    total_steps,
    widest_stage,
)
from moonlit.agents.swarm.faults import FaultRates, Faulty
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.schedule import SubAgentSchedule
from moonlit.agents.swarm.swarm import SubAgent, Swarm, require_sub_agent
from moonlit.agents.toolbox import Toolbox
from moonlit.agents.tools import Toolset
from moonlit.batch import Task, Trajectory
from moonlit.rl.conversation import Conversation
from moonlit.rl.dialogue_environment import trajectory_of


class SwarmEnvironment:
    """Lets the orchestrator work with its own tools and a swarm, and pays by PARL's reward.

    The prompt is the task's: it never says to work in parallel. A rollout ends with the turn that
    uses the last critical step it may take, by the stop reason ``budget``: it has no answer, and
    is judged so.

    Args:
        workers: kinds of sub-agents by name, each the same all along or by a schedule; none: a
            single agent, to compare with.
        toolbox: the orchestrator's own tools, beside the swarm's.
        judge: measures the outcome, r_perf.
        reward: the annealed parts.
        limits: of a swarm.
        faults: of every sub-agent's attempts, on purpose; None: none.

    Raises:
        ValueError: if there are no workers but ``None``, one of them cannot work, or sub-agents are
            to hang and no time-out ends them.
    """

    def __init__(
        self,
        *,
        workers: Mapping[str, SubAgent | SubAgentSchedule] | None,
        toolbox: Toolbox,
        judge: Judge,
        reward: ParlReward,
        limits: SwarmLimits,
        faults: FaultRates | None = None,
    ) -> None:
        if workers is None:
            raise ValueError("environment.workers=null: want sub-agents by name; {} for none")
        for kind, worker in workers.items():
            if not isinstance(worker, SubAgentSchedule):
                require_sub_agent(f"environment.workers.{kind}", worker)
        if faults is not None and faults.hang > 0 and limits.timeout_s is None:
            raise ValueError(
                f"faults.hang={faults.hang}, limits.timeout_s=None: it would never end"
            )
        self.workers, self.toolbox, self.judge = dict(workers), toolbox, judge
        self.reward, self.limits, self.faults = reward, limits, faults
        self.progress, self.step = 0.0, 0

    def tell(self, *, progress: float, step: int) -> None:
        """Hear how far the run is, before every iteration and every evaluation.

        Args:
            progress: share of the run that is done, in [0, 1]: the reward's weights follow it.
            step: optimizer steps taken: who serves as sub-agent follows it.
        """
        self.progress, self.step = progress, step

    def workers_now(self) -> dict[str, SubAgent]:
        """Return who serves as which kind of sub-agent."""
        now = {
            kind: worker.at(self.step) if isinstance(worker, SubAgentSchedule) else worker
            for kind, worker in self.workers.items()
        }
        if self.faults is None:
            return now
        return {kind: Faulty(worker, self.faults) for kind, worker in now.items()}

    async def run(self, task: Task, policy: Conversation, *, seed: int) -> Trajectory:
        """Return the rollout, its sub-agents below it."""
        progress = self.progress
        swarm = Swarm(
            self.workers_now(), task, limits=self.limits, num_prompt=len(task.prompt), seed=seed
        )
        async with self.toolbox(task) as own:
            tools = Toolset(
                [*own.tools, *(swarm.tools if self.workers else ())],
                after_turn=swarm.disagreements,
            )
            reply = await policy.reply(
                task.prompt, seed=seed, tools=tools, watch=swarm.watch, is_spent=swarm.is_spent
            )
        trajectory = trajectory_of(reply)
        trajectory.agent = "orchestrator"
        trajectory.children = swarm.children
        trajectory.rewards = await self.judge.judge(task, trajectory)
        performance = float(sum(trajectory.rewards.values()))
        trajectory.reward = self.reward.total(trajectory, performance, progress)
        trajectory.rewards |= self.reward.parts(trajectory)
        own_tokens, sub_tokens = tokens_by_role(trajectory)
        trajectory.metrics |= swarm.metrics() | {
            "performance": performance,
            "critical_steps": float(critical_steps(trajectory)),
            "total_steps": float(total_steps(trajectory)),
            "parallelism": float(len(widest_stage(trajectory))),
            "orchestrator_tokens": float(own_tokens),
            "subagent_tokens": float(sub_tokens),
        }
        return trajectory

    async def aclose(self) -> None:
        """Let the sub-agents and the judge go."""
        for worker in self.workers.values():
            await close(worker)
        await close(self.toolbox)
        await close(self.judge)
