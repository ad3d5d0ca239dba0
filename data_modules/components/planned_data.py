"""A data module whose training steps are planned: its corpus, its plan, resume by an integer."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from data_modules.components.corpus import Corpus, SourceRecipe, corpus_in, write_corpus
from data_modules.components.digests import digest
from data_modules.components.held_out import HeldOutRows
from data_modules.components.mixture import Geometry
from data_modules.components.plan import Plan
from data_modules.components.plan_files import planned_once
from data_modules.components.stream import PlannedLoader, PlannedSteps
from moonlit.batch import PackedBatch
from moonlit.chat.tokenizer import Tokenizer


class PlannedData(LightningDataModule):
    """Yields for each optimizer step the list of this rank's rows, in an order fixed beforehand.

    A subclass says what the corpus is made of and how a run over it is planned; writing it once,
    planning once, sharing out to ranks and workers, and going on after a stop are the same for all.
    Held-out sets come as one loader each, named by ``held_out_names``.

    Args:
        data_dir: where prepared corpora lie, one folder for each answer to ``asked_for``.
        tokenizer: ``embedded``, or a folder in the released layout.
        seed: of the plan, and of whatever the corpus draws.
        row_tokens: tokens of a packed row.
        rows_per_step: rows of an optimizer step, over all ranks.
        num_steps: steps to plan; None: the trainer's ``max_steps``.
        num_workers: loader processes; 0: the training process reads and packs.
        max_corrupt_fraction: of all documents; more corrupt ones stop the run.
    """

    corpus_name: str
    """Begins the names of its corpora's folders."""
    accepts_changed_plan: bool = False
    """Go on at the same step even if the plan is another one than the checkpoint's."""
    corpus: Corpus
    plan: Plan
    fingerprint: dict[str, str]

    def __init__(
        self,
        *,
        data_dir: str,
        tokenizer: str,
        seed: int,
        row_tokens: int,
        rows_per_step: int,
        num_steps: int | None,
        num_workers: int,
        max_corrupt_fraction: float,
    ) -> None:
        super().__init__()
        if not 0 <= max_corrupt_fraction <= 1:
            raise ValueError(f"max_corrupt_fraction={max_corrupt_fraction}: want it in [0, 1]")
        self.tokenizer = Tokenizer.named(tokenizer)
        self.seed, self.num_steps = seed, num_steps
        self.geometry = Geometry(row_tokens=row_tokens, rows_per_step=rows_per_step)
        self.num_workers, self.max_corrupt_fraction = num_workers, max_corrupt_fraction
        self.data_dir = Path(data_dir)
        self.next_step = 0
        self.train_loader: PlannedLoader | None = None

    @property
    @abstractmethod
    def held_out_names(self) -> list[str]:
        """Names of the loaders that ``val_dataloader`` returns, in order."""

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, for the held-out sets where it is known."""
        return {}

    @property
    @abstractmethod
    def train_sources(self) -> list[str]:
        """The corpus' sources that are trained on, as ``Plan.sources`` numbers them."""

    @abstractmethod
    def asked_for(self) -> dict[str, Any]:
        """Everything that the corpus is a function of."""

    @abstractmethod
    def recipes(self) -> Sequence[SourceRecipe]:
        """Say how the documents of each source are made."""

    @abstractmethod
    def fingerprint_of(self, num_steps: int) -> dict[str, str]:
        """Say by name what the plan is a function of."""

    @abstractmethod
    def make_plan(self, num_steps: int) -> Plan:
        """Plan a run of so many steps."""

    @abstractmethod
    def held_out_rows(self, name: str, *, rank: int, num_ranks: int) -> HeldOutRows:
        """Return the rows of one held-out set."""

    @property
    def corpus_folder(self) -> Path:
        """Where the corpus that was asked for lies, or will."""
        return self.data_dir / f"{self.corpus_name}-{digest(repr(self.asked_for()).encode())}"

    @property
    def plans_folder(self) -> Path:
        """Where plans are kept."""
        return self.corpus_folder / "plans"

    def open_corpus(self) -> Corpus:
        """Open what ``prepare_data`` wrote."""
        return corpus_in(self.corpus_folder)

    def prepare_data(self) -> None:
        """Write the corpus unless it is there."""
        write_corpus(self.corpus_folder, self.recipes(), description=self.asked_for())

    def setup(self, stage: str) -> None:
        """Open the corpus and plan the run."""
        self.corpus = self.open_corpus()
        if stage != "fit":
            return
        num_steps = self.num_steps if self.num_steps is not None else self.max_steps()
        self.fingerprint = self.fingerprint_of(num_steps)
        self.plan = planned_once(
            self.plans_folder / digest(repr((self.fingerprint, num_steps)).encode()),
            self.train_sources,
            lambda: self.make_plan(num_steps),
        )

    def max_steps(self) -> int:
        """Return the trainer's number of steps."""
        if self.trainer is None or self.trainer.max_steps < 1:
            raise ValueError("num_steps is None: set it, or trainer.max_steps")
        return self.trainer.max_steps

    def train_dataloader(self) -> PlannedLoader:
        """Return the loader of this rank's rows, from the step after the last one trained."""
        rank, num_ranks = self.data_parallel_rank()
        steps = PlannedSteps(
            self.corpus,
            self.plan,
            rank=rank,
            num_ranks=num_ranks,
            filler_id=self.tokenizer.special.eos_id,
        )
        num_documents = sum(len(self.corpus.index[name]) for name in self.train_sources)
        self.train_loader = PlannedLoader(
            steps,
            num_workers=self.num_workers,
            max_corrupt_documents=self.max_corrupt_fraction * num_documents,
        )
        self.train_loader.next_step = self.next_step
        return self.train_loader

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        """Return one loader for each of ``held_out_names``."""
        return [self.held_out_loader(name) for name in self.held_out_names]

    def held_out_loader(self, name: str) -> DataLoader[PackedBatch]:
        """Return the loader of one held-out set."""
        rank, num_ranks = self.data_parallel_rank()
        rows = self.held_out_rows(name, rank=rank, num_ranks=num_ranks)
        return DataLoader(rows, batch_size=None)

    def data_parallel_rank(self) -> tuple[int, int]:
        """Return this process' place among those that read different rows, and their number."""
        if self.trainer is None:
            return 0, 1
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "data_parallel_rank"):
            return strategy.data_parallel_rank, strategy.data_parallel_size
        return self.trainer.global_rank, self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the next step to train, and what its plan is a function of."""
        trainer: Any = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        return {"next_step": progress.processed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run of the same plan stopped.

        Raises:
            ValueError: if this plan is another one and that is not accepted, naming what differs.
        """
        ours, theirs = self.fingerprint, state_dict["fingerprint"]
        if different := [k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k)]:
            told = "; ".join(f"{k}: {theirs.get(k)} then, {ours.get(k)} now" for k in different)
            if not self.accepts_changed_plan:
                raise ValueError(f"the checkpoint's data plan is not this run's: {told}")
            warnings.warn(f"going on with another data plan: {told}", stacklevel=2)
        self.next_step = state_dict["next_step"]
        # Lightning looks for the place in the loader; here it is in the data module.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
