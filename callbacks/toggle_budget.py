"""Watches Toggle: its phase, its budgets, whom they bind, and what they save."""

from statistics import fmean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moonlit.rl.toggle import Outcome, Toggle


class ToggleBudget(Callback):
    """Logs ``toggle/NAME`` after each iteration of a phase whose length rule is ``Toggle``.

    ``phase``: 0 budget, 1 scaling or still measuring. ``constrained_groups``: share of the groups
    that were held to their budget. ``over_budget``: share of the answers that are longer than it.
    ``correct_tokens``: mean length of correct answers; ``saved_tokens``: how much shorter they are
    than those of their kind were at the start. ``accuracy_budget_phase``,
    ``accuracy_scaling_phase``: mean verified reward. ``budget_KIND``: the budget of a kind of task.
    Histograms ``budgets_DOMAIN``: the budgets of the iteration's answers.

    Source: technical report (arXiv:2602.02276), Sec. 4.4.2; what is watched is ours.
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the iteration's outcome, over all ranks."""
        rule = getattr(pl_module, "length_rule", None)
        if not isinstance(rule, Toggle) or rule.last is None:
            return
        budgets = {f"budget_{kind}": budget for kind, budget in rule.budgets.items()}
        told = measures(rule.last) | budgets
        pl_module.log_dict({f"toggle/{name}": value for name, value in told.items()})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for domain, some in rule.last.budgets.items():
                    logger.experiment.add_histogram(
                        f"toggle/budgets_{domain}", torch.tensor(some), trainer.global_step
                    )


def measures(seen: Outcome) -> dict[str, float]:
    """Return what is known of an iteration; the mean of nothing is left out."""
    accuracy = f"accuracy_{'budget' if seen.is_budget_phase else 'scaling'}_phase"
    correct = [length for some in seen.correct_lengths.values() for length in some]
    means = {accuracy: seen.rewards, "correct_tokens": correct, "saved_tokens": seen.saved_tokens}
    return {
        "phase": 0.0 if seen.is_budget_phase else 1.0,
        "constrained_groups": seen.num_constrained / max(1, seen.num_groups),
        "over_budget": seen.num_over_budget / max(1, seen.num_answers),
        **{name: fmean(some) for name, some in means.items() if some},
    }
