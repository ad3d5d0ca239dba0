"""Dialogues as training steps: whole, masked, split by user turn, epoch after epoch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import steps_as_bytes
from conftest import settings
from dialogue_lines import question, with_tool, write_lines, write_set

from data_modules.components.document import dialogue_document
from data_modules.components.mixture import Geometry
from data_modules.components.plan_dialogues import plan_dialogues
from data_modules.dialogues import Dialogues
from data_modules.embedded_world import EmbeddedWorld
from data_modules.rl_tasks import RLTasks
from data_modules.tasks.arithmetic import Arithmetic
from moonlit.batch import PackedBatch
from moonlit.chat.tokenizer import Tokenizer


def dialogues(tmp_path: Path, **changes: Any) -> Dialogues:
    """A data module over the set by hand, ready to be iterated."""
    folder = tmp_path / "set"
    if not folder.is_dir():
        write_set(folder)
    arguments: dict[str, Any] = {
        "data_dir": str(tmp_path / "data"),
        "folder": str(folder),
        "tokenizer": "embedded",
        "seed": 3,
        "row_tokens": 256,
        "rows_per_step": 2,
        "num_steps": 12,
        "images": False,
        "too_long": "drop",
        "world": None,
        "replay": False,
        "num_workers": 0,
        "max_corrupt_fraction": 0.0,
    }
    data = Dialogues(**arguments | changes)
    data.prepare_data()
    data.setup("fit")
    return data


def texts(batch: PackedBatch, tokenizer: Tokenizer, trained_only: bool = False) -> list[str]:
    """The documents of a row as text."""
    ends = batch.cu_seqlens.tolist()
    parts = []
    for start, stop in pairwise(ends):
        ids = batch.target_ids[start:stop] if trained_only else batch.input_ids[start:stop]
        kept = ids[batch.loss_mask[start:stop]] if trained_only else ids
        parts.append(tokenizer.decode(kept.tolist()))
    return parts


def test_only_the_assistants_words_are_trained(tmp_path: Path):
    data = dialogues(tmp_path)
    trained = [
        text
        for step in data.train_dataloader()
        for row in step
        for text in texts(row, data.tokenizer, trained_only=True)
    ]
    assert "8<|im_end|>" in trained  # What is 7 + 1?
    calls = [text for text in trained if "functions.ipython:0" in text]
    assert calls
    for text in calls:
        assert text.startswith("I run it.</think>")
        assert "## Return of" not in text
        assert "Twice" not in text
    assert "Welcome.<|im_end|>" in trained  # the second user turn is a sample of its own
    assert not any("Thanks" in text for text in trained)


def test_every_epoch_holds_every_sample_once_and_in_another_order(tmp_path: Path):
    data = dialogues(tmp_path, row_tokens=2048, rows_per_step=1, num_steps=8)
    num_samples = len(data.corpus.index["dialogues"])
    assert num_samples == 23 + 2 * 11
    order = [int(n) for step in range(8) for n in data.plan.row(step, 0)["document"]]
    epochs = [order[n : n + num_samples] for n in range(0, len(order), num_samples)]
    whole = [epoch for epoch in epochs if len(epoch) == num_samples]
    assert len(whole) >= 2
    for epoch in whole:
        assert sorted(epoch) == list(range(num_samples))
    assert whole[0] != whole[1]


def test_rows_hold_whole_dialogues_and_never_too_many_tokens(tmp_path: Path):
    data = dialogues(tmp_path)
    index = data.corpus.index["dialogues"]
    for step in range(data.plan.num_steps):
        rows = [data.plan.row(step, row) for row in range(2)]
        fills = [int((row["stop"] - row["start"]).sum()) for row in rows]
        assert max(fills) <= 256
        assert min(fills) > 128  # the emptier row is served first
        for row in rows:
            assert (row["start"] == 0).all()
            assert (row["stop"] == index["num_tokens"][row["document"]]).all()


def test_a_long_document_waits_for_a_row_but_not_for_ever():
    """Catches: a document that only fits an empty row is passed over until the epoch's end."""
    lengths = np.array([100] + [30] * 50)
    index = np.zeros(51, [("num_tokens", "<u4")])
    index["num_tokens"] = lengths
    plan = plan_dialogues(
        index, np.array([0, 51]), Geometry(row_tokens=100, rows_per_step=1),
        source="x", seed=0, num_steps=18,
    )  # fmt: skip
    counts = Counter(plan.pieces["document"][:51].tolist())
    assert counts == dict.fromkeys(range(51), 1)


