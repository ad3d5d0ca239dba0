"""Rollouts of swarms put together by hand."""

from moonlit.agents.swarm.critical_steps import LOST_STEPS, LOST_TOTAL_STEPS
from moonlit.agents.swarm.reward import WORK
from moonlit.batch import Segment, Trajectory
from moonlit.chat.messages import Message, ToolCall


def turn(*names: str) -> Message:
    """A turn that calls these tools."""
    return Message(role="assistant", content="", tool_calls=[ToolCall(n, {}) for n in names])


def agent(
    *turns: Message,
    children: list[Trajectory] | None = None,
    called_by: int | None = None,
    name: str = "w0",
    task: str = "read page 1",
    work: int = 1,
    lost: int = 0,
    stop_reason: str = "answer",
    error: str | None = None,
) -> Trajectory:
    tokens = len(turns)
    return Trajectory(
        segments=[
            Segment(
                input_ids=[1] * tokens,
                is_sampled=[True] * tokens,
                behavior_logprobs=[0.0] * tokens,
                policy_versions=[0] * tokens,
            )
        ],
        messages=list(turns),
        spans=[],
        stop_reason=stop_reason,
        text="found it" if error is None else "",
        agent=name,
        prompt=[Message(role="user", content=task)],
        called_by=called_by,
        children=children or [],
        metrics={WORK: float(work), LOST_STEPS: float(lost), LOST_TOTAL_STEPS: float(lost)},
        error=error,
    )


def worker(number: int, called_by: int = 1, steps: int = 2, **more) -> Trajectory:
    """A sub-agent with a task of its own."""
    more = {"name": f"w{number}", "task": f"read page {number}", **more}
    return agent(*[turn()] * steps, called_by=called_by, **more)


def orchestrator(*children: Trajectory, turns: int = 2) -> Trajectory:
    """One that assigned everything and answered."""
    return agent(*[turn("assign_task")] * (turns - 1), turn(), children=list(children))
