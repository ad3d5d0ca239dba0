"""Steps as batches: the same bytes for any number of workers, ranks and restarts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import as_bytes, steps_as_bytes
from conftest import settings

from data_modules.components.stream import PlannedLoader, PlannedSteps
from data_modules.embedded_world import EmbeddedWorld

NUM_STEPS = 9


def steps_of(world: EmbeddedWorld, rank: int = 0, num_ranks: int = 1) -> PlannedSteps:
    return PlannedSteps(world.corpus, world.plan, rank=rank, num_ranks=num_ranks, filler_id=2049)


def loader_of(world: EmbeddedWorld, *, next_step: int = 0, num_workers: int = 0) -> PlannedLoader:
    loader = PlannedLoader(
        steps_of(world), num_workers=num_workers, max_corrupt_documents=float("inf")
    )
    loader.next_step = next_step
    return loader


def test_rows_hold_exactly_their_tokens_and_their_share(world: EmbeddedWorld):
    media_pad_id = world.tokenizer.special.media_pad_id
    for step in loader_of(world):
        assert [len(row.input_ids) for row in step] == [256] * 4
        vision_tokens = sum(int((row.input_ids == media_pad_id).sum()) for row in step)
        # 10 % of 1024; every picture here is 4 vision tokens: nothing is nearer than half of one.
        assert abs(vision_tokens - 102.4) <= 4
        for row in step:
            grids = torch.zeros(0, 3) if row.media is None else row.media.grid_thw
            num_features = sum(h * w // 4 for _, h, w in grids.tolist())
            assert num_features == int((row.input_ids == media_pad_id).sum())
            assert not (row.target_ids[row.loss_mask] == media_pad_id).any()


def test_boundaries_positions_and_targets_agree(world: EmbeddedWorld):
    for step in loader_of(world):
        for row in step:
            starts, stops = row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist()
            assert (starts[0], stops[-1]) == (0, 256)
            for start, stop in zip(starts, stops, strict=True):
                assert row.position_ids[start:stop].tolist() == list(range(stop - start))
                inside = row.loss_mask[start : stop - 1]
                expected = row.input_ids[start + 1 : stop][inside]
                assert torch.equal(row.target_ids[start : stop - 1][inside], expected)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_resuming_gives_the_remaining_batches_byte_for_byte(world: EmbeddedWorld, num_workers: int):
    uninterrupted = steps_as_bytes(loader_of(world))
    assert len(uninterrupted) == NUM_STEPS

    for stopped_after in (0, 1, 5, 8, 9) if num_workers == 0 else (4,):
        loader = loader_of(world, next_step=stopped_after, num_workers=num_workers)
        assert steps_as_bytes(loader) == uninterrupted[stopped_after:]
        assert len(loader) == NUM_STEPS


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_take_each_row_once(world: EmbeddedWorld, num_ranks: int):
    whole = [as_bytes(row) for row in steps_of(world)[3].microbatches]
    parts = [
        [as_bytes(row) for row in steps_of(world, rank, num_ranks)[3].microbatches]
        for rank in range(num_ranks)
    ]
    for rank, part in enumerate(parts):
        assert part == whole[rank::num_ranks]


def test_ranks_that_do_not_divide_the_rows_are_refused(world: EmbeddedWorld):
    with pytest.raises(ValueError, match="rows_per_step=4 cannot be shared out evenly to 3"):
        steps_of(world, 0, 3)


def test_the_run_holds_each_text_whole(world: EmbeddedWorld):
    """Cut pieces join to their documents, which are read here straight from the corpus."""
    pieces = world.plan.pieces
    ids = np.concatenate([row.input_ids.numpy() for step in loader_of(world) for row in step])
    starts = np.concatenate([[0], np.cumsum(pieces["stop"] - pieces["start"])])
    texts: dict[tuple[int, int], list[np.ndarray]] = {}
    for piece, start, stop in zip(pieces.tolist(), starts[:-1], starts[1:], strict=True):
        texts.setdefault(piece[:2], []).append(ids[start:stop])
    joined = 0
    for (source, number), parts in texts.items():
        document = world.corpus.read(world.plan.sources[source], number)
        together = np.concatenate(parts)
        if source < 2 and len(together) == len(document.input_ids):
            np.testing.assert_array_equal(together, document.input_ids)
            joined += len(parts) > 1
    assert joined, "the test needs a text that was cut"


@pytest.fixture
def damaged(data_dir: Path, tmp_path: Path) -> EmbeddedWorld:
    """The same world with one bit flipped in the first picture of the plan."""
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    world = EmbeddedWorld(**settings(tmp_path))
    world.setup("fit")
    source, number = 2, int(world.plan.pieces[world.plan.pieces["source"] == 2]["document"][0])
    document = world.corpus.read(world.plan.sources[source], number)
    needle = document.media[0][0]
    for path in (world.corpus_folder / world.plan.sources[source]).glob("*.bin"):
        data = bytearray(path.read_bytes())
        if needle in data:
            data[data.index(needle) + 60] ^= 1
            path.write_bytes(data)
    again = EmbeddedWorld(**settings(tmp_path))
    again.setup("fit")
    return again


def test_a_corrupt_document_shortens_its_row_and_changes_no_other(
    world: EmbeddedWorld, damaged: EmbeddedWorld, capfd: pytest.CaptureFixture[str]
):
    loader = loader_of(damaged, num_workers=1)
    pairs = [
        (whole, short)
        for step, damaged_step in zip(loader_of(world), loader, strict=True)
        for whole, short in zip(step, damaged_step, strict=True)
    ]
    changed = [pair for pair in pairs if as_bytes(pair[0]) != as_bytes(pair[1])]

    (name,) = loader.corrupt
    length = int(damaged.corpus.index["counting"][int(name.split("/")[1])]["num_tokens"])
    assert name.startswith("counting/")
    assert name in capfd.readouterr().err.replace("\n", "")
    assert 1 <= len(changed) < len(pairs)
    for _, short in changed:
        assert len(short.input_ids) == 256 - length
        assert int(short.cu_seqlens[-1]) == 256 - length


def test_too_many_corrupt_documents_stop_the_run(damaged: EmbeddedWorld):
    loader = PlannedLoader(steps_of(damaged), num_workers=0, max_corrupt_documents=0.5)
    with pytest.raises(ValueError, match=r"1 corrupt documents, .*max_corrupt_fraction.*counting/"):
        list(loader)


HOLDS_A_LOADER = """
import os, sys
from data_modules.components.stream import PlannedLoader, Step

class Steps:
    def __len__(self): return 8
    def __getitem__(self, step): return Step(microbatches=[os.getpid()], corrupt={})

steps = iter(PlannedLoader(Steps(), num_workers=1, max_corrupt_documents=0))
(worker,) = next(steps)
print(worker, flush=True)
sys.stdin.readline()
print(next(steps) == [worker], flush=True)
kept = [steps]  # as a strategy keeps what it reads ahead from
"""


def test_a_worker_heeds_its_trainer_only():
    """Catches: one that ends with the job's signal, and one that its trainer waits for for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_LOADER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    time.sleep(0.2)  # a signal that kills has done so
    said, _ = process.communicate("\n", timeout=60)
    assert said == "True\n"
    assert process.returncode == 0
