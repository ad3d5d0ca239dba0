"""Prepared sources, mixed by a plan: from disks and object stores, in stages, resumable."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.components.chunk_cache import CacheSettings
from data_modules.components.corpus import Corpus, SourceRecipe
from data_modules.components.held_out import HeldOutRows
from data_modules.components.mixture import Stage, flat, sources_of
from data_modules.components.plan import Plan, plan_stages
from data_modules.components.plan_checks import check_contract, epochs_needed, stages_fingerprint
from data_modules.components.plan_report import PlanReport, report
from data_modules.components.planned_data import PlannedData
from moonlit.batch import Task

STAGE_KEYS = ("row_tokens", "rows_per_step", "vision_share", "text_mixture", "vision_mixture")


class Corpora(PlannedData):
    """Mixes sources that ``moonlit prepare source=...`` made, every step at its vision share.

    Source: technical report (arXiv:2602.02276), Sec. 2.1 (constant share), 4.3 (lengths by stage,
    cap on epochs of a source), App. C.1 (loader).

    Args:
        sources: of each name, the prepared folder: on disk, or ``s3://``, ``gs://``, ``azure://``.
        held_out: names of the sources that are scored and never trained.
        text_mixture: shares of the text tokens by source, nested if you like: see ``mixture``.
        vision_mixture: shares of the vision tokens by source, nested if you like.
        vision_share: vision tokens over all tokens of each step.
        max_epochs: how often a source may be read, by name; others as often as it takes.
        schedule: what changes, by the step from which it holds; any of ``row_tokens``,
            ``rows_per_step``, ``vision_share``, ``text_mixture`` and ``vision_mixture``.
        max_held_out: documents of each held-out source.
        accept_changed_plan: go on at the checkpoint's step although the plan has changed.
        cache: of object stores.
        data_dir, tokenizer, seed, row_tokens, rows_per_step, num_steps, num_workers,
        max_corrupt_fraction: as ``PlannedData`` says; plans are kept below ``data_dir``.

    Raises:
        ValueError: if a name or a number makes no sense, naming the key.
    """

    corpus_name = "corpora"

    def __init__(
        self,
        *,
        data_dir: str,
        tokenizer: str,
        seed: int,
        sources: Mapping[str, str],
        held_out: Sequence[str],
        row_tokens: int,
        rows_per_step: int,
        num_steps: int | None,
        vision_share: float,
        text_mixture: Mapping[str, Any],
        vision_mixture: Mapping[str, Any],
        max_epochs: Mapping[str, float | int] | None,
        schedule: Mapping[int, Mapping[str, Any]] | None,
        max_held_out: int,
        accept_changed_plan: bool,
        cache: CacheSettings,
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
        self.sources, self.held_out = dict(sources), list(held_out)
        self.max_epochs = {name: float(epochs) for name, epochs in (max_epochs or {}).items()}
        self.max_held_out, self.cache = max_held_out, cache
        self.accepts_changed_plan = accept_changed_plan
        first = Stage(
            first_step=0,
            text=flat(text_mixture, "text_mixture"),
            vision=flat(vision_mixture, "vision_mixture"),
            vision_share=vision_share,
            geometry=self.geometry,
        )
        self.stages = scheduled(first, schedule or {})
        for name in [*self.held_out, *sources_of(self.stages)]:
            if name not in self.sources:
                raise ValueError(f"no source {name!r}: data.sources names {sorted(self.sources)}")
        if both := set(self.held_out) & set(sources_of(self.stages)):
            raise ValueError(f"held_out sources {sorted(both)} stand in the mixture too")

    @property
    def held_out_names(self) -> list[str]:
        """The held-out sources."""
        return self.held_out

    @property
    def train_sources(self) -> list[str]:
        """The mixture's sources."""
        return sources_of(self.stages)

    def asked_for(self) -> dict[str, Any]:
        """Everything that the corpus is a function of: the places of its sources."""
        return self.sources

    def recipes(self) -> Sequence[SourceRecipe]:
        """Return nothing: sources are prepared one by one."""
        return []

    @property
    def plans_folder(self) -> Path:
        """Where plans are kept."""
        return self.data_dir / "plans"

    def prepare_data(self) -> None:
        """Open the sources once: one process of a machine fetches what is far away."""
        self.open_corpus()

    def open_corpus(self) -> Corpus:
        """Open every source."""
        wanted = [*self.train_sources, *self.held_out]
        return Corpus({name: self.sources[name] for name in wanted}, self.cache)

    def fingerprint_of(self, num_steps: int) -> dict[str, str]:
        """Say by name what the plan is a function of."""
        return stages_fingerprint(self.corpus.index, self.stages, self.max_epochs, seed=self.seed)

    def make_plan(self, num_steps: int) -> Plan:
        """Plan a run of so many steps.

        Raises:
            ValueError: if the mixture cannot be met, with the numbers.
        """
        plan = plan_stages(
            self.corpus.index,
            self.corpus.chunk_starts,
            self.stages,
            seed=self.seed,
            num_steps=num_steps,
            max_epochs=self.max_epochs,
        )
        counts = report(plan, self.corpus.index)
        target = np.zeros(num_steps)
        for stage in self.stages:
            target[stage.first_step :] = stage.vision_share
        check_contract(counts.vision_tokens_of_step, counts.tokens_of_step, target)
        return plan

    def report(self) -> tuple[PlanReport, int]:
        """Plan a run and count what it holds.

        Returns:
            The counts; and the steps until a source has been read as often as it may, or once
            where that is not bounded.
        """
        self.corpus = self.open_corpus()
        index = self.corpus.index
        longest = longest_run(index, self.stages, self.max_epochs)
        num_steps = self.num_steps if self.num_steps is not None else max(longest, 1)
        return report(self.make_plan(num_steps), index), longest

    def held_out_rows(self, name: str, *, rank: int, num_ranks: int) -> HeldOutRows:
        """Return the rows of one held-out source.

        Raises:
            ValueError: if a document with media is too long for a row.
        """
        rows = self.corpus.index[name][: self.max_held_out]
        too_long = (rows["num_vision_tokens"] > 0) & (rows["num_tokens"] > self.geometry.row_tokens)
        if too_long.any():
            raise ValueError(
                f"held-out document {name}/{too_long.argmax()} has media and more than "
                f"row_tokens={self.geometry.row_tokens} tokens"
            )
        return HeldOutRows(
            self.corpus,
            [name],
            blind=False,
            row_tokens=self.geometry.row_tokens,
            max_tokens=None,
            max_documents=self.max_held_out,
            rank=rank,
            num_ranks=num_ranks,
            filler_id=self.tokenizer.special.eos_id,
        )

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Return none: a corpus has no questions with answers."""
        return []


def scheduled(first: Stage, schedule: Mapping[int, Mapping[str, Any]]) -> list[Stage]:
    """Return the stages of a run: each changes some things of the one before.

    Raises:
        ValueError: if a change is none that a stage can make.
    """
    stages = [first]
    for step in sorted(schedule):
        changes = schedule[step]
        if step < 1 or not set(changes) <= set(STAGE_KEYS):
            raise ValueError(f"schedule.{step}={dict(changes)}: want a step above 0, {STAGE_KEYS}")
        last = stages[-1]
        shape = {k: changes[k] for k in ("row_tokens", "rows_per_step") if k in changes}
        text, vision = last.text, last.vision
        if "text_mixture" in changes:
            text = flat(changes["text_mixture"], f"schedule.{step}.text_mixture")
        if "vision_mixture" in changes:
            vision = flat(changes["vision_mixture"], f"schedule.{step}.vision_mixture")
        stages.append(
            Stage(
                first_step=step,
                text=text,
                vision=vision,
                vision_share=float(changes.get("vision_share", last.vision_share)),
                geometry=replace(last.geometry, **shape) if shape else last.geometry,
            )
        )
    return stages


def longest_run(
    index: Mapping[str, np.ndarray], stages: Sequence[Stage], max_epochs: Mapping[str, float]
) -> int:
    """Return how many steps the sources last: each read as often as it may, or once."""

    def lasts(num_steps: int) -> bool:
        needed = epochs_needed(index, stages, num_steps)
        return all(
            epochs <= max_epochs.get(name, 1.0)
            for kind in needed.values()
            for name, epochs in kind.items()
        )

    least, most = 0, 1
    while lasts(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if lasts(middle) else (least, middle)
    return least
