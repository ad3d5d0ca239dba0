"""The swarm's tools: create a sub-agent, assign it a task.

The calls of one turn run at the same time. Only a sub-agent's last message comes back, as a tool
result with who said it and what it read (context sharding); what it did to get there stays with
it. Whatever goes wrong is a tool result too. A sub-agent may have a swarm of its own, as deep as
the limits allow.

Source: technical report (arXiv:2602.02276), Sec. 3 and App. E.8 (names and arguments of the tools).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from moonlit.agents.swarm.assignment import FAILURES, Assignment, failed, failure_of
from moonlit.agents.swarm.critical_steps import num_retries, num_used, steps_of
from moonlit.agents.swarm.findings import Findings, told
from moonlit.agents.swarm.limits import SwarmLimits, Tally
from moonlit.agents.swarm.reward import did_work
from moonlit.agents.tools import Tool, ToolOutput, tool_message
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

TEXT = {"type": "string", "minLength": 1}
CREATE = {
    "type": "object",
    "properties": {"name": TEXT, "system_prompt": TEXT},
    "required": ["name", "system_prompt"],
    "additionalProperties": False,
}
ASSIGN = {
    "type": "object",
    "properties": {"agent": TEXT, "prompt": TEXT},
    "required": ["agent", "prompt"],
    "additionalProperties": False,
}
CONFLICTS = "conflicts"
"""Stands for the name and the id of what a turn's findings disagree about."""


@runtime_checkable
class SubAgent(Protocol):
    """Does one task and comes back with one message."""

    async def work(
        self, prompt: list[Message], task: Task, *, seed: int, swarm: "Swarm"
    ) -> Trajectory:
        """Return the rollout, whatever became of it.

        Args:
            prompt: the sub-agent's system prompt and its task.
            task: what the orchestrator works on: tools may depend on it.
            seed: of this attempt.
            swarm: its own, to be shown its messages; the tools are its to use or not.

        Raises:
            OSError, FloatingPointError, ContextOverflowError, CancelledError: where the attempt is
                lost; any other exception is a fault of ours, and ends the rollout.
            SystemExit, KeyboardInterrupt, RunEndingError: end the run.
        """
        ...


def require_sub_agent(key: str, worker: object) -> None:
    """Refuse what cannot work as a sub-agent.

    Raises:
        ValueError: naming the key.
    """
    if not callable(getattr(worker, "work", None)):
        told = "null" if worker is None else type(worker).__qualname__
        raise ValueError(f"{key}={told}: want a sub-agent, which has a method work")


