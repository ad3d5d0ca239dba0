"""Tasks for reinforcement learning: named sources by weight, training and held out."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data_modules.components.planned_data import PlannedData
from data_modules.components.stream import PlannedLoader
from data_modules.tasks.source import HELD_OUT, TRAIN, TaskSource, markers_in, require_task
from moonlit.batch import PackedBatch, Task
from moonlit.chat.tokenizer import Tokenizer


class RLTasks(LightningDataModule):
    """Gives the task of a number; an RL phase asks for them as its rollouts need them.

    Task ``n`` is a pure function of (seed, n): its source is drawn by weight, then the source makes
    its next task. So a resume is a number, and no rank or restart changes what a number means.

    Args:
        seed: of the draw.
        tokenizer: ``embedded``, or a folder in the released layout.
        sources: by name.
        weights: of the sources that are trained on; those without one are held out only.
        held_out: names of the sources whose held-out tasks are scored; None: all.
        num_held_out: tasks of each; 0: nothing is held out.
        chance: reward of guessing, by source, where it is known.
        ptx: the kept SFT set of the PTX loss; None: there is none.
    """

    def __init__(
        self,
        *,
        seed: int,
        tokenizer: str,
        sources: Mapping[str, TaskSource],
        weights: Mapping[str, float],
        held_out: Sequence[str] | None,
        num_held_out: int,
        chance: Mapping[str, float],
        ptx: PlannedData | None = None,
    ) -> None:
        super().__init__()
        for key, names in (("weights", weights), ("held_out", held_out or ()), ("chance", chance)):
            if unknown := set(names) - set(sources):
                raise ValueError(f"data.{key} names {sorted(unknown)}: sources {sorted(sources)}")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        if not self.weights or min(self.weights.values()) < 0:
            raise ValueError(f"data.weights={dict(weights)}: want one above 0, none below")
        if num_held_out < 0:
            raise ValueError(f"data.num_held_out={num_held_out}: want at least 0")
        self.seed, self.tokenizer = seed, Tokenizer.named(tokenizer)
        self.sources, self.chance = dict(sources), dict(chance)
        names = list(sources if held_out is None else held_out)
        self.held_out_names = names if num_held_out else []
        self.num_held_out = num_held_out
        self.has_told_of_markers = False
        self.ptx = ptx
        self.ptx_loader: PlannedLoader | None = None

    def prepare_data(self) -> None:
        """Write the kept set's corpus, if there is one."""
        if self.ptx is not None:
            self.ptx.prepare_data()

    def setup(self, stage: str) -> None:
        """Plan the kept set's rows."""
        if self.ptx is not None and stage == "fit":
            self.ptx.trainer = self.trainer
            self.ptx.setup(stage)
            self.ptx_loader = self.ptx.train_dataloader()

    def kept_rows(self, step: int) -> list[PackedBatch]:
        """Return this rank's rows of the kept set for an optimizer step.

        Raises:
            ValueError: if more of its documents are corrupt than allowed.
        """
        assert self.ptx_loader is not None
        rows = self.ptx_loader.steps[step]
        self.ptx_loader.report(rows.corrupt)
        return rows.microbatches

    def task(self, number: int) -> Task:
        """Return training task ``number``."""
        names = list(self.weights)
        shares = np.array(list(self.weights.values()))
        rng = np.random.default_rng([self.seed, zlib.crc32(b"task"), number])
        name = names[rng.choice(len(names), p=shares / shares.sum())]
        return self.made(name, TRAIN, number)

    def made(self, name: str, split: str, number: int) -> Task:
        """Return a source's task.

        Raises:
            ValueError: if it is none that a policy can be asked, naming it.
        """
        told = f"{split} task {number} of data.sources.{name}"
        task = require_task(self.sources[name](split, number), told)
        if not self.has_told_of_markers and (markers := markers_in(task)):
            self.has_told_of_markers = True
            rank_zero_warn(
                f"{told} holds {', '.join(markers)} in its words: such characters stay plain words,"
                " pictures come as parts of a message (moonlit.chat.messages.Image)"
            )
        return task

    def tasks(self, name: str, num: int, *, held_out: bool, first: int = 0) -> list[Task]:
        """Return tasks of one source, numbered from ``first``.

        Raises:
            ValueError: if there is no such source.
        """
        if name not in self.sources:
            raise ValueError(f"no source {name!r}: there are {', '.join(self.sources)}")
        split = HELD_OUT if held_out else TRAIN
        return [self.made(name, split, first + number) for number in range(num)]

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Return held-out tasks, one source after another; none where nothing is held out."""
        names = self.held_out_names
        return [
            self.made(names[n % len(names)], HELD_OUT, n // len(names))
            for n in range(num_tasks if names else 0)
        ]

    def train_dataloader(self) -> DataLoader[int]:
        """Return an endless count: an iteration asks for its tasks itself."""
        return DataLoader(Iterations(), batch_size=None)

    def val_dataloader(self) -> list[DataLoader[list[Task]]]:
        """Return one batch for each of ``held_out_names``: this rank's tasks."""
        rank, num_ranks = 0, 1
        if self.trainer is not None:
            strategy: Any = self.trainer.strategy
            rank = getattr(strategy, "data_parallel_rank", self.trainer.global_rank)
            num_ranks = getattr(strategy, "data_parallel_size", self.trainer.world_size)
        numbers = range(rank, self.num_held_out, num_ranks)
        return [
            DataLoader(HeldOutTasks(partial(self.made, name), numbers), batch_size=None)
            for name in self.held_out_names
        ]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave numbers and tasks as they are: rows are moved when they are made."""
        return batch


class Iterations(IterableDataset[int]):
    """Zero, one, two ..."""

    def __iter__(self) -> Iterator[int]:
        """Count."""
        number = 0
        while True:
            yield number
            number += 1


class HeldOutTasks(Dataset[list[Task]]):
    """All held-out tasks of a source as one batch."""

    def __init__(self, source: TaskSource, numbers: range) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        """One batch."""
        return 1

    def __getitem__(self, index: int) -> list[Task]:
        """Make the tasks."""
        if index:
            raise IndexError(index)
        return [self.source(HELD_OUT, number) for number in self.numbers]
