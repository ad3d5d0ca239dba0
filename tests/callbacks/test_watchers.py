"""Each callback against numbers that can be checked by hand, on the micro run."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from micro_run import NoiseData, NoiseSteps, fit, micro_settings
from torch.utils.data import DataLoader

from callbacks import interruption, progress, throughput
from callbacks.attention_logits import AttentionLogits
from callbacks.checkpoints import Checkpoints
from callbacks.expert_load import ExpertLoad, layer_metrics, load_picture
from callbacks.gradient_norms import GradientNorms
from callbacks.interruption import Interruption
from callbacks.progress import RunProgress
from callbacks.throughput import Throughput, peak_flops
from callbacks.vision_share import VisionShare
from moonlit.phases.joint_pretraining import JointPretraining

TOKENS, VISION_TOKENS = 35, 4  # of every step of the micro run: 21 + 14, and 2 pictures of 2


def test_vision_share_is_that_of_the_step_and_survives_a_resume():
    watcher = VisionShare()
    phase = fit(max_steps=3, callbacks=[watcher])
    logged = phase.trainer.callback_metrics
    assert logged["data/vision_share"].item() == pytest.approx(VISION_TOKENS / TOKENS)

    resumed = VisionShare()
    resumed.load_state_dict(watcher.state_dict())
    fit(max_steps=1, callbacks=[resumed], change=lambda rows: rows[1:])  # a text-only step
    assert (resumed.num_tokens, resumed.num_vision_tokens) == (3 * TOKENS + 14, 3 * VISION_TOKENS)


def test_cumulative_share_is_not_the_last_steps():
    watcher = VisionShare()
    watcher.load_state_dict({"num_tokens": 65, "num_vision_tokens": 6})
    phase = fit(max_steps=1, callbacks=[watcher])
    logged = phase.trainer.callback_metrics
    assert logged["data/vision_share_cumulative"].item() == pytest.approx(10 / 100)


def test_throughput_counts_the_wait_for_data_in_the_step(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 13.0, 14.0])  # training starts, the first batch is there, the step is done
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    logged = fit(max_steps=1, callbacks=[Throughput()]).trainer.callback_metrics
    assert logged["perf/step_s"].item() == pytest.approx(4.0)
    assert logged["perf/data_wait_fraction"].item() == pytest.approx(0.75)
    assert logged["perf/tokens_per_s_per_gpu"].item() == pytest.approx(TOKENS / 4)


def test_utilisation_is_work_done_over_the_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e12)
    phase = fit(max_steps=1, callbacks=[Throughput()])
    logged = phase.trainer.callback_metrics
    per_s = logged["perf/tokens_per_s_per_gpu"].item()
    assert logged["perf/mfu"].item() == pytest.approx(per_s * phase.flops_per_token / 1e12)
    assert phase.flops_per_token > 6 * 50 * 24  # more than the head alone


def test_no_peak_is_made_up_for_a_cpu():
    assert peak_flops(torch.device("cpu")) is None


def test_expert_load_metrics_in_closed_form():
    load_ME = torch.tensor([[6.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0]])  # text, vision
    metrics = {name: value.item() for name, value in layer_metrics("moe/layer_0", load_ME).items()}
    assert metrics == {
        "moe/layer_0/max_violation": 1.0,  # 6 of a mean of 3
        "moe/layer_0/dead_experts": 1.0,
        "moe/layer_0/max_violation_text": 2.0,  # 6 of a mean of 2
        "moe/layer_0/dead_experts_text": 2.0,
        "moe/layer_0/max_violation_vision": 3.0,
        "moe/layer_0/dead_experts_vision": 3.0,
    }


def test_a_modality_without_tokens_has_no_balance():
    metrics = layer_metrics("m", torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert {"m/max_violation", "m/max_violation_text"} < metrics.keys()
    assert "m/max_violation_vision" not in metrics


def test_the_run_counts_vision_tokens_apart(tmp_path: Path):
    class Loads(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.load_ME = pl_module.routers[0].tokens_per_expert_ME.clone()

    loads = Loads()
    fit(max_steps=1, callbacks=[ExpertLoad(picture_every_n_steps=1), loads])
    top_k = 2
    assert loads.load_ME.sum(1).tolist() == [
        (TOKENS - VISION_TOKENS) * top_k,
        VISION_TOKENS * top_k,
    ]


def test_the_load_picture_is_red_only_above_twice_the_mean():
    load_LME = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 8.0]]])
    picture = load_picture(load_LME, cell=1)
    assert picture.shape == (3, 2, 4)
    assert picture[:, 0, 0].tolist() == [127, 127, 127]  # the mean load is mid grey
    assert picture[:, 1, 3].tolist() == [255, 0, 0]
    assert picture[:, 1, 0].tolist() == [0, 0, 0]


class GiveLogits(Callback):
    """Lets every layer have measured what its number says."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        measured = [b for name, b in pl_module.named_buffers() if name.endswith("max_logits_H")]
        for layer, max_logits_H in enumerate(measured):
            max_logits_H.copy_(torch.tensor([5.0, 7.0]) + layer)


def test_the_maximum_logit_is_that_of_all_heads_and_layers():
    """Catches: the logits of one layer alone, a mean over heads."""
    phase = fit(max_steps=1, callbacks=[GiveLogits(), AttentionLogits()])
    assert phase.trainer.callback_metrics["attention/max_logit"].item() == 8.0  # the second layer's