def test_ranks_and_workers_do_not_change_a_byte(tmp_path: Path):
    one = steps_as_bytes(dialogues(tmp_path).train_dataloader())
    two = steps_as_bytes(dialogues(tmp_path, num_workers=2).train_dataloader())
    assert one == two
    resumed = dialogues(tmp_path)
    resumed.load_state_dict({"next_step": 5, "fingerprint": resumed.fingerprint})
    assert steps_as_bytes(resumed.train_dataloader()) == one[5:]


@pytest.mark.parametrize("replay", [False, True])
def test_the_world_stands_beside_it(tmp_path: Path, data_dir: Path, replay: bool):
    world = EmbeddedWorld(**settings(data_dir, num_steps=12))
    data = dialogues(tmp_path, world=world, replay=replay)
    assert data.held_out_names[:3] == ["dialogues", "docs", "counting"]
    steps = list(data.train_dataloader())
    assert {len(step) for step in steps} == {2 + 4 * replay}
    assert any(row.media is not None for step in steps for row in step) == replay
    rows = list(data.held_out_loader("counting"))
    assert all(row.media is not None for row in rows)


def test_bad_lines_are_named_counted_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_set(tmp_path / "set")
    write_lines(tmp_path / "set" / "train-2.jsonl", ["{oops", question(1)])
    data = dialogues(tmp_path, max_corrupt_fraction=0.1)
    assert len(data.corpus.index["dialogues"]) == 23 + 2 * 11 + 1
    assert "train-2.jsonl, line 1" in capsys.readouterr().err.replace("\n", "")
    with pytest.raises(ValueError, match="1 of 36 lines are no dialogues"):
        dialogues(tmp_path, data_dir=str(tmp_path / "other"))


def test_a_picture_in_a_zero_vision_set_is_refused(tmp_path: Path):
    write_set(tmp_path / "set")
    picture = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMB"
        "AQDJ/pLvAAAAAElFTkSuQmCC"
    )
    value = question(1)
    value["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": picture}}]
    write_lines(tmp_path / "set" / "train-2.jsonl", [question(1), value])
    with pytest.raises(ValueError, match=r"train-2.jsonl, line 2: 1 pictures in a zero-vision set"):
        dialogues(tmp_path)
    seen = dialogues(tmp_path, images=True)
    assert seen.corpus.index["dialogues"]["num_vision_tokens"].sum() == 1


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 0), ("truncate", 1)])
def test_a_sample_longer_than_a_row_is_dropped_or_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture, too_long: str, kept: int
):
    write_set(tmp_path / "set")
    value = question(1)
    value["messages"][1]["content"] = "word " * 500
    write_lines(tmp_path / "set" / "train-2.jsonl", [value])
    data = dialogues(tmp_path, too_long=too_long)
    lengths = data.corpus.index["dialogues"]["num_tokens"]
    assert len(lengths) == 23 + 2 * 11 + kept
    assert lengths.max() <= 256
    said = capsys.readouterr().err
    assert ("1 longer than data.row_tokens=256 were left out" in said) == (not kept)
    assert ("data.too_long=truncate" in said) == (not kept)


def test_a_set_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train\*\.jsonl in .*set"):
        dialogues(tmp_path)


def test_tools_are_declared_before_the_first_turn(tmp_path: Path):
    from data_modules.components.dialogue_files import read_dialogue

    dialogue = read_dialogue(write_lines(tmp_path / "a.jsonl", [with_tool(1)]), 0)
    tokenizer = Tokenizer.named("embedded")
    document = dialogue_document(dialogue.messages, tokenizer, tools=dialogue.tools)
    text = tokenizer.decode(document.input_ids.tolist())
    assert text.startswith("<|im_system|>tool_declare<|im_middle|>")
    assert text.index("ipython") < text.index("You compute.")


def test_a_kept_set_gives_reinforcement_learning_its_rows(tmp_path: Path):
    """Step by step those of its own plan; held-out dialogues stay out."""
    kept = dialogues(tmp_path)
    data = RLTasks(
        seed=0, tokenizer="embedded", sources={"sums": Arithmetic(
            seed=0, largest=4, picture_fraction=0.0, picture_side=56)},
        weights={"sums": 1.0}, held_out=[], num_held_out=1, chance={}, ptx=kept,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")

    rows = [row for step in (0, 1, 1) for row in data.kept_rows(step)]
    assert len(rows) == 6
    assert all(row.behavior_logprobs is None for row in rows)
    assert torch.equal(rows[2].input_ids, rows[4].input_ids)
    assert not torch.equal(rows[0].input_ids, rows[2].input_ids)
    assert "What is 100 + 1?" not in "".join(t for row in rows for t in texts(row, kept.tokenizer))
