"""Rejection-sampling fine-tuning: K answers a task, verified, the best kept as dialogues to learn.

Source: technical report (arXiv:2602.02276), Sec. 4.4.1: supervised data refined by rejection
sampling; K2 report (arXiv:2507.20534), Sec. 3.1. The numbers are NOT STATED: K, the choice of the
shortest right answer and the band of pass rates are our defaults.
"""

import asyncio
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage
from rich.table import Table

from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.toolsets.ipython import declaration
from moonlit.batch import Task
from moonlit.chat.messages import VideoChunk
from moonlit.chat.openai_form import openai_messages
from moonlit.rl.conversation import Conversation, work_on
from moonlit.rl.records import ESCAPES
from moonlit.rl.reply import Reply
from moonlit.rl.rewards.rules import RuleJudge

TASKS_AT_ONCE = 64
HELD_OUT_EVERY = 20
"""Every so many tasks go to ``held_out.jsonl``: an SFT run scores itself on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectionSampling:
    """What is sampled, and what of it is kept.

    Args:
        conversation: how the policy is talked to.
        pool: of sandboxes for the ``ipython`` tool; None: no tools.
        judge: tells right answers from wrong ones.
        num_samples: K, answers to every task.
        num_kept: right answers kept of a task, the shortest first.
        min_pass_rate: tasks that are solved less often are left out ...
        max_pass_rate: ... and those solved more often: they teach nothing new.
        seed: of everything sampled.
        provenance: written into every line.
    """

    conversation: Conversation
    pool: Pool | None
    judge: RuleJudge
    num_samples: int
    num_kept: int
    min_pass_rate: float
    max_pass_rate: float
    seed: int
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 1 <= self.num_kept <= self.num_samples:
            raise ValueError(
                f"num_kept={self.num_kept}, num_samples={self.num_samples}:"
                " want 1 <= num_kept <= num_samples"
            )
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise ValueError(
                f"min_pass_rate={self.min_pass_rate}, max_pass_rate={self.max_pass_rate}:"
                " want 0 <= min <= max <= 1"
            )

    async def write(self, sets: Mapping[str, Sequence[Task]], folder: Path) -> "Counts":
        """Sample every task and write what is kept, task by task in order.

        Raises:
            FileExistsError: if the folder holds a set already.
            ValueError: if a task holds a clip, which a line cannot hold.
        """
        tasks = [
            SetTask(name, number, task)
            for name, some in sets.items()
            for number, task in enumerate(some)
        ]
        refuse_clips(tasks)
        room, counts = asyncio.Semaphore(TASKS_AT_ONCE), Counts()
        with Lines(folder) as lines:
            async with asyncio.TaskGroup() as group:
                sampled = [group.create_task(self.sample(task, room)) for task in tasks]
                for task, future in zip(tasks, sampled, strict=True):
                    answers = await future
                    kept = self.best(answers)
                    counts.add(task.set, answers, len(kept))
                    for answer in kept:
                        lines.write(task, self.line(task, answer, answers, lines.url_of))
        return counts

    async def sample(self, task: "SetTask", room: asyncio.Semaphore) -> list["Answer"]:
        """Answer one task K times; equal prompts are computed once."""
        async with room:
            seeds = [self.seed_of(task, k) for k in range(self.num_samples)]
            replies = await asyncio.gather(
                *(work_on(self.conversation, task.task, self.pool, seed=seed) for seed in seeds)
            )
        return [
            Answer(
                seed,
                reply,
                not reply.errors and await self.judge.is_right(task.task, reply.text),
            )
            for seed, reply in zip(seeds, replies, strict=True)
        ]

    def seed_of(self, task: "SetTask", k: int) -> int:
        """Seed of one answer: another for every set, task and k."""
        return (self.seed << 40) + (zlib.crc32(f"{task.set}/{task.number}".encode()) << 8) + k

    def best(self, answers: Sequence["Answer"]) -> list["Answer"]:
        """Return the right answers to keep: the shortest, no two of the same tokens."""
        right = [answer for answer in answers if answer.is_right]
        if not right or not self.min_pass_rate <= len(right) / len(answers) <= self.max_pass_rate:
            return []
        distinct = {answer.token_ids: answer for answer in reversed(right)}
        return sorted(distinct.values(), key=lambda answer: (len(answer.token_ids), answer.seed))[
            : self.num_kept
        ]

    def line(
        self,
        task: "SetTask",
        answer: "Answer",
        answers: Sequence["Answer"],
        url_of: Callable[[PILImage], str],
    ) -> dict[str, Any]:
        """Write a dialogue down, with where it comes from."""
        messages = [*task.task.prompt, *answer.reply.messages]
        return {
            "messages": openai_messages(messages, url_of),
            "tools": [] if self.pool is None else [declaration()],
            "provenance": {
                **self.provenance,
                "source": "rejection_sampling",
                "set": task.set,
                "number": task.number,
                "environment": task.task.environment,
                "truth": task.task.answer,
                "seed": answer.seed,
                "policy_version": max(answer.reply.completions[-1].policy_versions),
                "num_samples": len(answers),
                "num_right": sum(other.is_right for other in answers),
                "num_sampled_tokens": len(answer.token_ids),
            },
        }


@dataclass(frozen=True, slots=True)
class SetTask:
    """A task and its place."""

    set: str
    number: int
    task: Task


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the K answers to a task."""

    seed: int
    reply: Reply
    is_right: bool

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All sampled tokens."""
        return tuple(i for completion in self.reply.completions for i in completion.token_ids)


@dataclass(slots=True)
class Counts:
    """By set: how many tasks, how many solved by how many answers, how many dialogues kept."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, answers: Sequence[Answer], num_kept: int) -> None:
        """Count one task."""
        row = self.rows.setdefault(
            name, dict.fromkeys(("tasks", "solved", "answers", "right", "malformed", "kept"), 0)
        )
        num_right = sum(answer.is_right for answer in answers)
        row["tasks"] += 1
        row["solved"] += num_right > 0
        row["answers"] += len(answers)
        row["right"] += num_right
        row["malformed"] += sum(bool(answer.reply.errors) for answer in answers)
        row["kept"] += num_kept

    def table(self) -> Table:
        """Lay the counts out."""
        laid_out = Table(title="rejection sampling", title_justify="left")
        laid_out.add_column("set")
        for column in ("tasks", "solved", "answers", "right", "malformed", "kept"):
            laid_out.add_column(column, justify="right")
        for name, row in self.rows.items():
            laid_out.add_row(name, *(f"{value:,}" for value in row.values()))
        return laid_out


