"""Batch download: save pages FIRST to LAST; what counts is what was saved, not what is said.

Each page is one call of ``save``. A single agent needs a step a page, a swarm the same few for any
number; the question never says how to go about it. No name has to be copied, so that a model of
four million weights can learn it from a few hundred traces.
"""

import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from moonlit.agents.swarm.scripted import OneCall
from moonlit.agents.swarm.swarm import SubAgent
from moonlit.agents.tools import Tool, ToolOutput, Toolset
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

SAVE = {
    "type": "object",
    "properties": {"page": {"type": "integer", "description": "number of the page"}},
    "required": ["page"],
    "additionalProperties": False,
}
LAST_PAGE = 99


class Downloads:
    """Makes tasks.

    Args:
        seed: of everything.
        min_pages: asked for in one question.
        max_pages: the same.
    """

    def __init__(self, *, seed: int, min_pages: int, max_pages: int) -> None:
        if not 1 <= min_pages <= max_pages <= LAST_PAGE:
            raise ValueError(
                f"min_pages={min_pages}, max_pages={max_pages}: want 1 <= min <= max <= {LAST_PAGE}"
            )
        self.seed, self.min_pages, self.max_pages = seed, min_pages, max_pages

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        last = int(rng.integers(self.min_pages, self.max_pages + 1))
        return Task(
            prompt=[Message(role="user", content=f"Save the pages 1 to {last}.")],
            domain="agentic",
            environment="download",
            answer=list(range(1, last + 1)),
            tags={"pages": str(last)},
        )


@asynccontextmanager
async def save_pages(task: Task) -> AsyncIterator[Toolset]:
    """Lend the ``save`` tool."""

    async def save(arguments: dict[str, Any]) -> ToolOutput:
        page = arguments["page"]
        if not 1 <= page <= LAST_PAGE:
            return ToolOutput(error=f"there is no page {page}")
        return ToolOutput(text=f"saved {page}")

    yield Toolset([Tool(name="save", description="Save one page.", parameters=SAVE, call=save)])


class DownloadJudge:
    """Compares the pages that were saved by anybody with those that were asked for."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the F1 of saved pages; without a final answer it is 0."""
        if trajectory.stop_reason != "answer":
            return {"download": 0.0}
        saved, wanted = set(saved_pages(trajectory)), set(task.answer)
        return {"download": 2 * len(saved & wanted) / (len(saved) + len(wanted))}


class DownloadScript:
    """How the warm-up's traces work on a task: page by page, or a sub-agent a page."""

    toolbox = staticmethod(save_pages)

    def worker(self) -> SubAgent:
        """Return who serves as sub-agent."""
        return OneCall(toolbox=save_pages, tool="save", argument="page")

    def serial(self, task: Task) -> list[list[tuple[str, dict[str, Any]]]]:
        """Return the turns of a single agent."""
        return [[("save", {"page": page})] for page in task.answer]

    def parallel(self, task: Task) -> list[list[tuple[str, dict[str, Any]]]]:
        """Return the one turn of a swarm."""
        created = [
            ("create_subagent", {"name": f"w{page}", "system_prompt": "save"})
            for page in task.answer
        ]
        assigned = [
            ("assign_task", {"agent": f"w{page}", "prompt": f"page {page}"}) for page in task.answer
        ]
        return [created + assigned]

    def answer(self, task: Task) -> str:
        """Return the last message."""
        return "done"


def saved_pages(trajectory: Trajectory) -> Iterator[int]:
    """Yield the pages that a rollout and all below it have saved."""
    for message in trajectory.messages:
        if message.role == "tool" and message.name == "save":
            words = "".join(part.text for part in message.parts)
            if words.startswith("saved "):
                yield int(words.removeprefix("saved "))
    for child in trajectory.children:
        yield from saved_pages(child)
