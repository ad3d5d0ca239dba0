"""Toggle's measures, from iterations made by hand."""

from pathlib import Path

import pytest
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from micro_run import fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.toggle_budget import ToggleBudget
from moonlit.batch import Group
from moonlit.rl.length_rules import NoRule
from moonlit.rl.toggle import Toggle
from tests.rl.answers import group


class Rule(Callback):
    """The phase applies a rule to these groups, an iteration each."""

    def __init__(self, rule, *iterations: list[Group]) -> None:
        self.rule, self.iterations = rule, iterations

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.length_rule = self.rule
        self.rule.apply(self.iterations[trainer.global_step])


def run(rule, *iterations: list[Group], folder: Path) -> tuple[dict[str, float], EventAccumulator]:
    """Return the last iteration's numbers, and all that TensorBoard has."""
    logger = TensorBoardLogger(str(folder), name="", version="")
    phase = fit(
        max_steps=len(iterations), callbacks=[Rule(rule, *iterations), ToggleBudget()],
        logger=logger,
    )  # fmt: skip
    logger.finalize("success")
    told = phase.trainer.callback_metrics.items()
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    return {name: value.item() for name, value in told if name.startswith("toggle/")}, events


def test_a_budget_phase_by_hand(tmp_path: Path):
    """At the start correct counts had 2, 4 and 12 tokens, of which the median is 4, the mean 6."""
    toggle = Toggle(period=1, min_accuracy=0.5, percentile=50.0, estimate_iterations=1)
    start = [group((1.0, 2), (1.0, 4), (1.0, 12), (0.0, 40), kind="count", domain="perception")]
    later = [
        group((1.0, 3), (1.0, 5), kind="count", domain="perception"),  # held to it: 3 <= 4 < 5
        group((1.0, 9), (0.0, 9), (0.0, 9), kind="count", domain="perception"),  # too weak
        group((1.0, 7), kind="sums", domain="reasoning"),  # no budget
    ]
    told, events = run(toggle, start, later, folder=tmp_path)

    assert told["toggle/phase"] == 0
    assert told["toggle/budget_count"] == 4
    assert told["toggle/constrained_groups"] == pytest.approx(1 / 3)
    assert told["toggle/over_budget"] == pytest.approx(4 / 6)
    assert told["toggle/correct_tokens"] == pytest.approx((3 + 5 + 9 + 7) / 4)
    assert told["toggle/saved_tokens"] == pytest.approx((3 + 1 - 3) / 3)
    assert told["toggle/accuracy_budget_phase"] == pytest.approx(4 / 6)  # before any was taken
    assert told["toggle/accuracy_scaling_phase"] == 0.75  # of the first iteration
    (drawn,) = events.Histograms("toggle/budgets_perception")
    assert (drawn.histogram_value.num, drawn.histogram_value.min) == (5, 4)
    assert "toggle/budgets_reasoning" not in events.Tags()["histograms"]


def test_other_rules_are_left_alone(tmp_path: Path):
    told, _ = run(NoRule(), [group((1.0, 2), kind="count", domain="d")], folder=tmp_path)
    assert told == {}