class Lines:
    """``train.jsonl`` and ``held_out.jsonl`` with their pictures; a line is on disk once written.

    Raises:
        FileExistsError: if the folder holds a set already: provenance must not mix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if existing := sorted(folder.glob("*.jsonl")):
            raise FileExistsError(f"{existing[0]} is there already: name another folder")
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.files = {
            split: (folder / f"{split}.jsonl").open("x", encoding="utf-8", errors=ESCAPES)
            for split in ("train", "held_out")
        }

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.close()

    def write(self, task: SetTask, line: dict[str, Any]) -> None:
        """Append a line."""
        file = self.files["train" if task.number % HELD_OUT_EVERY else "held_out"]
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()

    def url_of(self, image: PILImage) -> str:
        """Store a picture under its content's name; return its path as the lines name it."""
        data = io.BytesIO()
        image.save(data, "PNG")
        name = f"images/{hashlib.sha256(data.getvalue()).hexdigest()[:24]}.png"
        if not (self.folder / name).exists():
            (self.folder / name).write_bytes(data.getvalue())
        return name


def refuse_clips(tasks: Sequence[SetTask]) -> None:
    """Refuse, before anything is sampled, what a line cannot hold."""
    for task in tasks:
        parts = (part for message in task.task.prompt for part in message.parts)
        if any(isinstance(part, VideoChunk) for part in parts):
            raise ValueError(f"set {task.set!r} has clips: a line of a set cannot hold one")
