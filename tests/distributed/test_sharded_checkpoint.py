"""Shards are whole or absent, go on under any other layout, and are exported as they lie."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hydra import compose, initialize_config_dir
from lightning import seed_everything
from micro_run import fit, micro_model
from parallel_run import Outcome, SaveAt, merged, train
from ranks import Ranks

from callbacks.checkpoints import Checkpoints
from moonlit.chat.tokenizer import Tokenizer
from moonlit.cli import export
from moonlit.distributed.checkpoint import load_weights, stored_model, weights_of
from moonlit.distributed.sharded_checkpoint import ShardedWriter, is_sharded, load_sharded
from moonlit.hub.reader import load_released
from moonlit.models.kimi import Kimi


@cache
def uninterrupted() -> Outcome:
    return train(None, muon=True)


def saved_at_three(path: Path, num_ranks: int, ep_size: int = 1) -> Outcome:
    saver = SaveAt(3, path)
    return train({"ep_size": ep_size}, num_ranks=num_ranks, muon=True, callbacks=[saver])


def assert_same_end(resumed: Outcome) -> None:
    whole = uninterrupted()
    assert len(resumed.metrics) == 2  # the last two of five steps
    torch.testing.assert_close(
        torch.tensor(resumed.metrics), torch.tensor(whole.metrics[3:]), rtol=1e-5, atol=0
    )
    for name, expected in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_two_ranks_save_and_other_layouts_go_on(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
):
    """What is written beside the training is the state at the step, not what came after."""
    path = tmp_path / "three.ckpt"
    two_ranks(saved_at_three, path, 2)
    assert is_sharded(path)
    assert [p.name for p in tmp_path.iterdir()] == ["three.ckpt"]

    assert_same_end(two_ranks(train, {}, num_ranks=2, muon=True, resume_from=str(path))[0])
    layout = {"dp_replicate_size": 2, "zero_stage": 1}
    resumed = four_ranks(train, layout, num_ranks=4, muon=True, resume_from=str(path))
    assert_same_end(resumed[3])


def test_four_ranks_save_and_two_go_on(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path):
    path = tmp_path / "three.ckpt"
    four_ranks(saved_at_three, path, 4)
    assert_same_end(two_ranks(train, {}, num_ranks=2, muon=True, resume_from=str(path))[1])


def test_experts_over_four_ranks_go_on_over_two_and_over_none(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
):
    path = tmp_path / "three.ckpt"
    four_ranks(saved_at_three, path, 4, 4)
    resume = {"num_ranks": 2, "muon": True, "resume_from": str(path)}
    assert_same_end(two_ranks(train, {"ep_size": 2}, **resume)[1])
    assert_same_end(two_ranks(train, {"ep_size": 1}, **resume)[0])


def test_weights_are_read_from_shards_one_by_one(two_ranks: Ranks, tmp_path: Path):
    path = tmp_path / "three.ckpt"
    two_ranks(saved_at_three, path, 2)

    model, weights = stored_model(path)
    assert all(p.is_meta for p in model.parameters())
    assert set(weights) == set(micro_model().state_dict())
    start = micro_model().double()
    load_weights(start, path)
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(tensor, weights[name].to(tensor.dtype), rtol=0, atol=0)


def model_of_embedded_words() -> Kimi:
    """The micro model with the embedded tokenizer's ids, which an export demands."""
    micro = micro_model()
    special = Tokenizer.embedded().special
    shape = replace(micro.decoder_shape, vocab_size=2304, media_pad_id=special.media_pad_id)
    seed_everything(0, verbose=False)
    return Kimi(decoder=shape, vision=micro.vision_shape)


def saved_after_one_step(layout: dict[str, int], path: Path) -> Outcome:
    return train(
        layout, num_ranks=2, max_steps=1, text_only=True, callbacks=[SaveAt(1, path)],
        phase={"build_model": model_of_embedded_words}, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [{"ep_size": 2}, {"pp_size": 2}], ids=str)
