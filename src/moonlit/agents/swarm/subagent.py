"""Sub-agents that a policy plays: frozen, with fresh contexts, tools and step budgets of their own.

Their rollouts are observations of the orchestrator: nothing in them is trained.

Source: technical report (arXiv:2602.02276), Sec. 3 and App. E.8.
"""

from dataclasses import replace
from typing import Any

from moonlit.agents.environment import close
from moonlit.agents.swarm.critical_steps import SWARM_TOOLS
from moonlit.agents.swarm.reward import WORK, did_work
from moonlit.agents.swarm.swarm import CONFLICTS, Swarm
from moonlit.agents.toolbox import Toolbox
from moonlit.agents.tools import Toolset
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message


class PolicySubAgent:
    """A sub-agent that a policy plays: an earlier checkpoint, a smaller model, a server.

    Args:
        policy: whose ``reply`` answers (``moonlit.rl.frozen_policy``); nobody trains it. Its turns
            are the step budget.
        toolbox: lends the tools of one rollout.
        prompt: of this kind of sub-agents, ahead of what the orchestrator tells each.
        delegates: whether it may have sub-agents of its own, as deep as the limits allow.
    """

    def __init__(
        self, *, policy: Any, toolbox: Toolbox, prompt: str = "", delegates: bool = False
    ) -> None:
        self.policy, self.toolbox, self.prompt = policy, toolbox, prompt
        self.delegates = delegates

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: Swarm
    ) -> Trajectory:
        """Let the policy answer."""
        if self.prompt:
            told = f"{self.prompt}\n{prompt[0].words}"
            prompt = [replace(prompt[0], content=told), *prompt[1:]]
        async with self.toolbox(task) as own:
            below = swarm.tools if self.delegates else ()
            tools = Toolset([*own.tools, *below], after_turn=swarm.disagreements)
            reply = await self.policy.reply(
                prompt, seed=seed, tools=tools, watch=swarm.watch, is_spent=swarm.is_spent
            )
        useful = sum(
            message.role == "tool"
            and message.name not in (*SWARM_TOOLS, CONFLICTS)
            and not message.words.startswith("Error: ")
            for message in reply.messages
        )
        return Trajectory(
            segments=reply.segments(),
            messages=list(reply.messages),
            spans=list(reply.spans),
            stop_reason=reply.stop_reason,
            text=reply.text,
            children=swarm.children,
            metrics={WORK: float(useful + sum(map(did_work, swarm.children)))},
        )

    async def aclose(self) -> None:
        """Let policy and toolbox go."""
        await close(self.policy)
        await close(self.toolbox)
