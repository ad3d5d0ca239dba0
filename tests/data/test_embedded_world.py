"""The data module in Lightning's hands: loaders, names, resume."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import as_bytes
from conftest import settings
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_modules.embedded_world import EmbeddedWorld
from data_modules.world.sources import HELD_OUT, HELD_OUT_FAMILIES


class Recorder(LightningModule):
    """Keeps what it is given; trains one number."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.fail_at = fail_at
        self.seen: list[list[str]] = []
        self.scored: list[tuple[int, int]] = []

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        if batch_idx == self.fail_at:
            raise RuntimeError("stopped on purpose")
        self.seen.append([as_bytes(row) for row in batch])
        optimizer = self.optimizers()
        self.manual_backward(self.weight * 1.0)
        optimizer.step()  # pyright: ignore

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.scored.append((dataloader_idx, int(batch.loss_mask.sum())))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: EmbeddedWorld, module: Recorder, folder: Path, ckpt: Path | None = None) -> None:
    """Train nine steps; keep a checkpoint of each."""
    checkpoints = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=9, logger=False, limit_val_batches=0,
        callbacks=[checkpoints], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_fit_sees_the_batches_it_had_not_seen(
    data_dir: Path, tmp_path: Path, num_workers: int
):
    whole = Recorder()
    fit(EmbeddedWorld(**settings(data_dir)), whole, tmp_path / "whole")
    assert len(whole.seen) == 9

    for step in (1, 4, 8) if num_workers == 0 else (5,):
        resumed = Recorder()
        data = EmbeddedWorld(**settings(data_dir, num_workers=num_workers))
        fit(data, resumed, tmp_path / "rest", tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]


def test_a_step_cut_off_in_the_middle_is_done_again(data_dir: Path, tmp_path: Path):
    whole, stopped, resumed = Recorder(), Recorder(fail_at=5), Recorder()
    fit(EmbeddedWorld(**settings(data_dir)), whole, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(EmbeddedWorld(**settings(data_dir)), stopped, tmp_path / "stopped")
    last = tmp_path / "stopped" / "step=5.ckpt"
    fit(EmbeddedWorld(**settings(data_dir)), resumed, tmp_path / "rest", last)
    assert stopped.seen + resumed.seen == whole.seen


def test_the_state_is_an_integer_and_a_fingerprint(data_dir: Path, tmp_path: Path):
    data = EmbeddedWorld(**settings(data_dir))
    fit(data, Recorder(), tmp_path)
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["EmbeddedWorld"]
    assert state == {"next_step": 3, "fingerprint": data.fingerprint}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 255}, "row_tokens: 256 then, 255 now"),
        ({"vision_share": 0.05}, r"vision_share: 0\.1 then, 0\.05 now"),
    ],
)
def test_the_state_of_another_plan_is_refused_by_name(
    data_dir: Path, world: EmbeddedWorld, change: dict, message: str
):
    other = EmbeddedWorld(**settings(data_dir, **change))
    other.setup("fit")
    with pytest.raises(ValueError, match=message):
        other.load_state_dict({"next_step": 3, "fingerprint": world.fingerprint})


def test_a_longer_run_may_go_on_with_the_same_plan(data_dir: Path, world: EmbeddedWorld):
    longer = EmbeddedWorld(**settings(data_dir, num_steps=12))
    longer.setup("fit")
    longer.load_state_dict({"next_step": 3, "fingerprint": world.fingerprint})
    assert longer.next_step == 3
    again, before = longer.train_dataloader().steps[4], world.train_dataloader().steps[4]
    assert [as_bytes(row) for row in again.microbatches] == [
        as_bytes(row) for row in before.microbatches
    ]


def test_preparing_twice_writes_nothing_and_another_seed_writes_elsewhere(data_dir: Path):
    data = EmbeddedWorld(**settings(data_dir))
    before = {path: path.stat().st_mtime_ns for path in data.corpus_folder.rglob("*")}
    data.prepare_data()
    assert before == {path: path.stat().st_mtime_ns for path in data.corpus_folder.rglob("*")}
    other = EmbeddedWorld(**settings(data_dir, seed=4))
    assert other.corpus_folder != data.corpus_folder
    same = EmbeddedWorld(**settings(data_dir, vision_share=0.2, row_tokens=512))
    assert same.corpus_folder == data.corpus_folder


