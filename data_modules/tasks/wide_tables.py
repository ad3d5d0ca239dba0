"""A wide search that a model of a few hundred thousand weights can learn: fill in rows of a table.

A row is a sheet's name and a number, such as ``kQ-three``; a call of ``fill`` looks one of its two
cells up and writes it down. What counts is what was filled in, by whomever, not what is said. A
single agent needs a step a cell; sub-agents, one a row, need the same few for any number of rows.
The question never says how to go about it, and no sheet is in both splits.

No list of names and no value has to be copied: that is what a model of this size does not learn
from a few million tokens.
"""

import random
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np

from data_modules.tasks.source import HELD_OUT
from moonlit.agents.environment import VerifierError
from moonlit.agents.swarm.faults import DeadAgents
from moonlit.agents.swarm.scripted import OneCall, named_in
from moonlit.agents.swarm.swarm import SubAgent
from moonlit.agents.tables import f1
from moonlit.agents.tools import Tool, ToolOutput, Toolset
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

COLUMNS = {
    "colour": ("red", "green", "blue", "black", "white"),
    "shape": ("circle", "square", "star", "cross"),
}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HELD_OUT_ONE_IN = 5
"""Of the sheets."""
AGENTS = ("w1", "w2")
"""That a warm-up trace creates."""
FILLER = "fill"
"""What they are told to be."""
FILL = {
    "type": "object",
    "properties": {"cell": {"type": "string"}},
    "required": ["cell"],
    "additionalProperties": False,
}


class WideTables:
    """Makes tasks.

    Args:
        seed: of everything.
        min_rows: asked for in one question.
        max_rows: the same.
    """

    def __init__(self, *, seed: int, min_rows: int, max_rows: int) -> None:
        if not 1 <= min_rows <= max_rows <= len(NUMBERS):
            raise ValueError(
                f"min_rows={min_rows}, max_rows={max_rows}: want 1 <= min <= max <= {len(NUMBERS)}"
            )
        self.seed, self.min_rows, self.max_rows = seed, min_rows, max_rows

    def __call__(self, split: str, number: int) -> Task:
        """Return a task; its answer has the row's name and its cells for each row."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        num = int(rng.integers(self.min_rows, self.max_rows + 1))
        first = int(rng.integers(len(NUMBERS) - num + 1))
        sheet = sheet_of(split, rng)
        numbers = NUMBERS[first : first + num]
        rows = [
            [f"{sheet}-{word}", *(str(rng.choice(some)) for some in COLUMNS.values())]
            for word in numbers
        ]
        question = f"Fill in {numbers[0]} to {numbers[-1]} of\n{sheet}"
        return Task(
            prompt=[Message(role="user", content=question)],
            domain="agentic",
            environment="wide_table",
            answer=rows,
            tags={"rows": str(num)},
        )


class TableRows:
    """Makes what a sub-agent is asked: one row, by its name alone.

    Args:
        seed: of everything.
    """

    def __init__(self, *, seed: int) -> None:
        self.tables = WideTables(seed=seed, min_rows=1, max_rows=1)

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        task = self.tables(split, number)
        ((row, *_),) = task.answer
        task.prompt = [
            Message(role="system", content=FILLER), Message(role="user", content=row)
        ]  # fmt: skip
        return task


def sheet_of(split: str, rng: np.random.Generator) -> str:
    """Draw a sheet of a split: a small letter, but for the w of agents, and a capital."""
    while True:
        name = str(rng.choice(list(ascii_lowercase)) + rng.choice(list(ascii_uppercase)))
        is_held_out = zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0
        if is_held_out == (split == HELD_OUT) and name[0] != "w":
            return name


@asynccontextmanager
async def fill_cells(task: Task) -> AsyncIterator[Toolset]:
    """Lend the ``fill`` tool over a task's rows."""
    values = {
        f"{row} {column}": value
        for row, *cells in task.answer
        for column, value in zip(COLUMNS, cells, strict=True)
    }

    async def fill(arguments: dict[str, Any]) -> ToolOutput:
        cell = arguments["cell"]
        if cell not in values:
            return ToolOutput(error=f"there is no cell {cell[:100]!r}")
        return ToolOutput(text=values[cell])

    yield Toolset([Tool(name="fill", description="Fill in a cell.", parameters=FILL, call=fill)])


