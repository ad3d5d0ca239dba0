"""Checkpoints are whole or absent, and weights that do not fit are named."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moonlit.distributed.checkpoint import (
    AtomicCheckpointIO,
    load_weights,
    model_from_checkpoint,
    tensor_bytes,
    weights_of,
)
from moonlit.distributed.sharded_checkpoint import INDEX_FILE, STATE_FILE
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape, EncoderShape

SAVE_HALF_AND_HANG = """
import sys, time, torch
from moonlit.distributed.checkpoint import AtomicCheckpointIO

def save_half_and_hang(checkpoint, file):
    file.write(b"half of the new checkpoint")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

torch.save = save_half_and_hang
AtomicCheckpointIO().save_checkpoint({"step": 2}, sys.argv[1])
"""


class TinyNetwork(nn.Module):
    def __init__(self, vocabulary: int = 7, width: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.inner = nn.Linear(width, 5)


def save_phase_of(network: nn.Module, path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "global_step": 3}, path)


def test_what_is_saved_is_loaded(tmp_path: Path):
    checkpoint = {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "step": 5}

    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "new" / "last.ckpt")
    again = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt")

    assert again["step"] == 5
    assert torch.equal(again["state_dict"]["w"], checkpoint["state_dict"]["w"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing_leaves_the_old_checkpoint(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    command = [sys.executable, "-c", SAVE_HALF_AND_HANG, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.kill()

    assert list(tmp_path.glob("*.ckpt")) == [path]
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)  # what the kill left is no obstacle
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 3}
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_save_cleans_up(tmp_path: Path, monkeypatch, interruption):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def interrupted(_checkpoint, file):
        file.write(b"half")
        raise interruption

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(interruption):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)

    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=399))
    path = tmp_path / "last.ckpt"

    with pytest.raises(OSError, match=r"400 bytes needed, 399 free.*last\.ckpt") as caught:
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(100)}, path)

    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_disk_refuses_is_an_os_error_and_leaves_nothing(tmp_path: Path):
    """A real failing write: files may not grow above 100 kB for a moment."""
    path = tmp_path / "last.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(OSError, match="file too large: 400,000 bytes needed") as caught:
            AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert os.listdir(tmp_path) == []


def test_shared_memory_is_counted_once():
    base = torch.zeros(10)
    assert tensor_bytes({"a": base, "b": [base[:5], base.view(2, 5)], "c": "text"}) == 40


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "gone.ckpt")


def test_shards_want_the_strategy_that_reads_them(tmp_path: Path):
    for name in (INDEX_FILE, STATE_FILE):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="a folder of shards: go on with strategy=dep"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 10, 700, 2000])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, kept_bytes: int):
    path = tmp_path / "cut.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(500)}, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])

    with pytest.raises(ValueError, match=f"cut.ckpt is truncated .*{kept_bytes:,} bytes"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_weights_are_taken_out_of_a_checkpoint_without_their_prefix(tmp_path: Path):
    torch.manual_seed(0)
    source, copy = TinyNetwork(), TinyNetwork()
    save_phase_of(source, tmp_path / "last.ckpt")

    load_weights(copy, tmp_path / "last.ckpt")

    assert set(weights_of(tmp_path / "last.ckpt")) == set(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"other.w": torch.ones(2)}}, tmp_path / "c")
    with pytest.raises(ValueError, match="c holds no weights"):
        weights_of(tmp_path / "c")


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path):
    checkpoint = TinyNetwork()
    checkpoint.inner = nn.Linear(3, 6, bias=False)
    checkpoint.extra = nn.Linear(2, 2, bias=False)
    save_phase_of(checkpoint, tmp_path / "last.ckpt")
    before = TinyNetwork()

    with pytest.raises(ValueError, match=r"last\.ckpt does not fit the model") as caught:
        load_weights(before, tmp_path / "last.ckpt")

    assert str(caught.value).splitlines()[1:] == [
        "  missing (1): inner.bias",
        "  unexpected (1): extra.weight",
        "  misshapen (1): inner.weight is [6, 3], the model has [5, 3]",
    ]


def test_another_vocabulary_is_said_in_words(tmp_path: Path):
    save_phase_of(TinyNetwork(vocabulary=7), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="has 7 tokens, the model 9: they belong to different tok"):
        load_weights(TinyNetwork(vocabulary=9), tmp_path / "last.ckpt")


def test_another_width_is_no_other_vocabulary(tmp_path: Path):
    wider = TinyNetwork(vocabulary=7)
    name, table = next((n, p) for n, p in wider.named_parameters() if p.shape[0] == 7)
    wider.get_parameter(name).data = table.new_zeros(7, table.shape[1] + 1)
    save_phase_of(wider, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_weights(TinyNetwork(vocabulary=7), tmp_path / "last.ckpt")
    assert "tokenizers" not in str(caught.value)


def test_a_model_is_rebuilt_from_its_checkpoint(tmp_path: Path):
    decoder = DecoderShape(
        vocab_size=300,
        media_pad_id=65,
        num_layers=2,
        num_dense_layers=1,
        model_width=16,
        dense_width=24,
        num_experts=3,
        top_k=2,
        num_shared_experts=1,
        expert_width=8,
        routed_scale=1.0,
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=6,
        qk_nope_width=4,
        qk_rope_width=2,
        v_width=5,
        max_positions=64,
    )
    vision = EncoderShape(num_layers=1, width=16, mlp_width=20, num_heads=2)
    model = Kimi(decoder=decoder, vision=vision)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    shapes = {"decoder": asdict(decoder), "vision": asdict(vision)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "shapes": shapes}, tmp_path / "c")

    rebuilt = model_from_checkpoint(tmp_path / "c")

    assert (rebuilt.decoder_shape, rebuilt.vision_shape) == (decoder, vision)
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)
    for name, buffer in rebuilt.named_buffers():
        assert not buffer.is_meta, name


def test_a_checkpoint_without_shapes_cannot_be_rebuilt(tmp_path: Path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "c")
    with pytest.raises(ValueError, match="c does not say the model's shapes"):
        model_from_checkpoint(tmp_path / "c")


class OneWeight(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def test_lightning_saves_and_resumes_through_it(tmp_path: Path):
    def fit(max_steps: int, resume_from: Path | None) -> lightning.Trainer:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(OneWeight(), DataLoader(torch.ones(4, 2)), ckpt_path=resume_from)
        return trainer

    fit(2, None).save_checkpoint(tmp_path / "two.ckpt")

    assert fit(3, tmp_path / "two.ckpt").global_step == 3
    assert set(weights_of(tmp_path / "two.ckpt")) == {"weight", "bias"}
