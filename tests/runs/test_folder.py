"""A run goes on from the newest checkpoint that is whole, and only with its own configuration."""

from pathlib import Path

import pytest
import torch

from moonlit.distributed.checkpoint import fault_of
from moonlit.runs.folder import RunFolder

CONFIGURATION = {
    "seed": 0,
    "optim": {"lr": 0.1, "betas": (0.9, 0.95)},
    "trainer": {"devices": 1, "max_steps": 5},
    "callbacks": {"progress": {"line_every_s": 20.0}},
    "strategy": ["auto"],
    "run_dir": "a",
}


def folder_with(tmp_path: Path, *steps: int) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in steps:
        torch.save({"w": torch.randn(500)}, folder.checkpoints / f"step_{step:06d}.ckpt")
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"data/0") + 1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_text("")])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage):
    folder, said = folder_with(tmp_path, 9, 10, 100), []
    assert folder.newest_whole(said.append) == folder.checkpoints / "step_000100.ckpt"
    assert not said

    damage(folder.checkpoints / "step_000100.ckpt")
    assert folder.newest_whole(said.append) == folder.checkpoints / "step_000010.ckpt"
    assert len(said) == 1
    assert "step_000100.ckpt is damaged" in said[0]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(tmp_path: Path):
    folder = folder_with(tmp_path, 1)
    truncate(folder.saved()[0])
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        folder.newest_whole(lambda text: None)


def test_an_empty_folder_has_nothing_to_go_on_from(tmp_path: Path):
    assert RunFolder(tmp_path / "none").newest_whole(print) is None
    RunFolder(tmp_path / "none").require_unused()


def test_a_new_run_does_not_begin_over_another_ones_checkpoints(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds a run already \(step_000003.ckpt\)"):
        folder_with(tmp_path, 3).require_unused()


def test_a_run_goes_on_with_its_own_configuration_only(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.require_same(CONFIGURATION)  # nothing recorded yet
    folder.record(CONFIGURATION)
    folder.require_same(CONFIGURATION | {"run_dir": "b", "strategy": {"ep_size": 2}})
    assert folder.changes(CONFIGURATION) == []
    begun = CONFIGURATION | {"init_from": "a.ckpt"}
    folder.require_same(begun)  # the command that goes on, and then the first one again
    folder.record(begun)
    folder.require_same(CONFIGURATION | {"init_from": None})
    with pytest.raises(ValueError, match=r"init_from is 'a\.ckpt' there, 'b\.ckpt' here"):
        folder.require_same(CONFIGURATION | {"init_from": "b.ckpt"})
    folder.record(CONFIGURATION)

    changed = CONFIGURATION | {"optim": {"lr": 0.2, "betas": (0.9, 0.95)}}
    with pytest.raises(ValueError, match=r"optim\.lr is 0\.1 there, 0\.2 here\. Take another"):
        folder.require_same(changed)
    longer = CONFIGURATION | {"trainer": {"devices": 2, "max_steps": 6}}
    with pytest.raises(ValueError, match=r"configuration: trainer\.max_steps is 5 there, 6 here"):
        folder.require_same(longer)


def test_a_run_that_is_begun_again_is_not_finished(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.record(CONFIGURATION)
    assert not folder.is_finished
    folder.finish(step=5, checkpoint=tmp_path / "step_000005.ckpt")
    assert folder.is_finished
    folder.record(CONFIGURATION)
    assert not folder.is_finished


def test_shards_that_are_short_or_missing_are_seen(tmp_path: Path):
    import torch.distributed.checkpoint as dcp

    from moonlit.distributed.sharded_checkpoint import STATE_FILE

    path = tmp_path / "step_000001.ckpt"
    dcp.save({"w": torch.randn(500)}, checkpoint_id=path, no_dist=True)
    assert "state.pt" in str(fault_of(path))
    torch.save({"step": 1}, path / STATE_FILE)
    assert fault_of(path) is None

    (shard,) = path.glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    assert f"{shard.name} has" in str(fault_of(path))
    shard.unlink()
    assert fault_of(path) == f"{shard.name} is missing"
    shard.write_bytes(whole)
    (path / ".metadata").write_bytes(b"junk")
    assert fault_of(path) is not None
