"""Folders with something wrong: every error names the tensor or the file."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_release import DECODER, ENCODER, drawn
from torch import Tensor

from moonlit.chat.tokenizer import Tokenizer
from moonlit.hub import disk, int4
from moonlit.hub.config import read_shapes
from moonlit.hub.reader import load_released
from moonlit.hub.writer import save_released
from moonlit.models.kimi import Kimi

INDEX = "model.safetensors.index.json"
EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of several shards, one of INT4 experts in a single file without an index."""
    folder = tmp_path_factory.mktemp("saved")
    model = drawn(Kimi(decoder=DECODER, vision=ENCODER))
    save_released(model, tokenizer, folder / "shards", dtype=torch.float32, max_shard_bytes=200_000)
    save_released(model, tokenizer, folder / "single", int4_experts=True)
    next((folder / "single").glob("*.safetensors")).rename(folder / "single" / "model.safetensors")
    (folder / "single" / INDEX).unlink()
    return folder


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "shards", tmp_path / "m")


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "single", tmp_path / "m")


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)


def reading(folder: Path) -> None:
    load_released(Kimi(decoder=DECODER, vision=ENCODER), folder)


def test_all_tensors_that_do_not_fit_are_named_at_once(single: Path):
    change(
        single,
        {
            "language_model.model.norm.weight": None,
            EXPERT + "_scale": None,
            "vision_tower.encoder.blocks.9.wo.weight": torch.ones(2, 2),
            "mm_projector.proj.0.bias": torch.ones(127),
        },
    )
    model = Kimi(decoder=DECODER, vision=ENCODER)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_released(model, single)

    assert str(caught.value).splitlines()[1:] == [
        f"  missing (2): {EXPERT}_scale, language_model.model.norm.weight",
        "  unexpected (1): vision_tower.encoder.blocks.9.wo.weight",
        "  misshapen (1): mm_projector.proj.0.bias is [127], the model has [128]",
    ]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was touched"


def test_a_long_list_is_cut_with_its_length(single: Path):
    change(single, {f"extra.{n}": torch.ones(1) for n in range(100, 150)})
    with pytest.raises(ValueError, match=r"unexpected \(50\): extra\.100, .* and 42 more"):
        reading(single)


def test_another_vocabulary_is_said_in_words(single: Path):
    change(single, {"language_model.lm_head.weight": torch.ones(300, 64)})
    with pytest.raises(ValueError, match="the checkpoint has 300 tokens, the model 2304"):
        reading(single)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("language_model.model.norm.weight", torch.ones(64).int(), "norm.weight is I32, not BF16"),
        (EXPERT + "_scale", torch.ones(32, 2), "weight_scale is F32, not BF16"),
        (EXPERT + "_shape", torch.tensor([64, 32]).int(), r"weight_shape says \[64, 32\], not"),
    ],
)
def test_a_tensor_stored_wrongly_is_named(single: Path, name: str, content: Tensor, message: str):
    change(single, {name: content})
    with pytest.raises(ValueError, match=message):
        reading(single)


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000, 150_000])
def test_a_truncated_shard_is_named(sharded: Path, kept_bytes: int):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, kept_bytes)
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
        reading(sharded)


def test_a_missing_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"that do not exist: {shard.name}"):
        reading(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    moved_to = index["weight_map"]["mm_projector.pre_norm.bias"]
    index["weight_map"]["nowhere"] = moved_to
    del index["weight_map"]["mm_projector.pre_norm.bias"]
    (sharded / INDEX).write_text(json.dumps(index))

    with pytest.raises(ValueError, match=f"{INDEX} is wrong") as caught:
        reading(sharded)

    assert f"{moved_to} lacks 1 listed tensors: ['nowhere']" in str(caught.value)
    assert f"{moved_to} has 1 unlisted ones: ['mm_projector.pre_norm.bias']" in str(caught.value)


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_a_damaged_index_is_named(sharded: Path, damage: str):
    (sharded / INDEX).write_text(damage)
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        reading(sharded)


def test_a_folder_without_weights_or_config_is_named(sharded: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere has no config\.json"):
        reading(tmp_path / "elsewhere")
    (sharded / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="m holds neither"):
        reading(sharded)


def test_a_damaged_config_is_named(sharded: Path):
    config = json.loads((sharded / "config.json").read_text())
    del config["text_config"]["hidden_size"]
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json lacks the key 'hidden_size'"):
        read_shapes(sharded)
    (sharded / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type must be one of .* got 'llama'"):
        read_shapes(sharded)
    (sharded / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_shapes(sharded)


def test_a_folder_in_use_is_not_overwritten(model: Kimi, tokenizer: Tokenizer, sharded: Path):
    before = sorted(path.name for path in sharded.iterdir())
    with pytest.raises(FileExistsError, match="m is not empty"):
        save_released(model, tokenizer, sharded)
    assert sorted(path.name for path in sharded.iterdir()) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_export_leaves_nothing(
    model, tokenizer, tmp_path, monkeypatch, interruption
):
    def interrupted(_weight: Tensor) -> None:
        raise interruption

    monkeypatch.setattr(int4, "quantize", interrupted)
    with pytest.raises(interruption):
        save_released(model, tokenizer, tmp_path / "m", int4_experts=True)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_before_anything_is_written(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"bytes needed, 1,000 free: '.*m'") as caught:
        save_released(model, tokenizer, tmp_path / "m")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_narrow_expert_cannot_be_int4(tokenizer: Tokenizer, tmp_path: Path):
    model = Kimi(decoder=replace(DECODER, expert_width=40), vision=None)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight has 40 input columns"):
        save_released(model, tokenizer, tmp_path / "m", int4_experts=True)
    assert os.listdir(tmp_path) == []
