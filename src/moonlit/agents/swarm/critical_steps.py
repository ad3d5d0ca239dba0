r"""Critical steps: how long a swarm takes if everything parallel is parallel.

$$\mathrm{CriticalSteps} = \sum_t \left( S_{main}(t) + \max_i S_{sub,i}(t) \right)$$

Stage t is one action of the orchestrator: a tool call of its own, or the sub-agents it started in
one turn, of which the slowest counts. So calling many tools in one turn does not hide steps. A
sub-agent's steps are its own critical steps, so swarms may be nested.
Steps of attempts that failed were taken too, one attempt after another.

Source: technical report (arXiv:2602.02276), Sec. 3; training and evaluation are bounded by them.
"""

from collections import defaultdict
from collections.abc import Sequence

from moonlit.batch import Trajectory
from moonlit.chat.messages import Message

SWARM_TOOLS = ("create_subagent", "assign_task")
LOST_STEPS = "lost_steps"
"""Metric of a sub-agent's rollout: critical steps of the attempts that were lost [steps] ..."""
LOST_TOTAL_STEPS = "lost_total_steps"
"""... and all their steps, those of their own sub-agents among them [steps]."""


def critical_steps(trajectory: Trajectory) -> int:
    """Return the critical steps of a rollout and all below it.

    A sub-agent belongs to the stage of the turn that called it.
    """
    slowest: dict[int | None, int] = defaultdict(int)
    for child in trajectory.children:
        slowest[child.called_by] = max(slowest[child.called_by], steps_with_attempts(child))
    return own_steps(trajectory) + sum(slowest.values())


def steps_with_attempts(child: Trajectory) -> int:
    """Return a sub-agent's critical steps, those of its failed attempts before it."""
    return critical_steps(child) + int(child.metrics.get(LOST_STEPS, 0))


def total_steps(trajectory: Trajectory) -> int:
    """Return the steps of everybody, as if nothing ran at the same time."""
    below = sum(
        total_steps(child) + int(child.metrics.get(LOST_TOTAL_STEPS, 0))
        for child in trajectory.children
    )
    return own_steps(trajectory) + below


def own_steps(trajectory: Trajectory) -> int:
    """Return the actions of the rollout's own agent."""
    return sum(map(steps_of, trajectory.messages))


def steps_of(message: Message) -> int:
    """Return the actions of one turn.

    Each tool call is one, but for those that make and use a swarm: they are one together. A turn
    without a call is one.
    """
    if message.role != "assistant":
        return 0
    direct = sum(call.name not in SWARM_TOOLS for call in message.tool_calls)
    return direct + (direct < len(message.tool_calls) or not message.tool_calls)


def widest_stage(trajectory: Trajectory) -> list[Trajectory]:
    """Return the sub-agents of the stage in which most ran at the same time."""
    stages: dict[int | None, list[Trajectory]] = defaultdict(list)
    for child in trajectory.children:
        stages[child.called_by].append(child)
    return max(stages.values(), key=len, default=[])


def num_used(children: Sequence[Trajectory]) -> int:
    """Return how many agents were given a task, those of sub-agents among them."""
    own = {child.agent for child in children}
    return len(own) + sum(num_used(child.children) for child in children)


def num_retries(children: Sequence[Trajectory]) -> int:
    """Return the attempts after the first ones, those of sub-agents' sub-agents among them."""
    return sum(int(one.metrics["num_retries"]) + num_retries(one.children) for one in children)


def tokens_by_role(trajectory: Trajectory) -> tuple[int, int]:
    """Return the tokens that the orchestrator wrote, and those of all sub-agents."""
    below: Sequence[tuple[int, int]] = [tokens_by_role(child) for child in trajectory.children]
    return trajectory.num_tokens, sum(own + theirs for own, theirs in below)
