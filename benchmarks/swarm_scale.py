"""How many agent tasks one process holds: memory of each, tasks a second, from 10^2 to 10^5.

    python benchmarks/swarm_scale.py                       # 10^2 to 10^5, each in a fresh process
    python benchmarks/swarm_scale.py --sizes 100 1000

Everything is real but the sampling: the rollout manager, environments, conversations, rendering and
parsing of every turn, tools, swarms two deep. The engine is a stub that answers by script. A root
has 7 sub-agents at the same time, each of which has 6: 50 agents, of which 42 look something up
before they answer. The stub holds every one of these 42 until all agents of all rollouts are under
way: then as many are concurrent as the size says, and the memory is read.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.library import Library, Page
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.chat.tokenizer import Tokenizer
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.rollout_manager import RolloutManager
from moonlit.rl.swarm_environment import SwarmEnvironment

GROUP_SIZE, LEADS, READERS = 2, 7, 6
AGENTS_PER_GROUP = GROUP_SIZE * (1 + LEADS + LEADS * READERS)
STEPS_PER_ROLLOUT = 2 * (1 + LEADS + LEADS * READERS)
TOKENIZER = Tokenizer.embedded()
LIBRARY = Library([Page("Bela", "Bela 42")])
TASK = Task(
    prompt=[Message(role="user", content="Give the age of Bela.")],
    domain="agentic",
    environment="scale",
    answer=None,
)


@dataclass(slots=True)
class Gate:
    """Holds readers until all of them are there."""

    num_readers: int
    num_waiting: int = 0
    opens: asyncio.Event = field(default_factory=asyncio.Event)
    began_s: float = 0.0
    full_s: float = 0.0
    full_bytes: int = 0

    async def wait(self) -> None:
        """Wait for the last one, who measures."""
        self.num_waiting += 1
        if self.num_waiting == self.num_readers:
            self.full_s, self.full_bytes = time.perf_counter(), resident_bytes()
            self.opens.set()
        await self.opens.wait()


@dataclass(slots=True)
class Stub:
    """An engine that says the turns of a script in order, to every dialogue."""

    turns: list[list[int]]
    gate: Gate | None = None
    num_sampled_tokens: int = 0

    async def generate(self, request: Request) -> Completion:
        """Say the dialogue's next turn; before the first one, wait at the gate."""
        place = next(request.session)
        if place == 0 and self.gate is not None:
            await self.gate.wait()
        ids = self.turns[place]
        self.num_sampled_tokens += len(ids)
        return Completion(
            token_ids=ids, behavior_logprobs=[-1.0] * len(ids), policy_versions=[0] * len(ids)
        )

    @contextmanager
    def session(self) -> Iterator[Iterator[int]]:
        """Count a dialogue's turns."""
        yield iter(range(len(self.turns)))

    async def update_weights(self, module: Any, version: int) -> None:
        """Have none."""

    async def pause(self) -> None:
        """Sample nothing anyway."""

    async def resume(self) -> None:
        """Go on."""

    def close(self) -> None:
        """End."""


class NoJudge:
    """Pays nothing."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return nothing."""
        return {}


def says(text: str) -> list[int]:
    """Return an answer's ids."""
    return [*TOKENIZER.encode(text), TOKENIZER.special.im_end_id]


def calls(*named: tuple[str, dict[str, str]]) -> list[int]:
    """Return the ids of a turn that calls tools."""
    special = TOKENIZER.special
    ids = [special.tool_calls_section_begin_id]
    for place, (name, arguments) in enumerate(named):
        ids += [
            special.tool_call_begin_id,
            *TOKENIZER.encode(f"functions.{name}:{place}"),
            special.tool_call_argument_begin_id,
            *TOKENIZER.encode(json.dumps(arguments)),
            special.tool_call_end_id,
        ]
    return [*ids, special.tool_calls_section_end_id, special.im_end_id]


def delegation(kind: str, num: int) -> list[list[int]]:
    """Create one sub-agent, assign it ``num`` tasks in the same turn, then answer."""
    create = ("create_subagent", {"name": kind, "system_prompt": "Find it."})
    assign = [("assign_task", {"agent": kind, "prompt": f"part {n}"}) for n in range(num)]
    return [calls(create, *assign), says("42")]


def talk(stub: Stub) -> Conversation:
    """Return a conversation with a stub."""
    return Conversation(
        engine=stub, tokenizer=TOKENIZER, max_positions=4096, max_new_tokens=1024, max_turns=4
    )


def manager(gate: Gate) -> RolloutManager:
    """Return a rollout manager over trees of agents two deep."""

    @asynccontextmanager
    async def library(task: Task):
        yield Toolset(LIBRARY.tools())

    readers = Stub([calls(("open", {"title": "Bela"})), says("Bela is 42")], gate=gate)
    leads = talk(Stub(delegation("reader", READERS)))
    environment = SwarmEnvironment(
        workers={
            "lead": PolicySubAgent(policy=leads, toolbox=library, delegates=True),
            "reader": PolicySubAgent(policy=talk(readers), toolbox=library),
        },
        toolbox=library,
        judge=NoJudge(),
        reward=ParlReward(parallel_weight=0.1, finish_weight=0.1, annealed_by=0.5, cap=4),
        limits=SwarmLimits(max_depth=2, max_agents=16, max_assignments=64),
    )
    return RolloutManager(
        task_of=lambda number: TASK,
        environment=environment,
        policy=talk(Stub(delegation("lead", LEADS))),
        group_size=GROUP_SIZE,
    )


def resident_bytes() -> int:
    """Return the memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(size: int) -> dict[str, float]:
    """Hold so many agent tasks at the same time, then finish them all."""
    num_groups = size // AGENTS_PER_GROUP
    gate = Gate(num_groups * GROUP_SIZE * LEADS * READERS)
    rollouts = manager(gate)
    gc.collect()
    empty_bytes, began_s = resident_bytes(), time.perf_counter()
    cpu_began_s = time.process_time()
    groups = rollouts.collect(num_groups)
    ended_s, cpu_ended_s = time.perf_counter(), time.process_time()
    rollouts.close()
    done = [one for group in groups for one in group.trajectories]
    wrong = [one for one in done if one.error or one.metrics["total_steps"] != STEPS_PER_ROLLOUT]
    if wrong or len(done) != num_groups * GROUP_SIZE:
        raise RuntimeError(f"{len(wrong)} of {len(done)} rollouts went wrong: {wrong[0].error}")
    return {
        "size": size,
        "kib_per_task": (gate.full_bytes - empty_bytes) / size / 1024,
        "start_s": gate.full_s - began_s,
        "total_s": ended_s - began_s,
        "tasks_per_s": size / (ended_s - began_s),
        "tasks_per_cpu_s": size / (cpu_ended_s - cpu_began_s),
    }


def main() -> None:
    """Measure each size in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    sizes = parser.parse_args().sizes
    if any(size < AGENTS_PER_GROUP or size % AGENTS_PER_GROUP for size in sizes):
        sys.exit(f"--sizes: want multiples of {AGENTS_PER_GROUP}, the agents of a group")
    print(
        "| concurrent tasks | KiB a task | all under way s | all done s | tasks/s | tasks/cpu s |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (size,))
        print(
            f"| {size:,} | {row['kib_per_task']:.1f} | {row['start_s']:.1f} | "
            f"{row['total_s']:.1f} | {row['tasks_per_s']:.0f} | {row['tasks_per_cpu_s']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
