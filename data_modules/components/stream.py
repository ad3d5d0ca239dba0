"""Steps of the plan as batches: read in chunk order, packed in worker processes, resumable.

A step's batches are a pure function of its number, the plan and the rank, so any number of workers
gives the same bytes, and resuming is starting at an integer.
"""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from data_modules.components.corpus import Corpus, CorruptDocumentError
from data_modules.components.document import Document
from data_modules.components.packing import RowBuilder
from data_modules.components.plan import Plan
from moonlit.batch import PackedBatch


@dataclass(slots=True, kw_only=True)
class Step:
    """One rank's part of an optimizer step, and what could not be read for it."""

    microbatches: list[PackedBatch]
    corrupt: dict[str, str]
    """Reason by document."""


class PlannedSteps(Dataset[Step]):
    """Step number to batches, for one rank.

    Rank r of R takes rows r, r + R, ...: together the ranks take each row once. A document that
    cannot be read leaves its row shorter and every other row as it was.
    """

    def __init__(
        self, corpus: Corpus, plan: Plan, *, rank: int, num_ranks: int, filler_id: int
    ) -> None:
        for rows_per_step in sorted(set((plan.step_starts[1:] - plan.step_starts[:-1]).tolist())):
            if rows_per_step % num_ranks:
                raise ValueError(
                    f"rows_per_step={rows_per_step} cannot be shared out evenly to {num_ranks} "
                    "data-parallel ranks"
                )
        self.corpus, self.plan, self.filler_id = corpus, plan, filler_id
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        """Steps of the run."""
        return self.plan.num_steps

    def __getitem__(self, step: int) -> Step:
        """Read, decode and pack one step."""
        corrupt: dict[str, str] = {}
        numbers = range(self.rank, self.plan.num_rows(step), self.num_ranks)
        rows = [self.plan.row(step, number).tolist() for number in numbers]
        documents = self.read({piece[:2] for row in rows for piece in row}, corrupt)
        return Step(
            microbatches=[self.packed(row, documents, corrupt) for row in rows], corrupt=corrupt
        )

    def read(
        self, wanted: set[tuple[int, int]], corrupt: dict[str, str]
    ) -> dict[tuple[int, int], Document]:
        """Read documents in the order in which they lie on disk."""
        documents = {}
        for source, number in sorted(wanted):
            name = self.plan.sources[source]
            try:
                documents[source, number] = self.corpus.read(name, number)
            except CorruptDocumentError as error:
                corrupt[f"{name}/{number}"] = str(error)
        return documents

    def packed(
        self,
        row: list[tuple[int, int, int, int]],
        documents: dict[tuple[int, int], Document],
        corrupt: dict[str, str],
    ) -> PackedBatch:
        """Pack one row, without its corrupt documents."""
        builder = RowBuilder()
        for source, number, start, stop in row:
            document = documents.get((source, number))
            if document is None:
                continue
            name = f"{self.plan.sources[source]}/{number}"
            try:
                items = document.patches(name)
            except ValueError as error:
                corrupt[name] = str(error)
                continue
            builder.add(document, start, stop, items)
        return builder.finish(self.filler_id)


class PlannedLoader:
    """Iterates the steps from ``next_step`` on; counts what was skipped, and stops at too much.

    Its length is that of the whole plan: Lightning counts the steps before a resume too.

    Args:
        steps: of this rank.
        num_workers: processes that read and pack; 0: the training process itself.
        max_corrupt_documents: more distinct corrupt documents than this stop the run.
    """

    is_planned = True
    """Its steps do not depend on the training, so a strategy may read the next one early."""

    def __init__(
        self, steps: Dataset[Step], *, num_workers: int, max_corrupt_documents: float
    ) -> None:
        self.steps, self.num_workers = steps, num_workers
        self.max_corrupt_documents = max_corrupt_documents
        self.next_step = 0
        self.corrupt: dict[str, str] = {}
        self.console = Console(stderr=True, markup=False)

    def __len__(self) -> int:
        """Steps of the run, also those before ``next_step``."""
        return len(self.steps)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Yield each step's microbatches.

        Raises:
            ValueError: if more documents are corrupt than allowed.
        """
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(self.next_step, len(self)),
            num_workers=self.num_workers,
            worker_init_fn=settle_worker,
            multiprocessing_context="fork" if self.num_workers else None,
        )
        for step in loader:
            self.report(step.corrupt)
            yield step.microbatches

    def report(self, corrupt: dict[str, str]) -> None:
        """Count corrupt documents, each once, and name them."""
        for name, reason in corrupt.items():
            if name not in self.corrupt:
                self.corrupt[name] = reason
                self.console.print(f"skipped a corrupt document: {reason}")
        if len(self.corrupt) > self.max_corrupt_documents:
            raise ValueError(
                f"{len(self.corrupt)} corrupt documents, more than max_corrupt_fraction allows "
                f"({self.max_corrupt_documents:.0f}); the last: {list(self.corrupt.values())[-1]}"
            )


def settle_worker(worker: int) -> None:
    """Leave the cores to the training, and signals to the trainer, which ends the workers.

    Ctrl-C and SLURM reach every process of a job; the step in hand still needs its data. A process
    that ends sends its workers SIGTERM and waits for them, so that one of the trainer's is obeyed.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_trainer, daemon=True).start()


def end_with_trainer() -> None:
    """Wait for a SIGTERM of the process that began this one."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