def test_attention_logits_remember_every_head_ever_clipped():
    watcher = AttentionLogits()
    phase = fit(max_steps=1, callbacks=[watcher])
    assert phase.trainer.callback_metrics["attention/max_logit"] > 0
    optimizer = phase.trainer.optimizers[0]
    optimizer.qk_clip.clipped_heads_LH = torch.tensor([[True, False], [False, False]])
    watcher.on_train_batch_end(phase.trainer, Deaf(), None, None, 0)
    optimizer.qk_clip.clipped_heads_LH = torch.tensor([[False, False], [False, True]])
    watcher.on_train_batch_end(phase.trainer, Deaf(), None, None, 0)
    assert watcher.state_dict()["ever_clipped"].tolist() == [[True, False], [False, True]]


class Deaf(LightningModule):
    """Takes what is logged outside a hook."""

    def log(self, *args: object, **kwargs: object) -> None: ...


def test_gradient_norms_add_up_to_the_whole():
    logged = fit(max_steps=1, callbacks=[GradientNorms()]).trainer.callback_metrics
    parts = [logged[f"grad_norm/{p}"] for p in ("vision_tower", "mm_projector", "language_model")]
    whole = torch.stack(parts).norm().item()
    assert whole == pytest.approx(min(1.0, logged["train/grad_norm"].item()), rel=1e-4)


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture):
    fit(max_steps=3, callbacks=[Throughput(), VisionShare(), RunProgress(line_every_s=1e6)])
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/3", "3/3"]
    assert "vision 11.4%" in shown[0]
    assert "waiting for data" in shown[-1]
    assert "loss" in shown[0]


def test_after_a_resume_the_time_left_is_told_by_the_steps_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Catches: steps of before the resume counted as done in no time."""
    fit(max_steps=3).trainer.save_checkpoint(tmp_path / "three.ckpt")
    clock = iter([100.0, 110.0, 120.0, 130.0])  # training starts, then ten seconds a step
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    watcher = RunProgress(line_every_s=0.0)
    fit(max_steps=6, callbacks=[watcher], resume_from=tmp_path / "three.ckpt")

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split("left ")[1] for line in lines] == ["20 s", "10 s", "0 s"]


def keep(folder: Path) -> Checkpoints:
    return Checkpoints(
        dirpath=str(folder), every_n_steps=100, keep_last=None, keep_every_n_steps=None
    )


class Press(Callback):
    """Sends this process a signal inside the given steps."""

    def __init__(self, number: signal.Signals, *steps: int) -> None:
        self.number, self.steps = number, steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_step_boundary_and_the_run_goes_on_from_there(
    number: signal.Signals, tmp_path: Path
):
    before = signal.getsignal(number)
    stop = Interruption()
    stopped = fit(max_steps=5, callbacks=[stop, keep(tmp_path), Press(number, 2)])
    assert (stopped.trainer.global_step, stop.received, stop.stopped) == (3, number, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step_000003.ckpt"]
    assert signal.getsignal(number) is before

    resumed = fit(max_steps=5, resume_from=tmp_path / "last.ckpt")
    whole = fit(max_steps=5)
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_stopped_run_is_not_evaluated_first():
    class Evaluated(NoiseData):
        def val_dataloader(self):
            return self.train_dataloader()

    class Noticed(Callback):
        times = 0

        def on_validation_start(self, trainer, pl_module):
            self.times += 1

    noticed = Noticed()
    phase = JointPretraining(**micro_settings())
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[Interruption(), Press(signal.SIGTERM, 1), noticed], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(phase, datamodule=Evaluated(None))
    assert (trainer.global_step, noticed.times) == (2, 0)


def test_a_signal_in_the_last_step_ends_the_run_as_ever(tmp_path: Path):
    stop = Interruption()
    done = fit(max_steps=3, callbacks=[stop, keep(tmp_path), Press(signal.SIGTERM, 2)])
    assert (done.trainer.global_step, stop.received, stop.stopped) == (3, signal.SIGTERM, False)


def test_a_signal_before_the_first_step_is_not_lost(tmp_path: Path):
    class PressEarly(Press):
        def on_fit_start(self, trainer, pl_module):
            os.kill(os.getpid(), self.number)

    early = PressEarly(signal.SIGUSR1)
    stopped = fit(max_steps=5, callbacks=[Interruption(), keep(tmp_path), early])
    assert stopped.trainer.global_step == 1
    assert (tmp_path / "step_000001.ckpt").exists()


def test_a_signal_in_the_closing_evaluation_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Catches: Lightning's handler, which makes one rank wait for others that wait for it."""

    class Evaluated(NoiseData):
        held_out_names = ("noise",)

        def val_dataloader(self):
            return DataLoader([NoiseSteps()[0][1]], batch_size=None)

    class PressInEvaluation(Press):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            os.kill(os.getpid(), self.number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(interruption.os, "_exit", sys.exit)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[Interruption(), PressInEvaluation(signal.SIGTERM)],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        trainer.validate(JointPretraining(**micro_settings()), datamodule=Evaluated(None))
    assert ended.value.code == 130
    assert "SIGTERM: leaving the evaluation" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_wait(tmp_path: Path):
    class PressTwice(Press):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)

    with pytest.raises(SystemExit):
        fit(callbacks=[Interruption(), keep(tmp_path), PressTwice(signal.SIGINT, 0)])
    assert not list(tmp_path.iterdir())


def test_the_load_is_drawn_into_tensorboard(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path)
    phase = fit(max_steps=1)
    phase.trainer.loggers = [logger]
    from callbacks.expert_load import draw

    draw(phase.trainer, torch.rand(1, 2, 4))
    logger.experiment.flush()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("events*"))
    assert b"moe/load_text_above_vision" in written
