"""Answers by generation to tasks whose truth is known: the table of ``moonlit eval``.

Every set is also answered blind: the same questions with another task's picture of the same size.
What a model answers right there it did not see.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table

from moonlit.agents.sandbox.pool import Pool
from moonlit.batch import Task
from moonlit.chat.messages import Image, Message, Part, VideoChunk
from moonlit.progress import Work
from moonlit.rl.conversation import Conversation, pictures_of, work_on
from moonlit.rl.loading import conversation_of, sandboxes
from moonlit.rl.records import write_escaped
from moonlit.rl.rewards.rules import RuleJudge


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One answered task."""

    set: str
    blind: bool
    number: int
    answer: str
    truth: Any
    is_right: bool
    stop_reason: str
    num_tokens: int
    num_calls: int
    num_errors: int
    """Complaints about malformed turns."""


@runtime_checkable
class HeldOutTasks(Protocol):
    """A data module with held-out tasks."""

    chance: dict[str, float]
    """Accuracy of guessing, by set, where it is known."""

    def tasks(self, name: str, num: int, *, held_out: bool) -> list[Task]:
        """Return tasks of one set."""
        ...


def evaluate_checkpoint(data: HeldOutTasks, judge: RuleJudge, settings: Mapping[str, Any]) -> None:
    """Run the command: print the table and write everything as JSON."""
    sets = {
        name: data.tasks(name, settings["num_tasks"], held_out=True) for name in settings["sets"]
    }
    out = Path(settings["out"] or f"{settings['ckpt']}.eval.json")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out={out}: there is no folder {out.parent}")
    conversation = conversation_of(settings)

    async def run() -> list[Verdict]:
        async with sandboxes(settings["tools"]) as pool, aclosing(judge):
            return await evaluate(conversation, sets, pool, judge, seed=settings["seed"])

    verdicts = asyncio.run(run())
    rows = summary(verdicts, data.chance)
    record = {
        "settings": dict(settings),
        "sets": rows,
        "answers": [asdict(verdict) for verdict in verdicts],
    }
    write_escaped(out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    Console(markup=False).print(table(rows))
    print(f"wrote {out}")


async def evaluate(
    conversation: Conversation,
    sets: Mapping[str, Sequence[Task]],
    pool: Pool | None,
    judge: RuleJudge,
    *,
    seed: int,
) -> list[Verdict]:
    """Answer all tasks, seeing and blind, at the same time."""
    asked = {
        (name, blind): blindfolded(tasks) if blind else dict(enumerate(tasks))
        for name, tasks in sets.items()
        for blind in (False, True)
    }
    work = Work("answers", sum(map(len, asked.values())))

    async def judged(name: str, number: int, task: Task, *, blind: bool) -> Verdict:
        reply = await work_on(conversation, task, pool, seed=seed + number)
        work.advance()
        return Verdict(
            set=name,
            blind=blind,
            number=number,
            answer=reply.text,
            truth=task.answer,
            is_right=await judge.is_right(task, reply.text),
            stop_reason=reply.stop_reason,
            num_tokens=reply.num_tokens,
            num_calls=reply.num_calls,
            num_errors=len(reply.errors),
        )

    with work:
        return await asyncio.gather(
            *(
                judged(name, number, task, blind=blind)
                for (name, blind), tasks in asked.items()
                for number, task in tasks.items()
            )
        )


def blindfolded(tasks: Sequence[Task]) -> dict[int, Task]:
    """Show each task the media of the next one of the same sizes; those without a twin are out."""
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        alike[tuple(picture.size for picture in pictures_of(task.prompt))].append(number)
    return {
        number: with_media_of(tasks[number], tasks[other])
        for numbers in alike.values()
        if len(numbers) > 1
        for number, other in zip(numbers, [*numbers[1:], numbers[0]], strict=True)
        if pictures_of(tasks[number].prompt)
    }


def with_media_of(task: Task, other: Task) -> Task:
    """Replace a task's pictures and clips, in order."""
    media = [
        part
        for message in other.prompt
        for part in message.parts
        if isinstance(part, Image | VideoChunk)
    ]

    def swapped(part: Part) -> Part:
        return media.pop(0) if isinstance(part, Image | VideoChunk) else part

    prompt: list[Message] = [
        replace(message, content=tuple(map(swapped, message.parts))) for message in task.prompt
    ]
    return replace(task, prompt=prompt)


def summary(verdicts: Sequence[Verdict], chance: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return the numbers of every set, in the order they were asked."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(verdict.set for verdict in verdicts):
        seeing = [v for v in verdicts if v.set == name and not v.blind]
        blind = [v for v in verdicts if v.set == name and v.blind]
        rows[name] = {
            "num_answers": len(seeing),
            "accuracy": mean([v.is_right for v in seeing]),
            "blind_accuracy": mean([v.is_right for v in blind]),
            "chance": chance.get(name),
            "tokens_per_answer": mean([v.num_tokens for v in seeing]),
            "calls_per_answer": mean([v.num_calls for v in seeing]),
            "unfinished_fraction": mean([v.stop_reason != "answer" for v in seeing]),
            "malformed_fraction": mean([v.num_errors > 0 for v in seeing]),
        }
    return rows


def mean(values: Sequence[float | int]) -> float | None:
    """Return the mean; None of nothing."""
    return float(sum(values) / len(values)) if values else None


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay the summary out."""
    laid_out = Table(title="answers by generation", title_justify="left")
    laid_out.add_column("set")
    for column in ("answers", "accuracy", "blind", "chance", "tokens", "calls", "cut"):
        laid_out.add_column(column, justify="right")
    for name, row in rows.items():
        laid_out.add_row(
            name,
            f"{row['num_answers']}",
            *(percent(row[key]) for key in ("accuracy", "blind_accuracy", "chance")),
            f"{row['tokens_per_answer']:.1f}",
            f"{row['calls_per_answer']:.2f}",
            percent(row["unfinished_fraction"]),
        )
    return laid_out


def percent(fraction: float | None) -> str:
    """Write a fraction, or nothing where it is not known."""
    return "" if fraction is None else f"{fraction:.1%}"
