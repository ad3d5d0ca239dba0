"""A pipeline of stages gives what one process with plain autograd gives."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from micro_run import micro_model, micro_settings
from parallel_run import Outcome, SaveAt, StepRows, merged, step_rows, strategy, train
from ranks import Ranks
from test_dep import PARTS, assert_same
from torch.utils.data import DataLoader

from callbacks.attention_logits import AttentionLogits
from callbacks.expert_load import ExpertLoad
from callbacks.gradient_norms import GradientNorms
from moonlit.batch import PackedMedia
from moonlit.distributed.checkpoint import stored_model
from moonlit.distributed.pipeline import portions
from moonlit.models.kimi import Kimi
from moonlit.models.stages import cut_layers
from moonlit.optim.muon_clip import MuonClip
from moonlit.phases.joint_pretraining import JointPretraining


def deep_model(dtype: torch.dtype, num_layers: int = 5) -> Kimi:
    """Layers that cannot be cut evenly, with a balance loss that travels through all stages."""
    micro = micro_model()
    shape = replace(micro.decoder_shape, num_layers=num_layers, aux_loss_alpha=0.01)
    seed_everything(0, verbose=False)
    return Kimi(decoder=shape, vision=micro.vision_shape, experts="reference").to(dtype)


def pipelined(layout: dict[str, Any] | None, **settings: Any) -> Outcome:
    dtype = settings.pop("dtype", torch.float64)
    phase = {"build_model": partial(deep_model, dtype)} | settings.pop("phase", {})
    return train(layout, phase=phase, dtype=dtype, **settings)


@cache
def alone(**settings: Any) -> Outcome:
    return pipelined(None, **settings)


TWO = {"pp_size": 2}
INTERLEAVED = {"pp_size": 2, "stages_per_rank": 2}


@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
@pytest.mark.parametrize("layout", [TWO, INTERLEAVED], ids=str)
def test_two_stages_train_as_one_process_does(two_ranks: Ranks, layout: dict, encoder: str):
    """Four rows; a step without media; catches features or balance losses lost between stages."""
    ours = merged(two_ranks(pipelined, layout | {"encoder": encoder}, num_ranks=2))
    assert_same(ours, alone(), rtol=1e-6)  # float64, but the routers' scores are float32


@pytest.mark.parametrize("num_rows", [1, 3, 5])
@pytest.mark.parametrize("layout", [TWO, INTERLEAVED | {"zero_stage": 1}], ids=str)
def test_any_number_of_microbatches_can_pass(two_ranks: Ranks, layout: dict, num_rows: int):
    """Fewer than stages, and not a multiple; five interleaved ones are two passes.

    Catches gradients that the second pass forgets.
    """
    ours = merged(two_ranks(pipelined, layout, num_ranks=2, num_rows=num_rows))
    assert_same(ours, alone(num_rows=num_rows), rtol=1e-6)


@pytest.mark.parametrize("trains", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("encoder", ["decoupled", "inline"])
def test_frozen_parts_stay(two_ranks: Ranks, trains: tuple, encoder: str):
    layout = INTERLEAVED | {"encoder": encoder}
    ours = merged(two_ranks(pipelined, layout, num_ranks=2, phase={"trains": trains}))
    assert {name.split(".")[1] for name in ours.gradients} == set(trains)
    theirs = pipelined(None, phase={"trains": trains})
    assert_same(ours, theirs, rtol=1e-6)


def test_float32_gradients_are_those_of_one_process(two_ranks: Ranks):
    settings: dict[str, Any] = {"dtype": torch.float32, "max_steps": 1}
    ours = merged(two_ranks(pipelined, INTERLEAVED, num_ranks=2, **settings))
    theirs = alone(**settings)
    assert set(ours.gradients) == set(theirs.gradients)
    for name, expected in theirs.gradients.items():
        error = (ours.gradients[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def slow(layout: dict[str, Any]) -> Any:
    return pytest.param(layout, marks=pytest.mark.slow)


FOUR = [
    {"pp_size": 2, "ep_size": 2, "stages_per_rank": 2, "encoder": "inline"},
    {"pp_size": 4, "zero_stage": 1},
    slow({"pp_size": 2, "dp_shard_size": 2, "zero_stage": 2}),
    slow({"pp_size": 2, "ep_size": 2, "zero_stage": 1, "recompute": "never"}),
    slow({"pp_size": 2, "dp_replicate_size": 2, "stages_per_rank": 2, "recompute": "auto"}),
]


@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks_train_as_one_process_does(four_ranks: Ranks, layout: dict[str, Any]):
    """With MuonClip, clipping every head: catches maxima and loads of too few or too many ranks."""
    ours = merged(four_ranks(pipelined, layout, num_ranks=4, muon=True))
    assert_same(ours, alone(muon=True), rtol=1e-6)


def saved_at_three(layout: dict[str, Any], path: Path) -> Outcome:
    return pipelined(layout, num_ranks=2, muon=True, callbacks=[SaveAt(3, path)])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (INTERLEAVED, {}),
        pytest.param({}, TWO, marks=pytest.mark.slow),
        pytest.param(TWO, INTERLEAVED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_pipelines_go_on_with_a_checkpoint(
    two_ranks: Ranks, tmp_path: Path, written: dict, read: dict
):
    path = tmp_path / "three.ckpt"
    two_ranks(saved_at_three, written, path)
    resume = {"num_ranks": 2, "muon": True, "resume_from": str(path)}
    ours = merged(two_ranks(pipelined, read, **resume))

    theirs = alone(muon=True)
    torch.testing.assert_close(
        torch.tensor(ours.metrics), torch.tensor(theirs.metrics[3:]), rtol=1e-6, atol=0
    )
    assert set(ours.weights) == set(theirs.weights)
    for name, expected in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], expected, rtol=1e-5, atol=1e-5, msg=name)
    model, weights = stored_model(path)
    assert set(weights) == set(model.state_dict())


class HeldOutRows(StepRows):
    held_out_names = ("noise",)

    def val_dataloader(self) -> Any:
        return DataLoader([step_rows(0)[0]], batch_size=None)


def watched(layout: dict[str, Any] | None) -> tuple[dict[str, float], dict[str, float], list[int]]:
    """Train with watchers; then score a held-out row and continue one of its documents."""
    muon_clip = partial(MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=0.01)
    build_model = partial(deep_model, torch.float64)
    phase = JointPretraining(**micro_settings(build_model=build_model, build_optimizer=muon_clip))
    trainer = Trainer(
        accelerator="cpu", devices=2 if layout else 1, max_steps=2, logger=False,
        strategy=strategy(**layout) if layout else "auto", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=100,
        callbacks=[ExpertLoad(picture_every_n_steps=0), AttentionLogits(), GradientNorms()],
    )  # fmt: skip
    trainer.fit(phase, datamodule=HeldOutRows())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.validate(phase, datamodule=HeldOutRows(), verbose=False)
    row = step_rows(0)[0]
    assert row.media is not None
    media = PackedMedia(pixel_values=row.media.pixel_values[:8], grid_thw=row.media.grid_thw[:1])
    answer = phase.greedy_answer(row.input_ids[:9], media, max_new_tokens=5, stop_ids={1})
    return logged, phase.held_out.metrics() | {"flops": phase.flops_per_token}, answer


def test_what_is_watched_and_scored_is_that_of_the_whole_model(two_ranks: Ranks):
    """Catches: metrics of the first stage's layers alone, a score that one rank knows."""
    logged, scores, answer = watched(None)
    assert len([name for name in logged if name.endswith("/max_violation")]) == 4
    assert len(answer) == 5

    for ours in two_ranks(watched, INTERLEAVED):
        assert set(ours[0]) == set(logged)
        assert ours[0] == pytest.approx(logged, rel=1e-5)
        assert ours[1] == pytest.approx(scores, rel=1e-6)
        assert ours[2] == answer