class TableJudge:
    """Compares the cells that were filled in with those that were asked for."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the item-F1 and measure the row-F1; without a final answer both are 0.

        A cell counts that the agent filled in itself, or a sub-agent that came back; one that was
        not asked for counts against them, whatever became of who tried it. Measured too: rows that
        were assigned and lost, those of them that were assigned again, and those that are filled;
        tasks that the first of the agents was given.

        Raises:
            VerifierError: for a task without rows.
        """
        if not task.answer:
            raise VerifierError("TableJudge: the task's answer has no rows")
        names = {row[0] for row in task.answer}
        wanted = {f"{name} {column}" for name in names for column in COLUMNS}
        cells: set[str] = set()
        if trajectory.stop_reason == "answer":
            tried = set(cells_tried(trajectory, came_back=False))
            cells = set(cells_tried(trajectory, came_back=True)) | (tried - wanted)
        begun = {cell.rpartition(" ")[0] for cell in cells}
        whole = {name for name in begun if {f"{name} {column}" for column in COLUMNS} <= cells}
        trajectory.metrics["row_f1"] = 2 * len(whole & names) / (len(begun) + len(names))
        lost = {row: turn for row, turn in rows_lost(trajectory).items() if row in names}
        again = {
            row_of(child)
            for child in trajectory.children
            if child.called_by != lost.get(row_of(child), child.called_by)
        }
        trajectory.metrics |= {
            "rows_lost": float(len(lost)),
            "rows_reassigned": float(len(again)),
            "rows_mended": float(len(lost.keys() & whole)),
            "asked_first": float(sum(one.agent == AGENTS[0] for one in trajectory.children)),
        }
        return {"wide_table": f1(cells, wanted)}


def cells_tried(trajectory: Trajectory, *, came_back: bool) -> Iterator[str]:
    """Yield the cells that an agent called ``fill`` for, and its sub-agents.

    Args:
        trajectory: of the agent.
        came_back: only those of sub-agents that answered.
    """
    for message in trajectory.messages:
        for call in message.tool_calls:
            if call.name == "fill" and isinstance(cell := call.arguments.get("cell"), str):
                yield cell
    for child in trajectory.children:
        if not came_back or is_back(child):
            yield from cells_tried(child, came_back=came_back)


def rows_lost(trajectory: Trajectory) -> dict[str, int | None]:
    """Return the rows of which nobody came back that they were first assigned to, and that turn."""
    first: dict[str, tuple[int | None, bool]] = {}
    for child in trajectory.children:
        turn, came_back = first.get(row_of(child), (child.called_by, False))
        if child.called_by == turn:
            first[row_of(child)] = turn, came_back or is_back(child)
    return {row: turn for row, (turn, came_back) in first.items() if not came_back}


def row_of(child: Trajectory) -> str:
    """Return the row that a sub-agent was asked for."""
    return named_in(child.prompt[-1].words) if child.prompt else ""


def is_back(child: Trajectory) -> bool:
    """Whether a sub-agent came back with an answer."""
    return child.error is None and child.stop_reason == "answer"


class TableScript:
    """How the warm-up's traces work on a task: cell by cell, or a sub-agent a row.

    Args:
        dead_share: of the tasks at which one of the agents is dead.
        deals_at_random: rows to agents, so that training can find out whom to ask; else they go
            round among them.
    """

    toolbox = staticmethod(fill_cells)

    def __init__(self, *, dead_share: float = 0.0, deals_at_random: bool = False) -> None:
        self.dead_share, self.deals_at_random = dead_share, deals_at_random

    def worker(self) -> SubAgent:
        """Return who serves as sub-agent."""
        values = [f"{{}} {column}" for column in COLUMNS]
        fills = OneCall(toolbox=fill_cells, tool="fill", argument="cell", values=values)
        return DeadAgents(fills, names=AGENTS, share=self.dead_share)

    def serial(self, task: Task) -> list[list[tuple[str, dict[str, Any]]]]:
        """Return the turns of a single agent."""
        cells = [f"{row[0]} {column}" for row in task.answer for column in COLUMNS]
        return [[("fill", {"cell": cell})] for cell in cells]

    def parallel(self, task: Task) -> list[list[tuple[str, dict[str, Any]]]]:
        """Return the one turn of a swarm."""
        created = [("create_subagent", {"name": one, "system_prompt": FILLER}) for one in AGENTS]
        num = len(task.answer)
        agents = [AGENTS[n % len(AGENTS)] for n in range(num)]
        if self.deals_at_random:
            agents = random.Random(f"deal/{task.prompt[-1].words}").choices(AGENTS, k=num)
        assigned = [
            ("assign_task", {"agent": agent, "prompt": row[0]})
            for agent, row in zip(agents, task.answer, strict=True)
        ]
        return [created + assigned]

    def answer(self, task: Task) -> str:
        """Return the last message."""
        return "done"
