"""What to do about a context that is too small: five strategies on the same tasks.

    python benchmarks/context_strategies.py              # all sizes, three seeds: minutes
    python benchmarks/context_strategies.py --people 8 --seeds 0 --tasks 4

Pages of people are to be read, more than the context holds: *wide* asks for everybody's age,
*needle* who is of an age. Everything is real but the policy, which is a script that knows what
stands in its prompt and nothing else: what is hidden or dropped, it has forgotten. It notes an age
down before it opens the next page, reads in a drawn order, and, where it is offered sub-agents,
gives each of them a few people in its first turn; they are the same script, in contexts as small.

Source: technical report (arXiv:2602.02276), Sec. 3 and Figure 7 (context sharding against
discard-all), App. E.6. Sizes are ours.
"""

import argparse
import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from data_modules.tasks.wide_facts import WideFacts
from moonlit.agents.context import (
    REQUEST,
    ContextStrategy,
    DiscardAll,
    HideToolResult,
    KeepAll,
    Sharding,
    Summary,
)
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.agents.tables import f1
from moonlit.agents.tools import Tool, Toolset
from moonlit.agents.toolsets.library import OPEN, Library, Page
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.chat.tokenizer import Tokenizer
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.swarm_environment import SwarmEnvironment

POSITIONS, THRESHOLD = 2048, 1280
"""Of every context, and where the strategies act [tokens]."""
MAX_STEPS = 100
SHARE = 4
"""People that a sub-agent is given."""
STRATEGIES: dict[str, tuple[ContextStrategy, int]] = {
    "none, room for all": (KeepAll(), 16 * POSITIONS),
    "none": (KeepAll(), POSITIONS),
    "hide-tool-result": (HideToolResult(threshold=THRESHOLD), POSITIONS),
    "discard-all": (DiscardAll(threshold=THRESHOLD), POSITIONS),
    "summary": (Summary(threshold=THRESHOLD), POSITIONS),
    "sharding": (Sharding(), POSITIONS),
}
"""And the positions of each."""
TOKENIZER = Tokenizer.embedded()
WIDE, NEEDLE = (
    re.compile(r"Give the age of ([\w, ]+)\."),
    re.compile(r"Who of ([\w, ]+) is (\d+)\?"),
)
FACT = re.compile(r"(\w+) is (\d+) years old")
OPENED = re.compile(r'"title": "(\w+)"')
PROSE = (
    "Neighbours remember long walks along the river, whatever the weather was like.",
    "The house at the end of the street has been painted twice since then.",
    "A box of letters was found in the attic, most of them about the garden.",
    "On market days the square is full before the bells of the old church ring.",
)


