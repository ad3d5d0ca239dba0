"""Dialogues in JSON Lines as a LightningDataModule: whole in their rows, one sample a user turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from torch.utils.data import Dataset

from data_modules.components.corpus import DESCRIPTION, SourceRecipe, corpus_in
from data_modules.components.dialogue_files import (
    BadDialogueError,
    Dialogue,
    line_starts,
    read_dialogue,
)
from data_modules.components.digests import digest
from data_modules.components.document import Document, dialogue_document
from data_modules.components.held_out import HeldOutRows
from data_modules.components.plan import Plan
from data_modules.components.plan_dialogues import plan_dialogues
from data_modules.components.planned_data import PlannedData
from data_modules.components.stream import PlannedLoader, Step
from data_modules.embedded_world import EmbeddedWorld, code_digest
from moonlit.batch import Task
from moonlit.chat.template import samples_per_user_turn

TRAIN, HELD_OUT = "dialogues", "held_out_dialogues"
LINES_PER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Line:
    """One dialogue's place on disk."""

    path: Path
    start: int


class Dialogues(PlannedData):
    """Supervised dialogues: only what the assistant wrote is trained.

    A dialogue becomes one sample for each user turn, since history loses its reasoning there. The
    embedded world may stand beside it: its held-out sets are scored too, and with ``replay`` its
    rows join every step.

    Source: technical report (arXiv:2602.02276), Sec. 2.2 and 4.4.1; packing, and loss on answers
    only: Kimi-VL (arXiv:2504.07491), Sec. 2.3.

    Args:
        folder: holds ``train*.jsonl`` and ``held_out*.jsonl``; see ``dialogue_files``.
        images: False refuses a set with pictures in it: zero-vision SFT is text only.
        too_long: a sample of more than ``row_tokens`` is dropped, or cut at the end.
        world: the embedded world; None: dialogues alone.
        replay: train the world's rows in every step too; their number is its ``rows_per_step``.
        data_dir, tokenizer, seed, row_tokens, rows_per_step, num_steps, num_workers,
        max_corrupt_fraction: as ``PlannedData`` says; the last counts bad lines too.
    """

    corpus_name = "dialogues"

    def __init__(
        self,
        *,
        data_dir: str,
        folder: str,
        tokenizer: str,
        seed: int,
        row_tokens: int,
        rows_per_step: int,
        num_steps: int | None,
        images: bool,
        too_long: Literal["drop", "truncate"],
        world: EmbeddedWorld | None,
        replay: bool,
        num_workers: int,
        max_corrupt_fraction: float,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            tokenizer=tokenizer,
            seed=seed,
            row_tokens=row_tokens,
            rows_per_step=rows_per_step,
            num_steps=num_steps,
            num_workers=num_workers,
            max_corrupt_fraction=max_corrupt_fraction,
        )
        if too_long not in ("drop", "truncate"):
            raise ValueError(f"too_long={too_long!r}: want drop or truncate")
        if replay and world is None:
            raise ValueError("replay=true with world=null: there is nothing to replay")
        self.folder = Path(folder)
        self.images, self.too_long = images, too_long
        self.world, self.replay = world, replay
        self.console = Console(stderr=True, markup=False)

    @property
    def held_out_names(self) -> list[str]:
        """The dialogues, then the world's sets."""
        return ["dialogues", *(self.world.held_out_names if self.world else [])]

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, for the world's sets where it is known."""
        return self.world.chance if self.world else {}

    @property
    def train_sources(self) -> list[str]:
        """The one source."""
        return [TRAIN]

    def files(self, split: Literal["train", "held_out"]) -> list[Path]:
        """Files of a split, in order.

        Raises:
            FileNotFoundError: if there is none, naming the folder.
        """
        files = sorted(self.folder.glob(f"{split}*.jsonl"))
        if not files:
            raise FileNotFoundError(
                f"no {split}*.jsonl in {self.folder}: set data.folder, or make the set with "
                "moonlit prepare source=zero_vision"
            )
        return files

    def asked_for(self) -> dict[str, Any]:
        """Everything that the corpus is a function of."""
        return {
            "files": {
                path.name: digest(path.read_bytes())
                for path in [*self.files("train"), *self.files("held_out")]
            },
            "tokenizer": self.tokenizer.digest,
            "row_tokens": self.geometry.row_tokens,
            "images": self.images,
            "too_long": self.too_long,
            "code": code_digest(),
        }

    def prepare_data(self) -> None:
        """Write the corpus unless it is there; say what was left out."""
        if not (self.corpus_folder / DESCRIPTION).is_file():
            super().prepare_data()
            corpus = corpus_in(self.corpus_folder)
            for name, wanted in self.num_samples.items():
                self.say_what_there_is(name, corpus.index[name], wanted)
        if self.world:
            self.world.prepare_data()

    def say_what_there_is(self, name: str, index: np.ndarray, wanted: int) -> None:
        """Print the numbers of a set, and how many samples were left out."""
        said = f"{name}: {len(index):,} samples, {index['num_tokens'].sum():,} tokens"
        if num_missing := wanted - len(index):
            said += (
                f"; {num_missing:,} longer than data.row_tokens={self.geometry.row_tokens:,} were "
                "left out: raise it, or cut them with data.too_long=truncate"
            )
        self.console.print(said, soft_wrap=True)

    def recipes(self) -> Sequence[SourceRecipe]:
        """Training and held-out dialogues, without the lines that are none."""
        self.num_samples: dict[str, int] = {}
        recipes = []
        for name, paths in ((TRAIN, self.files("train")), (HELD_OUT, self.files("held_out"))):
            lines = self.good_lines(name, paths)
            recipes.append(
                SourceRecipe(
                    name=name,
                    num_inputs=len(lines),
                    make=lambda number, lines=lines: self.documents(lines[number]),
                    inputs_per_chunk=LINES_PER_CHUNK,
                )
            )
        return recipes

    def good_lines(self, name: str, paths: Sequence[Path]) -> list[Line]:
        """Return the lines that are dialogues; name and count the others.

        Raises:
            ValueError: if more are bad than ``max_corrupt_fraction`` allows, or if one holds a
                picture where ``images`` is off.
        """
        good, reasons, num_samples = [], [], 0
        for path in paths:
            for start in line_starts(path):
                try:
                    dialogue = read_dialogue(path, start)
                except BadDialogueError as error:
                    reasons.append(str(error))
                    self.console.print(f"skipped: {error}", soft_wrap=True)
                    continue
                self.check_images(dialogue, path, start)
                num_samples += len(samples_per_user_turn(dialogue.messages))
                good.append(Line(path, start))
        if len(reasons) > self.max_corrupt_fraction * (len(good) + len(reasons)):
            raise ValueError(
                f"{len(reasons)} of {len(good) + len(reasons)} lines are no dialogues, more than "
                f"data.max_corrupt_fraction={self.max_corrupt_fraction} allows: see above"
            )
        self.num_samples[name] = num_samples
        return good

    def check_images(self, dialogue: Dialogue, path: Path, start: int) -> None:
        """Refuse pictures in a text-only set: one would defeat its purpose."""
        if dialogue.num_images and not self.images:
            number = path.read_bytes()[:start].count(b"\n") + 1
            raise ValueError(
                f"{path}, line {number}: {dialogue.num_images} pictures in a zero-vision set; "
                "remove them, or train on pictures with data.images=true"
            )

    def documents(self, line: Line) -> list[Document]:
        """Return a dialogue's samples that fit a row."""
        dialogue = read_dialogue(line.path, line.start)
        samples = [
            dialogue_document(messages, self.tokenizer, tools=dialogue.tools)
            for messages in samples_per_user_turn(dialogue.messages)
        ]
        longest = self.geometry.row_tokens
        if self.too_long == "truncate":
            for sample in samples:
                sample.cut(longest)
        return [sample for sample in samples if len(sample.input_ids) <= longest]

    def setup(self, stage: str) -> None:
        """Open the corpora and plan the run."""
        super().setup(stage)
        if self.world:
            self.world.trainer = self.trainer
            self.world.setup(stage if self.replay else "validate")

    def fingerprint_of(self, num_steps: int) -> dict[str, str]:
        """Say by name what the plan is a function of."""
        return {
            "corpus": digest(np.ascontiguousarray(self.corpus.index[TRAIN]).tobytes()),
            "seed": str(self.seed),
            "row_tokens": str(self.geometry.row_tokens),
            "rows_per_step": str(self.geometry.rows_per_step),
            "replay": str(self.replay),
        }

    def make_plan(self, num_steps: int) -> Plan:
        """Plan a run of so many steps, epoch after epoch."""
        index = self.corpus.index[TRAIN]
        plan = plan_dialogues(
            index,
            self.corpus.chunk_starts[TRAIN],
            self.geometry,
            source=TRAIN,
            seed=self.seed,
            num_steps=num_steps,
        )
        times = len(plan.pieces) / len(index)
        self.console.print(f"{num_steps:,} steps read every dialogue {times:.1f} times")
        return plan

    def train_dataloader(self) -> PlannedLoader:
        """Return the loader of this rank's rows; with ``replay``, the world's rows behind them."""
        loader = super().train_dataloader()
        if self.replay and self.world:
            loader.steps = JoinedSteps(loader.steps, self.world.train_dataloader().steps)
        return loader

    def held_out_rows(self, name: str, *, rank: int, num_ranks: int) -> HeldOutRows:
        """Return the rows of one held-out set."""
        if self.world and name != "dialogues":
            return self.world.held_out_rows(name, rank=rank, num_ranks=num_ranks)
        return HeldOutRows(
            self.corpus,
            [HELD_OUT],
            blind=False,
            row_tokens=self.geometry.row_tokens,
            max_tokens=None,
            max_documents=len(self.corpus.index[HELD_OUT]),
            rank=rank,
            num_ranks=num_ranks,
            filler_id=self.tokenizer.special.eos_id,
        )

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Return the world's held-out tasks, if there is a world."""
        return self.world.sample_tasks(num_tasks) if self.world else []


class JoinedSteps(Dataset[Step]):
    """Steps of two plans side by side: the rows of both make one optimizer step."""

    def __init__(self, first: Dataset[Step], second: Dataset[Step]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        """Steps that both have."""
        return min(len(self.first), len(self.second))  # pyright: ignore[reportArgumentType]

    def __getitem__(self, step: int) -> Step:
        """Read both."""
        one, two = self.first[step], self.second[step]
        return Step(
            microbatches=[*one.microbatches, *two.microbatches], corrupt=one.corrupt | two.corrupt
        )
