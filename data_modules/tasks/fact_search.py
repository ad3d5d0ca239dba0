"""Search in the facts world: wide tables, chains, chains that join late, pages that disagree.

Every task has a world of many short pages behind ``search`` and ``open``, and an exact answer. The
question never says to work in parallel. Train and held-out worlds share no name.
"""

import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial

import numpy as np

from data_modules.tasks.source import HELD_OUT
from data_modules.world.disputes import Disputes
from data_modules.world.facts import FactQuestion, Facts
from moonlit.agents.tables import normalised, read_table, score_table
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.library import Library
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message

KINDS = ("wide", "deep", "join", "disputed")
HELD_OUT_ONE_IN = 5
"""Of the names."""
SHARE_DISPUTED = 0.5
"""Of the populations and years of foundation of a world that is asked ``disputed`` questions."""


class FactSearch:
    """Makes tasks.

    Args:
        seed: of everything.
        weights: of the kinds of questions: ``wide``, ``deep``, ``join``, ``disputed``.
        num_worlds: of each split.
        num_countries: of a world: its size.

    Raises:
        ValueError: for an unknown kind, or where no kind has a weight.
    """

    def __init__(
        self, *, seed: int, weights: Mapping[str, float], num_worlds: int, num_countries: int
    ) -> None:
        if not set(weights) <= set(KINDS) or not sum(weights.values()) > 0:
            raise ValueError(f"weights={dict(weights)}: want some of {', '.join(KINDS)}")
        self.seed, self.weights = seed, dict(weights)
        self.num_worlds, self.num_countries = num_worlds, num_countries

    def __call__(self, split: str, number: int) -> Task:
        """Return a task; its answer is rows, and which of their cells are contested how."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        shares = np.array(list(self.weights.values()))
        kind = list(self.weights)[rng.choice(len(shares), p=shares / shares.sum())]
        world = int(rng.integers(self.num_worlds))
        name = f"{self.seed}/{split}/{world}/{self.num_countries}/{kind == 'disputed'}"
        disputes = world_of(name)
        question: FactQuestion = (
            disputes.question(rng) if kind == "disputed" else getattr(disputes.facts, kind)(rng)
        )
        contested = {
            f"{city} / {key}": one.kind
            for (city, key), one in disputes.disputes.items()
            if city in {row[0] for row in question.truth}
        }
        return Task(
            prompt=[Message(role="user", content=question.text)],
            domain="agentic",
            environment="fact_search",
            answer={"header": question.header, "rows": question.truth, "contested": contested},
            tags={"world": name, "kind": kind},
        )


def is_of(split: str, name: str) -> bool:
    """Whether a name may be used in a split."""
    return (zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0) == (split == HELD_OUT)


@lru_cache(maxsize=64)
def world_of(name: str) -> Disputes:
    """Make the world of a task's tag ``world``."""
    seed, split, number, num_countries, is_disputed = name.split("/")
    world_seed = zlib.crc32(f"{seed}/{split}/{number}".encode())
    facts = Facts(world_seed, int(num_countries), partial(is_of, split))
    return Disputes(facts, world_seed, SHARE_DISPUTED if is_disputed == "True" else 0.0)


@lru_cache(maxsize=64)
def library_of(name: str) -> Library:
    """Index the pages of that world."""
    return Library(world_of(name).pages())


class FactLibraries:
    """The toolbox: ``search`` and ``open`` over the pages of a task's world."""

    @asynccontextmanager
    async def __call__(self, task: Task) -> AsyncIterator[Toolset]:
        """Lend the tools."""
        yield Toolset(library_of(task.tags["world"]).tools())


class FactJudge:
    """Scores a table by item-F1, a single answer by equality."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Return the outcome, and measure rows and contested cells; without an answer all is 0."""
        rows, header = task.answer["rows"], task.answer["header"]
        text = trajectory.text if trajectory.stop_reason == "answer" else ""
        if not header:
            return {"fact_search": float(normalised([[text]]) == normalised(rows))}
        answer = read_table(text, len(header))
        score = score_table(answer, rows)
        trajectory.metrics["row_f1"] = score.row_f1
        trajectory.metrics |= contested_right(answer, task)
        return {"fact_search": score.item_f1}


def contested_right(answer: list[list[str]], task: Task) -> dict[str, float]:
    """Return the shares of contested cells that are right: decidable ones, and open ones.

    A cell that the answer does not have, or has twice with unlike values, is wrong.
    """
    header, rows = task.answer["header"], task.answer["rows"]
    said, true = cells(answer, header), cells(rows, header)
    right: dict[str, list[bool]] = {"conflict_cells_right": [], "ambiguity_kept": []}
    for place, kind in task.answer["contested"].items():
        name = "ambiguity_kept" if kind == "open" else "conflict_cells_right"
        right[name].append(said.get(place.lower()) == true[place.lower()])
    return {name: sum(some) / len(some) for name, some in right.items() if some}


def cells(rows: list[list[str]], header: list[str]) -> dict[str, set[str]]:
    """Return the values that rows give each ``key / column``."""
    found: dict[str, set[str]] = {}
    for row in normalised(rows):
        for column, cell in zip(header[1:], row[1:], strict=True):
            found.setdefault(f"{row[0]} / {column}", set()).add(cell)
    return found
