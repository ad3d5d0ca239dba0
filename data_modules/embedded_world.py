"""The embedded world as a LightningDataModule: planned training steps and held-out sets."""

import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL

from data_modules.components.corpus import SourceRecipe
from data_modules.components.digests import digest
from data_modules.components.held_out import HeldOutRows
from data_modules.components.mixture import Mixture
from data_modules.components.plan import Plan, plan_run
from data_modules.components.plan_checks import fingerprint
from data_modules.components.planned_data import PlannedData
from data_modules.world.docs import Docs
from data_modules.world.sources import (
    CHANCE,
    FAMILIES,
    HELD_OUT,
    HELD_OUT_FAMILIES,
    TRAIN,
    World,
    held_out_source,
)
from moonlit.batch import Task

HELD_OUT_TEXT_TOKENS = 512
"""A held-out text is scored on its first so many tokens."""
LONG = ("docs", "pages", "boxes")
"""Sets with many tokens an item; a quarter of the items gives as sure an nll."""
TASK_FAMILIES = ("counting", "unseen_pairs", "digits", "positions", "shapes", "puzzles")


class EmbeddedWorld(PlannedData):
    """Text, pages, scenes and clips, planned so that every step holds its share of vision tokens.

    ``NAME_blind`` among the held-out sets is NAME with another item's picture.

    Source: technical report (arXiv:2602.02276), Sec. 2.1 (constant share), App. C.1 (loader).

    Args:
        data_dir, tokenizer, seed, row_tokens, rows_per_step, num_steps, num_workers,
        max_corrupt_fraction: as ``PlannedData`` says; the seed is the world's too.
        vision_share: vision tokens over all tokens of the run.
        injection_point: fraction of the steps that is text only, before the vision comes.
        text_mixture: shares of the text sources ``prose`` and ``code``; 0 leaves one out.
        vision_mixture: shares of the vision tokens by source; 0 leaves one out.
        num_pictures: documents to prepare of each source with media.
        picture_side: of scenes and clips [px].
        questions_per_picture: at most so many in one training dialogue.
        num_held_out: items of each held-out set; a quarter where items are long.
        max_text_files: library files to read; None: all.
    """

    corpus_name = "embedded_world"

    def __init__(
        self,
        *,
        data_dir: str,
        tokenizer: str,
        seed: int,
        row_tokens: int,
        rows_per_step: int,
        num_steps: int | None,
        vision_share: float,
        injection_point: float,
        text_mixture: Mapping[str, float],
        vision_mixture: Mapping[str, float],
        num_pictures: Mapping[str, int],
        picture_side: int,
        questions_per_picture: int,
        num_held_out: int,
        max_text_files: int | None,
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
        self.mixture = Mixture(
            text={name: weight for name, weight in text_mixture.items() if weight},
            vision={name: weight for name, weight in vision_mixture.items() if weight},
            vision_share=vision_share,
            injection_point=injection_point,
        )
        self.num_pictures, self.num_held_out = dict(num_pictures), num_held_out
        self.max_text_files = max_text_files
        self.picture_side, self.questions_per_picture = picture_side, questions_per_picture

    @property
    def held_out_names(self) -> list[str]:
        """Names of the loaders that ``val_dataloader`` returns, in order."""
        seeing = [*HELD_OUT_FAMILIES, "pages"]
        return ["docs", *(name + blind for name in seeing for blind in ("", "_blind"))]

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, for the held-out sets where it is known."""
        return dict(CHANCE)

    @property
    def train_sources(self) -> list[str]:
        """The mixture's sources."""
        return self.mixture.sources

    @cached_property
    def world(self) -> World:
        """Return the maker of items and documents."""
        return World(
            seed=self.seed,
            tokenizer=self.tokenizer,
            picture_side=self.picture_side,
            questions_per_picture=self.questions_per_picture,
            docs=Docs.of_this_python(self.max_text_files),
        )

    def asked_for(self) -> dict[str, Any]:
        """Everything that the corpus is a function of."""
        return {
            "seed": self.seed,
            "tokenizer": self.tokenizer.digest,
            "num_pictures": self.num_pictures,
            "picture_side": self.picture_side,
            "questions_per_picture": self.questions_per_picture,
            "num_held_out": self.num_held_out,
            "max_text_files": self.max_text_files,
            "code": code_digest(),
            "python": platform.python_version(),
            "pillow": PIL.__version__,
        }

    def recipes(self) -> Sequence[SourceRecipe]:
        """Every source of the world."""
        return self.world.recipes(self.num_pictures, self.num_held_out)

    def fingerprint_of(self, num_steps: int) -> dict[str, str]:
        """Say by name what the plan is a function of."""
        return fingerprint(
            self.corpus.index, self.mixture, self.geometry, seed=self.seed, num_steps=num_steps
        )

    def make_plan(self, num_steps: int) -> Plan:
        """Plan a run of so many steps."""
        return plan_run(
            self.corpus.index,
            self.corpus.chunk_starts,
            self.mixture,
            self.geometry,
            seed=self.seed,
            num_steps=num_steps,
        )

    def held_out_rows(self, name: str, *, rank: int, num_ranks: int) -> HeldOutRows:
        """Return the rows of one held-out set."""
        seeing = name.removesuffix("_blind")
        is_text = name == "docs"
        return HeldOutRows(
            self.corpus,
            [held_out_source(s) for s in (self.mixture.text if is_text else (seeing,))],
            blind=name != seeing,
            row_tokens=self.geometry.row_tokens,
            max_tokens=HELD_OUT_TEXT_TOKENS if is_text else None,
            max_documents=self.num_held_out // 4 if seeing in LONG else self.num_held_out,
            rank=rank,
            num_ranks=num_ranks,
            filler_id=self.tokenizer.special.eos_id,
        )

    def tasks(self, name: str, num: int, *, held_out: bool, first: int = 0) -> list[Task]:
        """Return tasks of one set, numbered from ``first``, with their answers.

        Raises:
            ValueError: if there is no such set; names those there are.
        """
        names = (*(HELD_OUT_FAMILIES if held_out else FAMILIES), "pages")
        if name not in names:
            split = "held-out" if held_out else "training"
            raise ValueError(f"no {split} set {name!r}: there are {', '.join(names)}")
        split = HELD_OUT if held_out else TRAIN
        return [self.world.item(name, first + n, split).task() for n in range(num)]

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Return held-out tasks with their answers, one family after another."""
        return [
            self.world.item(
                TASK_FAMILIES[n % len(TASK_FAMILIES)], n // len(TASK_FAMILIES), HELD_OUT
            ).task()
            for n in range(num_tasks)
        ]


def code_digest() -> str:
    """Digest of the code that a document's bytes depend on."""
    import moonlit.chat

    here, chat = Path(__file__).parent, Path(moonlit.chat.__file__).parent
    files = [*here.glob("world/*.py"), here / "components" / "document.py", *chat.glob("*.py")]
    return digest(*(path.read_bytes() for path in sorted(files)))
