"""The orchestrator's environment: a dialogue in which some tool calls are whole rollouts.

Source: technical report (arXiv:2602.02276), Sec. 3.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from moonlit.agents.environment import Judge, close
from moonlit.agents.swarm.critical_steps import (
    critical_steps,
    tokens_by_role,
    total_steps,
    widest_stage,
)
from moonlit.agents.swarm.orchestrator import Swarm, SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.subagent import SubAgent
from moonlit.agents.tools import Toolset
from moonlit.batch import Task, Trajectory
from moonlit.rl.conversation import Conversation
from moonlit.rl.dialogue_environment import trajectory_of

OwnTools = Callable[[Task], AbstractAsyncContextManager[Toolset]]


class SwarmEnvironment:
    """Lets the orchestrator work with its own tools and a swarm, and pays by PARL's reward.

    The prompt is the task's: it never says to work in parallel.

    Args:
        workers: kinds of sub-agents by name; none: a single agent, to compare with.
        own_tools: of the orchestrator besides the swarm's.
        judge: measures the outcome, r_perf.
        reward: the annealed parts.
        limits: of a swarm.
    """

    def __init__(
        self,
        *,
        workers: Mapping[str, SubAgent],
        own_tools: OwnTools,
        judge: Judge,
        reward: ParlReward,
        limits: SwarmLimits,
    ) -> None:
        self.workers, self.own_tools, self.judge = dict(workers), own_tools, judge
        self.reward, self.limits = reward, limits
        self.progress = 0.0
        """Share of the run that is done: the phase says it before every iteration."""

    async def run(self, task: Task, policy: Conversation, *, seed: int) -> Trajectory:
        """Return the rollout, its sub-agents below it."""
        swarm = Swarm(
            self.workers, task, limits=self.limits, num_prompt=len(task.prompt), seed=seed
        )
        async with self.own_tools(task) as own:
            tools = Toolset([*own.tools, *(swarm.tools if self.workers else ())])
            reply = await policy.reply(task.prompt, seed=seed, tools=tools, watch=swarm.watch)
        trajectory = trajectory_of(reply)
        trajectory.agent = "orchestrator"
        trajectory.children = swarm.children
        if critical_steps(trajectory) > self.limits.max_critical_steps:
            trajectory.stop_reason = "budget"
        trajectory.rewards = await self.judge.judge(task, trajectory)
        performance = float(sum(trajectory.rewards.values()))
        trajectory.reward = self.reward.total(trajectory, performance, self.progress)
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
        await close(self.judge)
