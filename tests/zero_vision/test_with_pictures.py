"""The ablation's other arm: the same words, and the pictures they are about."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_modules.components.dialogue_files import line_starts, read_dialogue
from data_modules.zero_vision.solve import FAMILIES, problem_rng
from data_modules.zero_vision.with_pictures import WithPictures


def line(family: str, number: int, truth: str) -> str:
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": truth}]
    provenance = {"source": "zero_vision", "seed": 5, "split": "train", "number": number}
    return json.dumps(
        {"messages": messages, "provenance": {**provenance, "family": family, "truth": truth}}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A zero-vision set of two trajectories and a dialogue without pictures."""
    some = [
        (family, n, FAMILIES[family](problem_rng(5, 0, family, n)))
        for family, n in (("counting", 3), ("differences", 1))
    ]
    text = {"messages": json.loads(line("counting", 3, "x"))["messages"]}
    lines = [line(family, n, problem.truth) for family, n, problem in some]
    lines.append(json.dumps({**text, "provenance": {"source": "worked"}}))
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "zero" / "held_out.jsonl").write_text("")
    return tmp_path


def test_the_pictures_are_those_the_programs_ran_on_and_the_words_are_the_same(folder: Path):
    WithPictures(folder=f"{folder}/shown", zero_vision=f"{folder}/zero").prepare_data()

    shown, plain = folder / "shown" / "train.jsonl", folder / "zero" / "train.jsonl"
    dialogues = [read_dialogue(shown, start) for start in line_starts(shown)]
    assert [dialogue.num_images for dialogue in dialogues] == [1, 2, 0]
    before = [read_dialogue(plain, start) for start in line_starts(plain)]
    for ours, theirs in zip(dialogues, before, strict=True):
        assert ours.messages[0].parts[-1] == theirs.messages[0].parts[0]
        assert ours.messages[1:] == theirs.messages[1:]
    wanted = FAMILIES["counting"](problem_rng(5, 0, "counting", 3)).images[0]
    path = folder / "shown" / "pictures" / "counting-train-3-0.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(wanted))


def test_a_set_of_other_code_is_refused_by_its_line(folder: Path):
    path = folder / "zero" / "train.jsonl"
    path.write_text(path.read_text() + line("counting", 4, "-1") + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 4: counting 4 is .* make it again"):
        WithPictures(folder=f"{folder}/shown", zero_vision=f"{folder}/zero").prepare_data()
    assert not (folder / "shown" / "train.jsonl").exists()


def test_without_a_zero_vision_set_the_command_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="moonlit prepare source=zero_vision"):
        WithPictures(folder=f"{tmp_path}/a", zero_vision=f"{tmp_path}/b").prepare_data()
