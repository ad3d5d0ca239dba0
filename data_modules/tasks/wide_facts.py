"""A wide search small enough for a tiny model: one number of each of several people.

Every person has a page. The question names them all and never says how to go about it. A page is a
call of ``open``: a single agent needs a step a person, a swarm the same few for any number.
"""

import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from data_modules.tasks.source import HELD_OUT
from moonlit.agents.tools import Tool, Toolset
from moonlit.agents.toolsets.library import OPEN, Library, Page
from moonlit.batch import Task
from moonlit.chat.messages import Message

SYLLABLES = [c + v for c in "bdfgklmnprstv" for v in "aeiou"]
HELD_OUT_ONE_IN = 5
"""Of the names; no person is in both splits."""


class WideFacts:
    """Makes tasks.

    Args:
        seed: of everything.
        min_people: asked for in one question.
        max_people: the same.
    """

    def __init__(self, *, seed: int, min_people: int, max_people: int) -> None:
        if not 1 <= min_people <= max_people:
            raise ValueError(
                f"min_people={min_people}, max_people={max_people}: want 1 <= min <= max"
            )
        self.seed, self.min_people, self.max_people = seed, min_people, max_people

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        names = people(split)
        num = int(rng.integers(self.min_people, self.max_people + 1))
        chosen = [names[place] for place in rng.permutation(len(names))[:num]]
        rows = [[name, str(rng.integers(10, 100))] for name in chosen]
        return Task(
            prompt=[Message(role="user", content=question(chosen))],
            domain="agentic",
            environment="wide_search",
            answer=rows,
            tags={"people": str(num)},
        )


def people(split: str) -> list[str]:
    """Return the names of a split."""
    names = [(one + two).capitalize() for one in SYLLABLES for two in SYLLABLES if one != two]
    is_held_out = [zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0 for name in names]
    return [
        name for name, held in zip(names, is_held_out, strict=True) if held == (split == HELD_OUT)
    ]


def question(names: Sequence[str]) -> str:
    """Ask for everybody's age."""
    return f"Give the age of {', '.join(names)}."


def answer(rows: Sequence[Sequence[str]]) -> str:
    """Write the answer."""
    return ", ".join(f"{name} {age}" for name, age in rows)


@asynccontextmanager
async def open_pages(task: Task) -> AsyncIterator[Toolset]:
    """Lend the ``open`` tool over the pages of a task's people."""
    library = Library([Page(name, f"{name} {age}") for name, age in task.answer])
    yield Toolset(
        [
            Tool(
                name="open",
                description="Read the page of one person.",
                parameters=OPEN,
                call=library.call_open,
            )
        ]
    )
