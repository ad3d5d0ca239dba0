"""``moonlit prepare source=swarm_traces``: dialogues that warm an orchestrator up.

Half of them save page after page, half create sub-agents and assign everything in one turn; which
is which is drawn, so that the warmed-up policy does both and training has something to choose
from. The tools really run.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_modules.tasks.downloads import Downloads, save_pages
from data_modules.tasks.source import HELD_OUT, TRAIN
from data_modules.zero_vision.lines import assistant, called, line, user
from data_modules.zero_vision.source import write_whole, written
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.scripted import OneCall
from moonlit.agents.swarm.swarm import Swarm
from moonlit.agents.tools import Toolset
from moonlit.batch import Task
from moonlit.chat.messages import ToolCall

SPLITS = {TRAIN: "train", HELD_OUT: "held_out"}


class SwarmTraces:
    """Makes the set.

    Args:
        folder: where ``train.jsonl`` and ``held_out.jsonl`` go.
        source: of the tasks; traces take training tasks from ``first`` on.
        first: number of the first task.
        num_train: traces to train on.
        num_held_out: traces to score.
        parallel_fraction: of the traces that use a swarm.
        seed: of the draw.
    """

    def __init__(
        self,
        *,
        folder: str,
        source: Downloads,
        first: int,
        num_train: int,
        num_held_out: int,
        parallel_fraction: float,
        seed: int,
    ) -> None:
        if not 0 <= parallel_fraction <= 1:
            raise ValueError(f"parallel_fraction={parallel_fraction}: want it in [0, 1]")
        self.folder, self.source, self.first = Path(folder), source, first
        self.num = {TRAIN: num_train, HELD_OUT: num_held_out}
        self.parallel_fraction, self.seed = parallel_fraction, seed

    def prepare_data(self) -> None:
        """Write both splits."""
        for split, name in SPLITS.items():
            traces = asyncio.run(self.traces(split))
            write_whole(self.folder / f"{name}.jsonl", "".join(map(written, traces)))
            console = Console(stderr=True, markup=False)
            console.print(f"wrote {self.folder / name}.jsonl: {len(traces):,} traces")

    async def traces(self, split: str) -> list[dict[str, Any]]:
        """Make the traces of one split."""
        made = []
        for number in range(self.num[split]):
            rng = np.random.default_rng([self.seed, number])
            is_parallel = bool(rng.random() < self.parallel_fraction)
            task = self.source(split, self.first + number)
            made.append(await trace(task, is_parallel=is_parallel))
        return made


async def trace(task: Task, *, is_parallel: bool) -> dict[str, Any]:
    """Work on a task by script, and write the dialogue down."""
    swarm = Swarm(
        {"worker": OneCall(toolbox=save_pages, tool="save", argument="page")},
        task,
        limits=SwarmLimits(),
        num_prompt=1,
        seed=0,
    )
    pages = task.answer
    if is_parallel:
        turns = [
            [
                *(("create_subagent", {"name": f"w{page}", "system_prompt": "save"})
                  for page in pages),
                *(("assign_task", {"agent": f"w{page}", "prompt": f"page {page}"})
                  for page in pages),
            ]
        ]  # fmt: skip
    else:
        turns = [[("save", {"page": page})] for page in pages]
    messages: list[dict[str, Any]] = [user("".join(part.text for part in task.prompt[0].parts))]
    async with save_pages(task) as own:
        tools = Toolset([*own.tools, *swarm.tools])
        for turn in turns:
            outputs = [await tools.run(ToolCall(name, given)) for name, given in turn]
            calls = [
                (name, given, output.text)
                for (name, given), output in zip(turn, outputs, strict=True)
            ]
            messages += without_thinking(called("", calls, messages))
    messages.append(assistant("done", None))
    provenance = {"source": "swarm_traces", "parallel": is_parallel, "truth": task.answer}
    return line(messages, tools.declarations, provenance)


def without_thinking(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make turns instant ones."""
    return [
        {key: value for key, value in message.items() if key != "reasoning_content"}
        for message in messages
    ]