def items_of(data: EmbeddedWorld, name: str) -> list[tuple[tuple[int, ...], str]]:
    """Each held-out item's ids with a digest of its media, row after row."""
    items = []
    for row in data.held_out_loader(name):
        patches, first = [], 0
        assert row.media is not None
        for t, h, w in row.media.grid_thw.tolist():
            patches.append(row.media.pixel_values[first : first + t * h * w])
            first += t * h * w
        bounds = row.cu_seqlens.tolist()
        for start, stop, pixels in zip(bounds[:-1], bounds[1:], patches, strict=True):
            ids = tuple(row.input_ids[start:stop].tolist())
            items.append((ids, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()))
    return items


@pytest.mark.parametrize("name", ["counting", "motion", "pages"])
def test_the_blind_twin_asks_the_same_with_every_picture_swapped(world: EmbeddedWorld, name: str):
    seeing, blind = items_of(world, name), items_of(world, f"{name}_blind")
    assert len(seeing) == (3 if name == "pages" else 12)
    assert [ids for ids, _ in seeing] == [ids for ids, _ in blind]
    assert {pixels for _, pixels in seeing} == {pixels for _, pixels in blind}
    assert all(own != shown for (_, own), (_, shown) in zip(seeing, blind, strict=True))


def test_every_held_out_set_has_a_loader_and_scores_answers_only(world: EmbeddedWorld):
    loaders = world.val_dataloader()
    assert len(loaders) == len(world.held_out_names) == 1 + 2 * (len(HELD_OUT_FAMILIES) + 1)
    assert set(world.chance) <= set(world.held_out_names)
    end = world.tokenizer.special.im_end_id
    for name, loader in zip(world.held_out_names, loaders, strict=True):
        num_ends = sum(int((row.target_ids[row.loss_mask] == end).sum()) for row in loader)
        expected = 0 if name == "docs" else 3 if name.startswith(("pages", "boxes")) else 12
        assert num_ends == expected, name


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_score_as_many_rows_and_together_every_item(
    world: EmbeddedWorld, monkeypatch: pytest.MonkeyPatch, num_ranks: int
):
    whole = sorted(items_of(world, "counting"))
    parts = []
    for rank in range(num_ranks):
        monkeypatch.setattr(world, "data_parallel_rank", lambda rank=rank: (rank, num_ranks))
        parts.append((len(world.held_out_loader("counting")), items_of(world, "counting")))
    assert len({num_rows for num_rows, _ in parts}) == 1
    assert sorted(item for _, items in parts for item in items) == whole


def test_the_data_parallel_rank_comes_from_the_strategy(world: EmbeddedWorld):
    strategy = SimpleNamespace(data_parallel_rank=1, data_parallel_size=2)
    world.trainer = SimpleNamespace(strategy=strategy, global_rank=5, world_size=8)  # pyright: ignore
    steps = world.train_dataloader().steps
    assert (steps.rank, steps.num_ranks) == (1, 2)
    world.trainer.strategy = SimpleNamespace()  # pyright: ignore
    world.trainer.world_size = 4  # pyright: ignore
    world.trainer.global_rank = 3  # pyright: ignore
    steps = world.train_dataloader().steps
    assert (steps.rank, steps.num_ranks) == (3, 4)


def test_sample_tasks_are_held_out_and_answered(world: EmbeddedWorld):
    tasks = world.sample_tasks(8)
    assert len(tasks) == 8
    assert len({task.environment for task in tasks}) > 3
    first = world.world.item("counting", 0, HELD_OUT)
    assert tasks[0].answer == first.questions[0].truth


def test_a_missing_corpus_says_what_to_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="moonlit prepare"):
        EmbeddedWorld(**settings(tmp_path)).setup("fit")


def test_a_run_without_an_end_is_refused(data_dir: Path):
    data = EmbeddedWorld(**settings(data_dir, num_steps=None))
    with pytest.raises(ValueError, match=r"num_steps is None"):
        data.setup("fit")
