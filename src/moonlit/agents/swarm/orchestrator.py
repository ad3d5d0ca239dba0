"""The orchestrator's tools: create a sub-agent, assign it a task.

The calls of one turn run at the same time. Only a sub-agent's last message comes back, as a tool
result with who said it (context sharding); what it did to get there stays with it. Whatever goes
wrong is a tool result too.

Source: technical report (arXiv:2602.02276), Sec. 3 and App. E.8 (names and arguments of the tools).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moonlit.agents.swarm.critical_steps import steps_of, steps_with_attempts
from moonlit.agents.swarm.reward import did_work
from moonlit.agents.swarm.subagent import SubAgent, attempt
from moonlit.agents.tools import Tool, ToolOutput
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmLimits:
    """How much of a swarm one rollout may have. The report states step limits only: these are ours.

    Args:
        max_agents: that may be created.
        max_assignments: in the whole rollout.
        max_critical_steps: no task is assigned past them (the report bounds episodes by these).
        max_result_chars: of a sub-agent's message; the rest is cut off, and said so.
        max_retries: of a sub-agent that failed, each with a fresh seed.
        timeout_s: of one attempt; None: none.
    """

    max_agents: int = 32
    max_assignments: int = 64
    max_critical_steps: int = 100
    max_result_chars: int = 4000
    max_retries: int = 1
    timeout_s: float | None = None


class Swarm:
    """The sub-agents of one rollout.

    Args:
        workers: kinds of sub-agents by name; a created agent is of the kind whose name it begins
            with, else of the first kind.
        task: what the orchestrator works on.
        limits: of the rollout.
        num_prompt: messages before the orchestrator's first turn.
        seed: of the rollout.
    """

    def __init__(
        self,
        workers: Mapping[str, SubAgent],
        task: Task,
        *,
        limits: SwarmLimits,
        num_prompt: int,
        seed: int,
    ) -> None:
        self.workers, self.task, self.limits, self.seed = workers, task, limits, seed
        self.turn = num_prompt - 1
        self.system_prompts: dict[str, str] = {}
        self.done: dict[int, Trajectory] = {}
        self.num_assigned = self.own_steps = 0
        self.stage_steps: dict[int, int] = {}

    @property
    def tools(self) -> list[Tool]:
        """The two tools."""
        return [
            Tool(
                name="create_subagent",
                description="Register a sub-agent under a unique name.",
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
        """Count the messages of the orchestrator's dialogue: a call belongs to the last turn."""
        self.turn += 1
        self.own_steps += steps_of(message)

    async def create(self, arguments: dict[str, Any]) -> ToolOutput:
        """Register a configuration."""
        name = arguments["name"]
        if name in self.system_prompts:
            return ToolOutput(error=f"there is a sub-agent {name[:100]!r} already")
        if len(self.system_prompts) >= self.limits.max_agents:
            return ToolOutput(error=f"at most {self.limits.max_agents} sub-agents may be created")
        self.system_prompts[name] = arguments["system_prompt"]
        return ToolOutput(text=f"created {name[:100]}")

    async def assign(self, arguments: dict[str, Any]) -> ToolOutput:
        """Run a sub-agent; return its last message."""
        name, turn = arguments["agent"], self.turn
        if name not in self.system_prompts:
            known = ", ".join(self.system_prompts) or "none yet"
            return ToolOutput(error=f"there is no sub-agent {name[:100]!r}; there are {known}")
        if self.num_assigned >= self.limits.max_assignments:
            return ToolOutput(error=f"at most {self.limits.max_assignments} tasks may be assigned")
        if self.critical_steps >= self.limits.max_critical_steps:
            return ToolOutput(error=f"the {self.limits.max_critical_steps} critical steps are used")
        self.num_assigned += 1
        number = self.num_assigned
        prompt = [
            Message(role="system", content=self.system_prompts[name]),
            Message(role="user", content=arguments["prompt"]),
        ]
        child = await attempt(
            self.worker_of(name),
            prompt,
            self.task,
            seed=seed_of(self.seed, number),
            max_retries=self.limits.max_retries,
            timeout_s=self.limits.timeout_s,
        )
        child.agent, child.prompt, child.called_by = name, prompt, turn
        self.done[number] = child
        steps = steps_with_attempts(child)
        self.stage_steps[turn] = max(self.stage_steps.get(turn, 0), steps)
        return self.result(child)

    @property
    def children(self) -> list[Trajectory]:
        """Sub-agents' rollouts in the order of their tasks, whoever came back first."""
        return [self.done[number] for number in sorted(self.done)]

    @property
    def critical_steps(self) -> int:
        """Critical steps of the rollout so far."""
        return self.own_steps + sum(self.stage_steps.values())

    def worker_of(self, name: str) -> SubAgent:
        """Return the kind of sub-agent that a name asks for."""
        kinds = [kind for kind in self.workers if name.startswith(kind)]
        return self.workers[max(kinds, key=len) if kinds else next(iter(self.workers))]

    def result(self, child: Trajectory) -> ToolOutput:
        """Return what the orchestrator is told: words of another, never an instruction."""
        if child.error is not None:
            return ToolOutput(error=f"{child.agent} failed: {child.error[:200]}")
        if child.stop_reason != "answer" or not child.text.strip():
            return ToolOutput(error=f"{child.agent} came to no answer ({child.stop_reason})")
        text, limit = child.text, self.limits.max_result_chars
        if len(text) > limit:
            text = f"{text[:limit]}\n[{len(text) - limit} more characters were cut off]"
        return ToolOutput(text=f"{child.agent}: {text}")

    def metrics(self) -> dict[str, float]:
        """Return what happened, for the log."""
        used = {child.agent for child in self.children}
        finished = sum(map(did_work, self.children))
        return {
            "agents_created": float(len(self.system_prompts)),
            "agents_used": float(len(used)),
            "tasks_assigned": float(self.num_assigned),
            "finish_rate": finished / self.num_assigned if self.num_assigned else 0.0,
            "retries": sum(child.metrics.get("num_retries", 0.0) for child in self.children),
        }


def seed_of(seed: int, number: int) -> int:
    """Seed of one assignment, with room for its retries."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") << 8