def test_a_folder_of_shards_is_exported_as_the_release_wants_it(
    two_ranks: Ranks, tmp_path: Path, layout: dict[str, int]
):
    """The command as it is: catches a share of experts, or a stage's layers, left out."""
    path, out = tmp_path / "one.ckpt", tmp_path / "released"
    trained = merged(two_ranks(saved_after_one_step, layout, path))

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        export(compose("export", overrides=[f"ckpt={path}", f"out={out}", "dtype=float32"]))

    start = model_of_embedded_words()
    model = model_of_embedded_words()
    load_released(model, out)
    assert not torch.equal(model.language_model.lm_head.weight, start.language_model.lm_head.weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.weights[f"model.{name}"]), name


def write(path: Path, tensor: torch.Tensor) -> None:
    writer = ShardedWriter(torch.distributed.new_group(backend="gloo"))
    writer.save({"w": tensor}, {"step": 1}, path)
    writer.finish()


def test_an_older_checkpoint_is_replaced_as_a_whole(two_ranks: Ranks, tmp_path: Path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "older").write_text("")
    two_ranks(write, tmp_path / "last.ckpt", torch.ones(3))
    assert is_sharded(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt" / "older").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def refused(path: Path) -> str:
    try:
        write(path, torch.ones(2))
    except OSError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_cannot_be_written_is_named_on_every_rank(two_ranks: Ranks):
    answers = two_ranks(refused, Path("/proc/x.ckpt"))
    assert all("cannot write the checkpoint /proc/x.ckpt: " in answer for answer in answers)


def broken_on_the_second_rank(path: Path) -> str:
    def full(*_: object) -> None:
        raise OSError("no space left")

    write_data = dcp.FileSystemWriter.write_data
    if torch.distributed.get_rank() == 1:
        dcp.FileSystemWriter.write_data = full
    try:
        return refused(path)
    finally:
        dcp.FileSystemWriter.write_data = write_data


def test_a_shard_that_is_not_written_leaves_the_older_checkpoint(two_ranks: Ranks, tmp_path: Path):
    """Catches: a folder that gets its name although a rank has failed."""
    path = tmp_path / "last.ckpt"
    two_ranks(write, path, torch.ones(3))
    (path / "older").write_text("")
    answers = two_ranks(broken_on_the_second_rank, path)
    assert all("while writing the checkpoint" in answer for answer in answers)
    assert (path / "older").exists()


def test_half_a_checkpoint_is_none(tmp_path: Path):
    half = tmp_path / "half.ckpt"
    half.mkdir()
    (half / "state.pt").write_bytes(b"")
    assert not is_sharded(half)
    with pytest.raises(FileNotFoundError, match=r"no sharded checkpoint at .*half\.ckpt"):
        load_sharded(half, torch.nn.Linear(1, 1), None, weights_only=None)
    with pytest.raises(FileNotFoundError):
        weights_of(half)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(None, None, [1, 2, 3, 4, 5]), (2, None, [4, 5]), (1, 2, [2, 4, 5])],
)
def test_the_last_few_and_every_nth_checkpoint_stay(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]
):
    callback = Checkpoints(
        dirpath=str(tmp_path), every_n_steps=1, keep_last=keep_last, keep_every_n_steps=keep_every
    )
    fit(max_steps=5, callbacks=[callback])

    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["last.ckpt", *(f"step_{step:06d}.ckpt" for step in kept)]
    assert (tmp_path / "last.ckpt").resolve().name == "step_000005.ckpt"


def test_the_last_step_is_saved_though_it_is_no_multiple(tmp_path: Path):
    callback = Checkpoints(
        dirpath=str(tmp_path), every_n_steps=2, keep_last=None, keep_every_n_steps=None
    )
    fit(max_steps=3, callbacks=[callback])
    resumed = fit(max_steps=4, resume_from=tmp_path / "last.ckpt")
    assert resumed.trainer.global_step == 4