class Tasks:
    """Makes tasks of a kind over so many people.

    Args:
        kind: ``wide`` or ``needle``.
        people: asked for.
        seed: of everything.
    """

    def __init__(self, kind: str, *, people: int, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.source = WideFacts(seed=seed, min_people=people, max_people=people)

    def __call__(self, number: int) -> Task:
        """Return a task; no two of its people have one age."""
        task = self.source("train", number)
        rng = random.Random(f"{self.seed}/{number}")
        ages = rng.sample(range(10, 100), len(task.answer))
        task.answer = [[name, str(age)] for (name, _), age in zip(task.answer, ages, strict=True)]
        if self.kind == "needle":
            names = ", ".join(name for name, _ in task.answer)
            _, age = rng.choice(task.answer)
            task.prompt = [Message(role="user", content=f"Who of {names} is {age}?")]
        return task


def page_of(name: str, age: str) -> Page:
    """Write a page on which the age stands among much else."""
    rng = random.Random(name)
    before, after = (" ".join(rng.choices(PROSE, k=6)) for _ in range(2))
    return Page(name, f"{before} {name} is {age} years old. {after}")


@asynccontextmanager
async def open_pages(task: Task):
    """Lend the ``open`` tool over the pages of a task's people."""
    library = Library([page_of(name, age) for name, age in task.answer])
    call = library.call_open
    yield Toolset([Tool(name="open", description="Read a page.", parameters=OPEN, call=call)])


class Judge:
    """F1 of the people and ages that the answer names: for a needle 1 or 0."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return it; without an answer it is 0."""
        wanted = {(name, age) for name, age in task.answer}
        if found := NEEDLE.search(task.prompt[0].words):
            wanted = {(name, age) for name, age in wanted if age == found[2]}
        return {"f1": f1(set(FACT.findall(trajectory.text)), wanted)}


class Reader:
    """The policy: an engine that reads its prompt, and does the next thing.

    Args:
        max_positions: of its context [tokens].
    """

    def __init__(self, max_positions: int) -> None:
        self.max_positions, self.num_sampled_tokens = max_positions, 0

    async def generate(self, request: Request) -> Completion:
        """Write a turn, as far as there is room for it."""
        prompt = TOKENIZER.decode(list(request.input_ids))
        draw = random.Random(f"{request.seed}/{len(request.input_ids)}")
        ids = self.turn(prompt, draw)
        room = self.max_positions - len(request.input_ids)
        most = min(room, request.sampling.max_new_tokens)
        ended = "stop" if len(ids) <= most else "context" if most == room else "length"
        ids = ids[:most]
        self.num_sampled_tokens += len(ids)
        zeros = [0] * len(ids)
        return Completion(
            token_ids=ids, behavior_logprobs=[0.0] * len(ids), policy_versions=zeros,
            stop_reason=ended,
        )  # fmt: skip

    def turn(self, prompt: str, draw: random.Random) -> list[int]:
        """Return the ids of the next turn, from what the prompt says alone."""
        known, opened = dict(FACT.findall(prompt)), OPENED.findall(prompt)
        if REQUEST in prompt:
            return written(notes(known))
        wide, needle = WIDE.search(prompt), NEEDLE.search(prompt)
        asked = wide or needle
        assert asked is not None, prompt
        names = asked[1].split(", ")
        found = {name: age for name, age in known.items() if needle and age == needle[2]}
        unread = [name for name in names if name not in known and (wide or name not in opened)]
        if found or not unread:
            return written(notes(known if wide else found) or "nobody")
        if "create_subagent" in prompt and "functions.assign_task" not in prompt:
            return written("", *delegation(unread, wide=bool(wide), age=needle and needle[2]))
        last = {name: known[name] for name in opened[-1:] if name in known}
        return written(notes(last), ("open", {"title": draw.choice(unread)}))

    async def update_weights(self, module: Any, version: int) -> None:
        """Have none."""

    async def pause(self) -> None:
        """Sample nothing anyway."""

    async def resume(self) -> None:
        """Go on."""

    def close(self) -> None:
        """End."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """Remember nothing."""
        yield None


def notes(known: dict[str, str]) -> str:
    """Write ages down, as the pages have them."""
    return "".join(f"{name} is {age} years old. " for name, age in known.items())


def delegation(
    names: Sequence[str], *, wide: bool, age: str | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield calls that create sub-agents and give each its share of the people."""
    shares = [names[first : first + SHARE] for first in range(0, len(names), SHARE)]
    for place, _ in enumerate(shares):
        yield "create_subagent", {"name": f"r{place}", "system_prompt": "Read."}
    for place, some in enumerate(shares):
        task = (
            f"Give the age of {', '.join(some)}." if wide else f"Who of {', '.join(some)} is {age}?"
        )
        yield "assign_task", {"agent": f"r{place}", "prompt": task}


def written(text: str, *calls: tuple[str, dict[str, str]]) -> list[int]:
    """Return the ids of a turn: words, then calls."""
    special, ids = TOKENIZER.special, TOKENIZER.encode(text)
    if calls:
        ids += [special.tool_calls_section_begin_id]
        for place, (name, arguments) in enumerate(calls):
            ids += [
                special.tool_call_begin_id,
                *TOKENIZER.encode(f"functions.{name}:{place}"),
                special.tool_call_argument_begin_id,
                *TOKENIZER.encode(json.dumps(arguments)),
                special.tool_call_end_id,
            ]
        ids += [special.tool_calls_section_end_id]
    return [*ids, special.im_end_id]


@dataclass(frozen=True, slots=True)
class Measured:
    """One rollout."""

    f1: float
    steps: float
    longest: int
    """Context of anybody [tokens]."""
    total: int
    """Tokens of all contexts."""
    stop_reason: str


async def measure(name: str, tasks: Tasks, num_tasks: int) -> list[Measured]:
    """Let a strategy work on so many tasks."""
    strategy, positions = STRATEGIES[name]

    def talk(context: ContextStrategy) -> Conversation:
        return Conversation(
            engine=Reader(positions), tokenizer=TOKENIZER, max_positions=positions,
            max_new_tokens=1024, max_turns=2 * MAX_STEPS, context=context,
        )  # fmt: skip

    worker = PolicySubAgent(policy=talk(KeepAll()), toolbox=open_pages)
    environment = SwarmEnvironment(
        workers={"worker": worker} if strategy.needs_swarm else {},
        toolbox=open_pages,
        judge=Judge(),
        reward=ParlReward(parallel_weight=0, finish_weight=0, annealed_by=1, cap=2),
        limits=SwarmLimits(max_critical_steps=MAX_STEPS),
    )
    rollouts = await asyncio.gather(
        *(environment.run(tasks(n), talk(strategy), seed=n) for n in range(num_tasks))
    )
    return [measured(one) for one in rollouts]


def measured(rollout: Trajectory) -> Measured:
    """Read what a rollout took."""
    contexts = [
        len(segment.input_ids) for one in (rollout, *rollout.children) for segment in one.segments
    ]
    metrics = rollout.metrics
    return Measured(
        metrics["performance"], metrics["critical_steps"], max(contexts), sum(contexts),
        rollout.stop_reason,
    )  # fmt: skip


def main() -> None:
    """Measure every strategy, and print a table for each kind of task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=10)
    args = parser.parse_args()
    head = ["task", "people", "strategy", "F1", "answered", "critical steps", "longest context",
            "tokens of all contexts"]  # fmt: skip
    print(f"| {' | '.join(head)} |\n| --- | ---: | --- |{' ---: |' * (len(head) - 3)}")
    for kind in ("wide", "needle"):
        for people in args.people:
            for name in STRATEGIES:
                done = [
                    one
                    for seed in args.seeds
                    for one in asyncio.run(
                        measure(name, Tasks(kind, people=people, seed=seed), args.tasks)
                    )
                ]
                answered = fmean(one.stop_reason == "answer" for one in done)
                print(
                    f"| {kind} | {people} | {name} | {fmean(one.f1 for one in done):.2f} | "
                    f"{answered:.0%} | {fmean(one.steps for one in done):.1f} | "
                    f"{max(one.longest for one in done):,} | "
                    f"{fmean(one.total for one in done):,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
