"""The standard environment: a dialogue with tools, then a judge.

Source: technical report (arXiv:2602.02276), App. D: toolset, judge and prompt variation, composed
for each task.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from moonlit.agents.environment import Judge, close
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.toolbox import Toolbox
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.ipython import ipython
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.rl.conversation import Conversation, pictures_of
from moonlit.rl.reply import Reply
from moonlit.rl.token_caps import TokenCaps

Variation = Callable[[Task, int], Sequence[Message]]
"""From a task and a seed to the messages that ask it."""


class DialogueEnvironment:
    """Lets the policy answer, with tools if there are any, and has the answer judged.

    Args:
        judge: measures the rollout.
        toolbox: None: no tools.
        variation: how the task is put; None: as its prompt says.
        reward_weights: of the judge's rewards by name; None: each counts 1.
        caps: of an answer's tokens, and what it costs to be cut; None: a turn's limit, nothing.
    """

    def __init__(
        self,
        *,
        judge: Judge,
        toolbox: Toolbox | None = None,
        variation: Variation | None = None,
        reward_weights: Mapping[str, float] | None = None,
        caps: TokenCaps | None = None,
    ) -> None:
        self.judge, self.toolbox, self.variation = judge, toolbox, variation
        self.reward_weights, self.caps = reward_weights, caps

    async def run(self, task: Task, policy: Conversation, *, seed: int) -> Trajectory:
        """Return the rollout, judged.

        Raises:
            VerifierError: if the judge cannot tell.
            ValueError: if the reward has a name without a weight.
        """
        if self.caps is not None:
            policy = self.caps.capped(policy, task)
        prompt = task.prompt if self.variation is None else list(self.variation(task, seed))
        if self.toolbox is None:
            reply = await policy.reply(prompt, seed=seed)
        else:
            async with self.toolbox(task) as tools:
                reply = await policy.reply(prompt, seed=seed, tools=tools)
        trajectory = trajectory_of(reply)
        trajectory.prompt = None if self.variation is None else prompt
        trajectory.rewards = await self.judge.judge(task, trajectory)
        trajectory.reward = self.total(trajectory.rewards)
        if self.caps is not None:
            penalty = self.caps.charge(trajectory)
            trajectory.rewards |= penalty
            trajectory.reward += sum(penalty.values())
        return trajectory

    def hear_environments(self, environments: Collection[str]) -> None:
        """Hear, after the first iteration, the environments that its tasks had."""
        if self.caps is not None:
            self.caps.warn_of_unseen(environments)

    def total(self, rewards: Mapping[str, float]) -> float:
        """Return the weighted sum."""
        if self.reward_weights is None:
            return float(sum(rewards.values()))
        if unknown := set(rewards) - set(self.reward_weights):
            raise ValueError(f"reward_weights has no weight for {sorted(unknown)}")
        return sum(self.reward_weights[name] * reward for name, reward in rewards.items())

    async def aclose(self) -> None:
        """Close toolbox and judge."""
        if self.toolbox is not None:
            await close(self.toolbox)
        await close(self.judge)


def trajectory_of(reply: Reply) -> Trajectory:
    """Return a reply as a rollout that nobody has judged yet."""
    return Trajectory(
        segments=reply.segments(),
        messages=list(reply.messages),
        spans=list(reply.spans),
        stop_reason=reply.stop_reason,
        text=reply.text,
        metrics={
            "num_turns": float(len(reply.completions)),
            "num_calls": float(reply.num_calls),
            "num_malformed": float(len(reply.errors)),
        },
    )


class SandboxToolbox:
    """The ``ipython`` tool from a pool of sandboxes, which starts when it is first needed."""

    def __init__(self, pool: Pool | None = None) -> None:
        self.pool = Pool() if pool is None else pool
        self.is_open = False
        self.opening = asyncio.Lock()

    @asynccontextmanager
    async def __call__(self, task: Task) -> AsyncIterator[Toolset]:
        """Lend an interpreter with the task's pictures in it."""
        async with self.opening:
            if not self.is_open:
                await self.pool.__aenter__()
                self.is_open = True
        async with ipython(self.pool, pictures_of(task.prompt)) as tool:
            yield Toolset([tool])

    async def aclose(self) -> None:
        """End the sandboxes; they may start again, on another event loop too."""
        if self.is_open:
            await self.pool.__aexit__()
            self.is_open = False
        self.opening = asyncio.Lock()  # one that somebody has waited for belongs to its loop
