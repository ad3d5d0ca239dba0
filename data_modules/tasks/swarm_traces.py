"""``moonlit prepare source=swarm_traces``: dialogues that warm an orchestrator up.

Some of them work alone, step after step; the others create sub-agents and assign everything in one
turn; of those that lose tasks some give them to other agents, some do not. Which is which is drawn,
so that the warmed-up policy does both and training has something to choose from. The tools really
run.
"""

import asyncio
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Never, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from data_modules.components.dialogue_files import parse_dialogue
from data_modules.tasks.source import HELD_OUT, TRAIN, TaskSource
from data_modules.zero_vision.lines import assistant, called, line
from data_modules.zero_vision.source import write_whole, written
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.swarm import SubAgent, Swarm
from moonlit.agents.toolbox import Toolbox
from moonlit.agents.tools import Toolset, tool_message
from moonlit.batch import Task
from moonlit.chat.embedded_vocabulary import train_ranks
from moonlit.chat.messages import ToolCall
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer

SPLITS = {TRAIN: "train", HELD_OUT: "held_out"}
Turn = list[tuple[str, dict[str, Any]]]
"""Names of tools and their arguments: the calls of one turn."""


@runtime_checkable
class Script(Protocol):
    """How a family's tasks are worked on."""

    toolbox: Toolbox
    """Of a single agent, and beside the swarm's tools."""

    def worker(self) -> SubAgent:
        """Return who serves as sub-agent."""
        ...

    def serial(self, task: Task) -> list[Turn]:
        """Return the turns of a single agent."""
        ...

    def parallel(self, task: Task) -> list[Turn]:
        """Return the turns of an orchestrator."""
        ...

    def answer(self, task: Task) -> str:
        """Return the last message."""
        ...


class SwarmTraces:
    """Makes the set.

    Args:
        folder: where ``train.jsonl`` and ``held_out.jsonl`` go.
        source: of the tasks; traces take training tasks from ``first`` on.
        script: how they are worked on.
        first: number of the first task.
        num_train: traces to train on.
        num_held_out: traces to score.
        parallel_fraction: of the traces that use a swarm.
        single_fraction: of the traces that are offered none, and work alone.
        reassign_fraction: of the swarms that lost tasks, and give them to agents that lost none.
        vocabulary: base ranks of a tokenizer that is learnt from the traces and written to
            ``folder/tokenizer``; None: none is.
        seed: of the draw.
    """

    def __init__(
        self,
        *,
        folder: str,
        source: TaskSource,
        script: Script,
        first: int,
        num_train: int,
        num_held_out: int,
        parallel_fraction: float,
        single_fraction: float,
        reassign_fraction: float,
        vocabulary: int | None,
        seed: int,
    ) -> None:
        shares = (parallel_fraction, single_fraction)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"parallel_fraction={parallel_fraction}, single_fraction={single_fraction}: want"
                " shares of at most 1 together"
            )
        if not 0 <= reassign_fraction <= 1:
            raise ValueError(f"reassign_fraction={reassign_fraction}: want it in [0, 1]")
        self.folder, self.source, self.script = Path(folder), source, script
        self.first, self.num = first, {TRAIN: num_train, HELD_OUT: num_held_out}
        self.parallel_fraction, self.single_fraction = shares
        self.reassign_fraction = reassign_fraction
        self.vocabulary, self.seed = vocabulary, seed

    def prepare_data(self) -> None:
        """Write both splits."""
        for split, name in SPLITS.items():
            traces = asyncio.run(self.traces(split))
            if split == TRAIN and self.vocabulary is not None:
                self.learn_vocabulary(self.vocabulary, traces)
            write_whole(self.folder / f"{name}.jsonl", "".join(map(written, traces)))
            console = Console(stderr=True, markup=False)
            console.print(f"wrote {self.folder / name}.jsonl: {len(traces):,} traces")

    def learn_vocabulary(self, num_base_ranks: int, traces: Iterable[dict[str, Any]]) -> None:
        """Write a tokenizer of the traces' own.

        Raises:
            ValueError: if they do not have so many different pieces.
        """
        ranks = train_ranks(texts_of(traces), num_base_ranks)
        if len(ranks) < num_base_ranks:
            raise ValueError(f"vocabulary={num_base_ranks}: the traces have only {len(ranks)}")
        Tokenizer(ranks).save(self.folder / "tokenizer")

    async def traces(self, split: str) -> list[dict[str, Any]]:
        """Make the traces of one split."""
        made = []
        for number in range(self.num[split]):
            rng = np.random.default_rng([self.seed, number])
            draw = rng.random()
            task = self.source(split, self.first + number)
            made.append(
                await trace(
                    task,
                    self.script,
                    is_parallel=bool(draw < self.parallel_fraction),
                    has_swarm=bool(draw < 1 - self.single_fraction),
                    reassigns=bool(rng.random() < self.reassign_fraction),
                )
            )
        return made


async def trace(
    task: Task, script: Script, *, is_parallel: bool, has_swarm: bool, reassigns: bool = False
) -> dict[str, Any]:
    """Work on a task by script, and write the dialogue down."""
    swarm = Swarm(
        {"worker": script.worker()}, task, limits=SwarmLimits(), num_prompt=1, seed=0
    )  # fmt: skip
    messages: list[dict[str, Any]] = [
        {"role": one.role, "content": one.words} for one in task.prompt
    ]
    async with script.toolbox(task) as own:
        tools = Toolset([*own.tools, *(swarm.tools if has_swarm else ())])
        turns = script.parallel(task) if is_parallel else script.serial(task)
        for turn in turns:
            outputs = [await tools.run(ToolCall(name, given)) for name, given in turn]
            calls = [
                (name, given, tool_message(name, name, output).words)
                for (name, given), output in zip(turn, outputs, strict=True)
            ]
            messages += without_thinking(called("", calls, messages))
            lost = [call for call, output in zip(turn, outputs, strict=True) if output.error]
            if lost and reassigns and turn is turns[0]:
                turns.append(reassigned(lost, turn))
    messages.append(assistant(script.answer(task), None))
    provenance = {"source": "swarm_traces", "parallel": is_parallel, "truth": task.answer}
    return line(messages, tools.declarations, provenance)


def reassigned(lost: Turn, turn: Turn) -> Turn:
    """Give lost tasks to those of a turn's agents that lost none, in turn.

    Raises:
        ValueError: if all of them lost some.
    """
    losers = {given["agent"] for _, given in lost}
    others = [
        given["name"]
        for name, given in turn
        if name == "create_subagent" and given["name"] not in losers
    ]
    if not others:
        raise ValueError(f"nobody is left to do what {', '.join(sorted(losers))} lost")
    return [
        (name, {**given, "agent": others[place % len(others)]})
        for place, (name, given) in enumerate(lost)
    ]


def texts_of(traces: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the text between special tokens, as the chat template writes it."""
    tokenizer = Tokenizer.embedded()
    special = tokenizer.special.num_base_ranks
    for one in traces:
        dialogue = parse_dialogue(one, media=no_media)
        ids = render(dialogue.messages, tokenizer, tools=dialogue.tools).input_ids
        for is_text, run in groupby(ids, key=lambda token_id: token_id < special):
            if is_text:
                yield tokenizer.decode(list(run))


def no_media(kind: str, url: Any) -> Never:
    """Refuse a medium: traces have none."""
    raise ValueError(f"a trace with a medium of type {kind!r}")


def without_thinking(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make turns instant ones."""
    return [
        {key: value for key, value in message.items() if key != "reasoning_content"}
        for message in messages
    ]