def test_a_pipeline_cannot_sample_from_the_whole_model():
    trainer: Any = Trainer(accelerator="cpu", devices=2, strategy=strategy(**TWO), logger=False)
    trainer.strategy.check_layout(micro_model().decoder_shape)
    with pytest.raises(ValueError, match="pp_size=2: this phase samples from a copy of the whole"):
        trainer.strategy.check_layout(micro_model().decoder_shape, samples=True)


def test_layers_are_cut_evenly_and_microbatches_into_passes():
    assert cut_layers(61, 8) == [
        range(0, 7), range(7, 15), range(15, 22), range(22, 30), range(30, 38), range(38, 45),
        range(45, 53), range(53, 61),
    ]  # fmt: skip
    assert portions(11, 4, 2) == [range(0, 8), range(8, 11)]
    assert portions(10, 4, 2) == [range(0, 10)]  # two rounds of five
    assert portions(3, 4, 2) == [range(0, 3)]
    assert portions(11, 4, 1) == [range(0, 11)]


def test_a_pipeline_does_not_scale_losses():
    trainer: Any = Trainer(
        accelerator="cpu", devices=2, strategy=strategy(**TWO), precision="bf16-mixed", logger=False
    )
    trainer.strategy.check_precision(trainer)
    trainer.precision_plugin.scaler = object()  # what 16-mixed has
    with pytest.raises(ValueError, match="scales the loss, which a pipeline"):
        trainer.strategy.check_precision(trainer)
