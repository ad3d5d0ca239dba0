"""What a plan holds, counted: shares by step, lengths, balance of rows and of ranks."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from data_modules.components.plan import Plan
from data_modules.components.plan_checks import Index

PERCENTILES = (50, 95, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """Counts of a plan."""

    tokens_of_step: np.ndarray
    """int64 [steps]."""
    vision_tokens_of_step: np.ndarray
    """int64 [steps]."""
    vision_share: float
    """Fraction of all the run's tokens."""
    patches_max_over_mean: float
    """Encoder work of the fullest row over the mean row, averaged over steps that have any."""
    work_max_over_mean: dict[int, tuple[float, float]]
    """By number of ranks: text and vision work of the busiest rank over the mean, over steps."""
    tokens_of_source: dict[str, int]
    vision_tokens_of_source: dict[str, int]
    epochs_of_source: dict[str, float]
    """Documents begun over documents there are of the kinds that are read."""
    lengths_of_source: dict[str, list[int]]
    """Median, 95th percentile and maximum of the lengths of the documents begun."""

    @property
    def vision_share_of_step(self) -> np.ndarray:
        """Fraction of the step's tokens, float64 [steps]."""
        return self.vision_tokens_of_step / self.tokens_of_step

    def tables(self) -> list[Table]:
        """Draw it."""
        sources = Table("source", "tokens", "of all", "vision", "of vision", "epochs",
                        *(f"len {p} %" for p in PERCENTILES))  # fmt: skip
        total = sum(self.tokens_of_source.values())
        vision = max(sum(self.vision_tokens_of_source.values()), 1)
        for name, tokens in self.tokens_of_source.items():
            mine = self.vision_tokens_of_source[name]
            sources.add_row(
                name, f"{tokens:,}", f"{tokens / total:.2%}", f"{mine:,}", f"{mine / vision:.2%}",
                f"{self.epochs_of_source[name]:.2f}",
                *(f"{length:,}" for length in self.lengths_of_source[name]),
            )  # fmt: skip
        run = Table(show_header=False)
        share = self.vision_share_of_step
        run.add_row("steps", f"{len(share):,}")
        run.add_row("tokens", f"{total:,}")
        run.add_row("vision share", f"{self.vision_share:.3%}")
        run.add_row("-- of the steps, least and most", f"{share.min():.2%}, {share.max():.2%}")
        for ranks, (text, patches) in self.work_max_over_mean.items():
            run.add_row(f"busiest of {ranks} ranks over the mean: attention", f"{text:.3f}")
            run.add_row(f"busiest of {ranks} ranks over the mean: patches", f"{patches:.3f}")
        return [sources, run]


def report(plan: Plan, index: Index) -> PlanReport:
    """Count what a plan holds."""
    num_rows = len(plan.row_starts) - 1
    row_of_piece = np.repeat(np.arange(num_rows), np.diff(plan.row_starts))
    step_of_row = np.repeat(np.arange(plan.num_steps), np.diff(plan.step_starts))
    vision, patches = np.zeros(len(plan.pieces), np.int64), np.zeros(len(plan.pieces), np.int64)
    lengths = (plan.pieces["stop"] - plan.pieces["start"]).astype(np.int64)
    tokens_of, vision_of, epochs_of, lengths_of = {}, {}, {}, {}
    for number, name in enumerate(plan.sources):
        mine = plan.pieces["source"] == number
        pieces = plan.pieces[mine]
        documents = index[name][pieces["document"]]
        vision[mine], patches[mine] = documents["num_vision_tokens"], documents["num_patches"]
        tokens_of[name] = int(lengths[mine].sum())
        vision_of[name] = int(vision[mine].sum())
        begun = documents[pieces["start"] == 0]
        epochs_of[name] = len(begun) / num_read(index[name], begun)
        whole = begun["num_tokens"] if len(begun) else np.zeros(1, np.uint32)
        lengths_of[name] = [int(v) for v in np.percentile(whole, PERCENTILES, method="higher")]
    attention_of_row = np.bincount(row_of_piece, lengths.astype(np.float64) ** 2, num_rows)
    patches_of_row = np.bincount(row_of_piece, patches, num_rows)
    tokens_of_step = np.bincount(step_of_row[row_of_piece], lengths, plan.num_steps)
    vision_of_step = np.bincount(step_of_row[row_of_piece], vision, plan.num_steps)
    return PlanReport(
        tokens_of_step=tokens_of_step.astype(np.int64),
        vision_tokens_of_step=vision_of_step.astype(np.int64),
        vision_share=float(vision_of_step.sum() / tokens_of_step.sum()),
        patches_max_over_mean=imbalance(patches_of_row, plan, None),
        work_max_over_mean={
            ranks: (
                imbalance(attention_of_row, plan, ranks),
                imbalance(patches_of_row, plan, ranks),
            )
            for ranks in rank_counts(plan)
        },
        tokens_of_source=tokens_of,
        vision_tokens_of_source=vision_of,
        epochs_of_source=epochs_of,
        lengths_of_source=lengths_of,
    )


def num_read(rows: np.ndarray, begun: np.ndarray) -> int:
    """Count a source's documents of the kinds, with media and without, that a plan reads."""
    with_media = rows["num_vision_tokens"] > 0
    num = sum(
        int((with_media == kind).sum())
        for kind in (False, True)
        if ((begun["num_vision_tokens"] > 0) == kind).any()
    )
    return max(num, 1)


def rank_counts(plan: Plan) -> list[int]:
    """Powers of two that share out every step's rows evenly, up to the rows of a step."""
    rows = np.unique(np.diff(plan.step_starts))
    return [n for n in (2**p for p in range(1, 20)) if n <= rows.min() and not (rows % n).any()]


def imbalance(work_of_row: np.ndarray, plan: Plan, num_ranks: int | None) -> float:
    """Return the work of the busiest rank over the mean, averaged over the steps that have any.

    Args:
        work_of_row: float64 [rows].
        plan: the rows' steps.
        num_ranks: rank r takes rows r, r + R, ... of a step; None: every row is a rank's.
    """
    ratios = []
    for first, last in zip(plan.step_starts[:-1], plan.step_starts[1:], strict=True):
        work = work_of_row[first:last]
        if num_ranks is not None:
            work = work.reshape(-1, num_ranks).sum(axis=0)
        if work.any():
            ratios.append(work.max() / work.mean())
    return float(np.mean(ratios)) if ratios else 1.0
