"""``moonlit prepare source=solved_tasks``: tasks in words with their answers, as dialogues.

What a policy learns an answer's form from before reinforcement learning: a task that no answer of a
group solves teaches nothing. Text only, as zero-vision SFT wants it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from data_modules.tasks.source import HELD_OUT, TRAIN, TaskSource
from data_modules.zero_vision.lines import assistant, line, user
from data_modules.zero_vision.source import write_whole, written
from moonlit.batch import Task
from moonlit.chat.messages import Text

SPLITS = {TRAIN: "train", HELD_OUT: "held_out"}


@runtime_checkable
class Solver(Protocol):
    """A source whose answers are not just the truth written down."""

    def solution(self, task: Task) -> str:
        """Answer a task."""
        ...


class SolvedTasks:
    """Makes the set.

    Args:
        folder: where ``train_solved.jsonl`` and ``held_out_solved.jsonl`` go; other files of
            dialogues may lie there.
        sources: of the tasks, by name; traces take tasks from ``first`` on.
        first: number of the first task.
        num_train: tasks of each source to train on.
        num_held_out: the same, to score.

    Raises:
        ValueError: if there is no source.
    """

    def __init__(
        self,
        *,
        folder: str,
        sources: Mapping[str, TaskSource],
        first: int,
        num_train: int,
        num_held_out: int,
    ) -> None:
        if not sources:
            raise ValueError("source.sources={}: want at least one source of tasks")
        self.folder, self.sources, self.first = Path(folder), dict(sources), first
        self.num = {TRAIN: num_train, HELD_OUT: num_held_out}

    def prepare_data(self) -> None:
        """Write both splits, source after source."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for split, name in SPLITS.items():
            lines = [
                self.trace(source, split, number)
                for source in self.sources
                for number in range(self.num[split])
            ]
            path = self.folder / f"{name}_solved.jsonl"
            write_whole(path, "".join(map(written, lines)))
            Console(stderr=True, markup=False).print(f"wrote {path}: {len(lines):,} tasks")

    def trace(self, name: str, split: str, number: int) -> dict[str, Any]:
        """Answer one task.

        Raises:
            ValueError: if it shows a picture.
        """
        source = self.sources[name]
        task = source(split, self.first + number)
        parts = task.prompt[0].parts
        if len(task.prompt) > 1 or not all(isinstance(part, Text) for part in parts):
            raise ValueError(f"source.sources.{name}: want one turn of words, no picture")
        asked = "".join(part.text for part in parts if isinstance(part, Text))
        answer = source.solution(task) if isinstance(source, Solver) else str(task.answer)
        provenance = {"source": "solved_tasks", "name": name, "truth": task.answer}
        return line([user(asked), assistant(answer, None)], [], provenance)
