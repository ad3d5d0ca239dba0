r"""PARL's reward: $r = \lambda_1 r_{parallel} + \lambda_2 r_{finish} + r_{perf}$.

The first term works against serial collapse (never delegating), the second against spurious
parallelism (delegating what never finishes); both weights are annealed to zero, so that in the end
the outcome alone counts. The report states neither the functions nor the weights: all forms here
are ours, and none of them pays for children that did no work of their own.

Source: technical report (arXiv:2602.02276), Sec. 3.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moonlit.agents.swarm.critical_steps import widest_stage
from moonlit.agents.swarm.findings import task_of
from moonlit.batch import Trajectory
from moonlit.checks import is_count, is_number

WORK = "num_useful_calls"
"""Metric of a sub-agent's rollout: tool calls that returned something."""
WORDS = re.compile(r"[^\W_]+")


def r_parallel(trajectory: Trajectory, *, cap: int) -> float:
    """Distinct sub-agents that did useful work in the widest stage, up to ``cap``, over ``cap``.

    One child counts for nothing: a chain of single children is not parallel.
    Source: Sec. 3 names an instantiation reward; the form is ours.
    """
    if cap < 2:
        raise ValueError(f"cap={cap}: at least two sub-agents make something parallel")
    working = {child.agent for child in distinct(finished(widest_stage(trajectory)))}
    return min(len(working), cap) / cap if len(working) > 1 else 0.0


def r_finish(trajectory: Trajectory) -> float:
    """Share of the assigned tasks that were finished with work, by two sub-agents at least.

    A task that was given twice is finished once, and still assigned twice. One child that does
    everything splits nothing, and earns nothing.
    Source: Sec. 3 names the sub-agents' finish rate; what counts as finished is ours.
    """
    done = distinct(finished(trajectory.children))
    is_split = len({child.agent for child in done}) > 1
    return len(done) / len(trajectory.children) if is_split else 0.0


def finished(children: Sequence[Trajectory]) -> list[Trajectory]:
    """Return those that did work: who was lost takes nothing from who did the task instead."""
    return [child for child in children if did_work(child)]


def did_work(child: Trajectory) -> bool:
    """Whether a sub-agent came to an answer by a call that returned something."""
    answered = child.error is None and child.stop_reason == "answer"
    return answered and child.metrics.get(WORK, 0) > 0


def distinct(children: Sequence[Trajectory]) -> list[Trajectory]:
    """Return the first of those that were given the same task, or made the same calls for it.

    Only letters and digits tell tasks apart; a task without any is none.
    """
    tasks: set[str] = set()
    works: set[tuple[str, ...]] = set()
    first = []
    for child in children:
        task = " ".join(WORDS.findall(task_of(child).casefold()))
        work = tuple(sorted(calls_of(child)))
        if task and task not in tasks and (not work or work not in works):
            first.append(child)
        tasks.add(task)
        works.add(work)
    return first


def calls_of(child: Trajectory) -> Iterator[str]:
    """Yield the tool calls of a sub-agent as text."""
    for message in child.messages:
        for call in message.tool_calls:
            yield f"{call.name} {json.dumps(call.arguments, sort_keys=True)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParlReward:
    """The weights of the three parts at each point of training.

    Args:
        parallel_weight: lambda 1 at the start.
        finish_weight: lambda 2 at the start.
        annealed_by: share of the run after which both are zero.
        cap: sub-agents at once beyond which there is no more to earn.

    Raises:
        ValueError: if a number is outside its range.
    """

    parallel_weight: float
    finish_weight: float
    annealed_by: float
    cap: int

    def __post_init__(self) -> None:
        for name in ("parallel_weight", "finish_weight"):
            weight = getattr(self, name)
            if not is_number(weight) or weight < 0:
                raise ValueError(f"reward.{name}={weight!r}: want weights >= 0, and finite")
        if not is_number(self.annealed_by) or not 0 < self.annealed_by <= 1:
            raise ValueError(
                f"reward.annealed_by={self.annealed_by!r}: want weights to end by a share in (0, 1]"
            )
        if not is_count(self.cap, 2):
            raise ValueError(
                f"reward.cap={self.cap!r}: want a whole number, at least 2: two sub-agents at "
                "least make something parallel"
            )

    def lambdas(self, progress: float) -> tuple[float, float]:
        """Return lambda 1 and lambda 2, linear from the start to zero.

        Args:
            progress: share of the run that is done, in [0, 1].
        """
        left = max(0.0, 1 - progress / self.annealed_by)
        return self.parallel_weight * left, self.finish_weight * left

    def parts(self, trajectory: Trajectory) -> dict[str, float]:
        """Return the two auxiliary parts."""
        return {
            "parallel": r_parallel(trajectory, cap=self.cap),
            "finish": r_finish(trajectory),
        }

    def total(self, trajectory: Trajectory, performance: float, progress: float) -> float:
        """Return the reward of a rollout whose outcome is known."""
        lambda_1, lambda_2 = self.lambdas(progress)
        parts = self.parts(trajectory)
        return lambda_1 * parts["parallel"] + lambda_2 * parts["finish"] + performance
