"""The one training step that every phase shares."""

import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything
from micro_run import NoiseData, NoiseSteps, fit, joined, micro_model, micro_settings
from torch import Tensor
from torch.utils.data import DataLoader

from moonlit.models.decoder import DecoderOutput
from moonlit.optim.muon_clip import MuonClip
from moonlit.phases.guard import TrainingDivergedError
from moonlit.phases.joint_pretraining import JointPretraining


class RecordGradients(Callback):
    """Keeps the gradients of the first step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, p in pl_module.named_parameters():
            if p.grad is not None:
                self.gradients.setdefault(name, p.grad.clone())


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_many_microbatches_give_the_gradient_of_one_batch():
    """Catches: a mean of means, a microbatch dropped, features given to the wrong microbatch."""
    many, one = RecordGradients(), RecordGradients()
    fit(max_steps=1, callbacks=[many])
    fit(max_steps=1, callbacks=[one], change=joined)

    assert len(many.gradients) == len(one.gradients) > 40
    for name, gradient in one.gradients.items():
        # float32: only the order of sums differs
        torch.testing.assert_close(many.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_trained_tokens():
    phase = fit(max_steps=1, change=lambda rows: [mask_all_but(rows[0], 3)])
    first = phase.trainer.callback_metrics["train/nll_per_token"].item()
    assert first == pytest.approx(math.log(50), abs=0.2)  # fresh weights know nothing


def mask_all_but(row, position: int):
    row.loss_mask = torch.arange(row.num_tokens) == position
    return row


def test_the_balance_loss_counts_once_for_every_trained_token():
    """Catches: a balance loss that the division by the step's tokens makes vanish."""
    phase = JointPretraining(**micro_settings())
    phase.configure_model()
    row = NoiseSteps()[0][1]
    hidden_TD = torch.zeros(row.num_tokens, 24)

    plain, balanced = (
        phase.loss(DecoderOutput(hidden_TD, torch.tensor(b)), row) for b in (0.0, 2.0)
    )

    assert (balanced - plain).item() == pytest.approx(2 * row.loss_mask.sum().item(), rel=1e-5)


def test_step_i_learns_at_the_schedules_rate_i_in_every_group():
    """Catches: a schedule one step ahead, an encoder scale that the schedule overwrites."""
    optimizer = partial(
        MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=None, encoder_lr_scale=0.5
    )
    rates = [1.0, 0.25, 0.0]
    settings = {"build_optimizer": optimizer, "schedule": lambda step, total_steps: rates[step]}

    phase = fit(max_steps=2, phase=JointPretraining(**micro_settings(**settings)))

    assert {group["lr"] for group in phase.trainer.optimizers[0].param_groups} == {0.00125, 0.0025}


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path):
    whole = fit(max_steps=6)
    fit(max_steps=6, callbacks=[SaveAt(3, tmp_path / "three.ckpt")])
    resumed = fit(max_steps=6, resume_from=tmp_path / "three.ckpt")

    assert resumed.trainer.global_step == 6
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, resumed.get_buffer(name)), name
    assert whole.guard.state_dict() == resumed.guard.state_dict()


def test_a_resumed_run_of_another_length_says_that_schedules_move(tmp_path: Path):
    fit(max_steps=3, callbacks=[SaveAt(2, tmp_path / "two.ckpt")])

    with pytest.warns(UserWarning, match="max_steps=4, but the checkpoint's run was to take 3"):
        fit(max_steps=4, resume_from=tmp_path / "two.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="trainer.max_steps")
        fit(max_steps=3, resume_from=tmp_path / "two.ckpt")


class PoisonLoss(JointPretraining):
    """Makes the loss NaN at the given steps."""

    bad_steps: set[int]

    def loss(self, output, batch):
        loss = super().loss(output, batch)
        return loss * math.nan if self.global_step in self.bad_steps else loss


def poisoned(bad_steps: set[int]) -> PoisonLoss:

    phase = PoisonLoss(**micro_settings())
    phase.bad_steps = bad_steps
    return phase


class Snapshot(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


@pytest.mark.filterwarnings("ignore:step 1 is skipped")
def test_a_nan_step_is_skipped_and_leaves_every_weight_and_moment_alone():
    seen = Snapshot()
    phase = fit(max_steps=3, phase=poisoned({1}), callbacks=[seen])

    assert torch.equal(seen.weights[0], seen.weights[1])
    assert not torch.equal(seen.weights[1], seen.weights[2])
    assert torch.isfinite(seen.weights[2]).all()
    assert (phase.guard.skipped, phase.trainer.global_step) == (1, 3)


@pytest.mark.filterwarnings("ignore:step 0 is skipped")
def test_a_skipped_step_leaves_the_selection_bias_alone_and_forgets_its_load():
    """Catches: routers that move on a step that the guard refused."""
    (router,) = fit(max_steps=1, phase=poisoned({0})).routers

    assert not router.e_score_correction_bias.any()
    assert not router.tokens_per_expert_ME.any()


def test_a_skipped_step_says_so():
    with pytest.warns(UserWarning, match="step 1 is skipped for a loss of nan"):
        fit(max_steps=2, phase=poisoned({1}))


@pytest.mark.filterwarnings("ignore:step")
def test_the_run_stops_after_the_configured_number_of_skips():
    with pytest.raises(TrainingDivergedError, match="3 optimizer steps in a row"):
        fit(max_steps=9, phase=poisoned({2, 3, 4, 5, 6}))


@pytest.mark.parametrize("part", ["vision_tower", "mm_projector", "language_model"])
def test_only_the_named_part_learns(part: str):
    """Catches: a router's selection bias, no parameter, that moves in a frozen language model."""
    seed_everything(0, verbose=False)
    before = {name: p.clone() for name, p in micro_model().state_dict().items()}
    phase = fit(max_steps=2, phase=JointPretraining(**micro_settings(trains=[part])))

    moved = {
        name.split(".")[0]
        for name, p in phase.model.state_dict().items()
        if not torch.equal(p, before[name])
    }
    assert moved == {part}


def test_an_unknown_part_is_refused_by_name():

    with pytest.raises(ValueError, match=r"phase.trains holds \['decoder'\]"):
        JointPretraining(**micro_settings(trains=["decoder"]))


def test_the_selection_bias_moves_against_the_load_and_the_load_is_forgotten():
    phase = fit(max_steps=1)
    (router,) = phase.routers
    assert router.e_score_correction_bias.abs().max() > 0
    assert abs(router.e_score_correction_bias.sum().item()) < 1e-6  # moves are centred
    assert router.tokens_per_expert_ME.sum() == 0


class HeldOutNoise(NoiseData):
    held_out_names = ("noise",)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([NoiseSteps()[0][1]], batch_size=None)


def test_every_evaluation_counts_anew():
    """Catches: scores that add up over the evaluations of a run."""
    phase = fit(max_steps=1)

    for _ in range(2):
        phase.trainer.validate(phase, datamodule=HeldOutNoise(None), verbose=False)

    assert phase.held_out.scores["noise"].num_tokens == NoiseSteps()[0][1].loss_mask.sum()