class Swarm:
    """The sub-agents of one agent's rollout.

    Args:
        workers: kinds of sub-agents by name; a created agent is of the kind whose name it begins
            with, else of the first kind.
        task: what the orchestrator works on.
        limits: of the rollout.
        num_prompt: messages before the agent's first turn.
        seed: of the rollout.
        depth: of the agent: 0 is the orchestrator.
        tally: what the whole rollout has used; None: nothing yet.
        agent: whose swarm it is.
    """

    def __init__(
        self,
        workers: Mapping[str, SubAgent],
        task: Task,
        *,
        limits: SwarmLimits,
        num_prompt: int,
        seed: int,
        depth: int = 0,
        tally: Tally | None = None,
        agent: str = "orchestrator",
    ) -> None:
        self.workers, self.task, self.limits, self.seed = workers, task, limits, seed
        self.depth, self.tally, self.agent = depth, Tally() if tally is None else tally, agent
        self.turn = num_prompt - 1
        self.system_prompts: dict[str, str] = {}
        self.assignments: list[Assignment] = []
        self.own_steps = 0
        self.bug: Exception | None = None
        self.findings = Findings(max_chars=limits.max_result_chars)

    @property
    def tools(self) -> list[Tool]:
        """The two tools."""
        kinds = f" Its name begins with its kind: {', '.join(self.workers)}."
        return [
            Tool(
                name="create_subagent",
                description="Register a sub-agent under a unique name."
                + (kinds if len(self.workers) > 1 else ""),
                parameters=CREATE,
                call=self.create,
            ),
            Tool(
                name="assign_task",
                description="Let a sub-agent do a task. Calls of one turn run at the same time.",
                parameters=ASSIGN,
                call=self.assign,
            ),
        ]

    def watch(self, message: Message) -> None:
        """Count the messages of the agent's dialogue: a call belongs to the last turn.

        Raises:
            Exception: what a sub-agent raised that is no fault of a sub-agent.
        """
        if self.bug is not None:
            raise self.bug
        self.turn += 1
        self.own_steps += steps_of(message)

    async def create(self, arguments: dict[str, Any]) -> ToolOutput:
        """Register a configuration."""
        name = arguments["name"]
        if (complaint := self.too_deep()) is not None:
            return ToolOutput(error=complaint)
        if name in self.system_prompts:
            return ToolOutput(error=f"there is a sub-agent {name[:100]!r} already")
        if self.tally.num_agents >= self.limits.max_agents:
            return ToolOutput(error=f"at most {self.limits.max_agents} sub-agents may be created")
        self.tally.num_agents += 1
        self.system_prompts[name] = arguments["system_prompt"]
        return ToolOutput(text=f"created {name[:100]}")

    async def assign(self, arguments: dict[str, Any]) -> ToolOutput:
        """Run a sub-agent; return its last message."""
        name = arguments["agent"]
        if (complaint := self.too_deep() or self.spent()) is not None:
            return ToolOutput(error=complaint)
        if name not in self.system_prompts:
            known = ", ".join(self.system_prompts) or "none yet"
            return ToolOutput(error=f"there is no sub-agent {name[:100]!r}; there are {known}")
        self.tally.num_assigned += 1
        prompt = [
            Message(role="system", content=self.system_prompts[name]),
            Message(role="user", content=arguments["prompt"]),
        ]
        assignment = Assignment(agent=name, prompt=prompt, called_by=self.turn)
        self.assignments.append(assignment)
        seed = seed_of(self.seed, len(self.assignments))
        try:
            child = await assignment.cancellable(self.attempts(assignment, seed))
        except Exception as error:  # a bug: ends the rollout once the turn's siblings are done
            self.bug = error
            raise
        assignment.finish(child)
        return self.result(child)

    async def attempts(self, assignment: Assignment, seed: int) -> Trajectory:
        """Let a sub-agent try until it answers, each time with a fresh seed and a fresh swarm.

        Nobody tries again once no step is left.
        """
        child = failed("budget: no critical step is left")
        for retry in range(self.limits.max_retries + 1):
            if (left := self.steps_left(assignment)) < 1:
                break
            assignment.begin(self.below(assignment, seed + retry, max_critical_steps=left))
            child = await assignment.attempt(
                self.worker_of(assignment.agent),
                self.task,
                seed=seed + retry,
                timeout_s=self.limits.timeout_s,
            )
            if child.error is None and child.stop_reason == "answer":
                break
        return child

    def steps_left(self, assignment: Assignment) -> int:
        """Critical steps that the next attempt may take."""
        used = self.own_steps + self.stages_steps(but=assignment.called_by)
        return self.limits.max_critical_steps - used - assignment.steps_if_lost

    def below(self, assignment: Assignment, seed: int, *, max_critical_steps: int) -> "Swarm":
        """Return the swarm of a sub-agent."""
        return Swarm(
            self.workers,
            self.task,
            limits=replace(self.limits, max_critical_steps=max_critical_steps),
            num_prompt=len(assignment.prompt),
            seed=seed,
            depth=self.depth + 1,
            tally=self.tally,
            agent=assignment.agent,
        )

    def too_deep(self) -> str | None:
        """Say that this agent may have no sub-agents; None: it may."""
        if self.depth < self.limits.max_depth:
            return None
        return f"sub-agents may be nested {self.limits.max_depth} deep: do it yourself"

    def is_spent(self) -> bool:
        """Whether no critical step is left, not even to answer."""
        return self.critical_steps >= self.limits.max_critical_steps

    def spent(self) -> str | None:
        """Say which limit allows no further task; None: none."""
        if self.tally.num_assigned >= self.limits.max_assignments:
            return f"at most {self.limits.max_assignments} tasks may be assigned"
        if self.is_spent():
            return f"the {self.limits.max_critical_steps} critical steps are used"
        return None

    @property
    def children(self) -> list[Trajectory]:
        """Sub-agents' rollouts in the order of their tasks, whoever came back first."""
        return [one.child for one in self.assignments if one.child is not None]

    @property
    def critical_steps(self) -> int:
        """Critical steps so far, those of sub-agents at work among them."""
        return self.own_steps + self.stages_steps()

    @property
    def total_steps(self) -> int:
        """Steps of everybody so far."""
        return self.own_steps + sum(one.total_steps for one in self.assignments)

    def stages_steps(self, but: int | None = None) -> int:
        """Critical steps of all stages so far; ``but`` one."""
        slowest: dict[int, int] = defaultdict(int)
        for one in self.assignments:
            slowest[one.called_by] = max(slowest[one.called_by], one.critical_steps)
        return sum(steps for stage, steps in slowest.items() if stage != but)

    def worker_of(self, name: str) -> SubAgent:
        """Return the kind of sub-agent that a name asks for."""
        kinds = [kind for kind in self.workers if name.startswith(kind)]
        return self.workers[max(kinds, key=len) if kinds else next(iter(self.workers))]

    def result(self, child: Trajectory) -> ToolOutput:
        """Return what the agent is told: words of another, never an instruction."""
        if child.error is not None:
            return ToolOutput(error=f"{child.agent} failed: {child.error[:200]}")
        if child.stop_reason != "answer":
            return ToolOutput(error=f"{child.agent} came to no answer ({child.stop_reason})")
        text, provenance = self.cut(child.text), self.findings.of(child).provenance
        return ToolOutput(text=f"{child.agent}: {text}" + (f"\n{provenance}" if provenance else ""))

    def cut(self, text: str) -> str:
        """Cut a text at the limit of results, and say so."""
        more = len(text) - self.limits.max_result_chars
        return text if more <= 0 else f"{text[:-more]}\n[{more} more characters were cut off]"

    def disagreements(self) -> Message | None:
        """Return what findings disagree about and the agent was not told yet; None: nothing."""
        if not (new := self.findings.new_conflicts(self.children)):
            return None
        return tool_message(CONFLICTS, CONFLICTS, ToolOutput(text=self.cut(told(new))))

    def metrics(self) -> dict[str, float]:
        """Return what happened, for the log; tasks are finished by the agent's own sub-agents."""
        children, num_assigned = self.children, len(self.assignments)
        finished = sum(map(did_work, children))
        failures = Counter(map(failure_of, children))
        return {
            "agents_created": float(self.tally.num_agents),
            "agents_used": float(num_used(children)),
            "tasks_assigned": float(self.tally.num_assigned),
            "finish_rate": finished / num_assigned if num_assigned else 0.0,
            "retries": float(num_retries(children)),
            "conflicts": float(len(self.findings.conflicts(self.children))),
            **{f"failed_{kind}": failures[kind] / max(1, num_assigned) for kind in FAILURES},
        }


def seed_of(seed: int, number: int) -> int:
    """Seed of one assignment, with room for its retries."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") << 8
