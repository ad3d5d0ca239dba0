"""What is kept of K answers, and that what is written can be read back."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_modules.components.dialogue_files import line_starts, read_dialogue
from data_modules.world.sources import HELD_OUT, HELD_OUT_FAMILIES
from data_modules.world.things import SEEN_PAIRS
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text
from moonlit.chat.template import render
from moonlit.rl.rejection_sampling import RejectionSampling
from moonlit.rl.rewards.exact import is_exact
from moonlit.rl.rewards.rules import RuleJudge
from tests.rl.scripted import SPECIAL, TOKENIZER, Scripted, conversation, says

THINK = [*TOKENIZER.encode("hm"), SPECIAL.think_end_id]


def task(answer: str = "2") -> Task:
    picture = Image.new("RGB", (28, 28), "blue")
    prompt = [Message(role="user", content=[ImagePart(picture), Text("How many?")])]
    return Task(prompt=prompt, domain="perception", environment="counting", answer=answer)


def sampling(*turns: list[int], **changes: object) -> RejectionSampling:
    settings = {
        "conversation": conversation(Scripted(*turns), thinking=True),
        "pool": None,
        "judge": RuleJudge(),
        "num_samples": 4,
        "num_kept": 1,
        "min_pass_rate": 0.0,
        "max_pass_rate": 1.0,
        "seed": 0,
        "provenance": {"ckpt": "a.ckpt"},
    }
    return RejectionSampling(**{**settings, **changes})


LONG = [*TOKENIZER.encode("let me see"), *THINK, *says("2")]
SHORT, WRONG, MALFORMED = [*THINK, *says("2")], [*THINK, *says("3")], says("2")


def write(rejection: RejectionSampling, tasks: list[Task], folder: Path) -> dict:
    return asyncio.run(rejection.write({"counting": tasks}, folder)).rows["counting"]


def test_the_shortest_right_answer_is_kept_and_can_be_trained_on(tmp_path: Path):
    """The second task goes to the training file: the first of twenty is held out."""
    turns = [WRONG] * 4 + [LONG, SHORT, WRONG, MALFORMED]

    rejection = sampling(*turns)
    rejection.conversation.engine.version = 3
    counts = write(rejection, [task(), task()], tmp_path)

    assert counts == {
        "tasks": 2, "solved": 1, "answers": 8, "right": 2, "malformed": 1, "kept": 1,
    }  # fmt: skip
    path = tmp_path / "train.jsonl"
    [start] = line_starts(path)
    dialogue = read_dialogue(path, start)
    rendered = render(dialogue.messages, TOKENIZER, tools=dialogue.tools)
    trained = [i for i, on in zip(rendered.input_ids, rendered.loss_mask, strict=True) if on]
    assert trained == SHORT
    assert dialogue.num_images == 1
    provenance = json.loads(path.read_text())["provenance"]
    assert provenance["ckpt"] == "a.ckpt"
    assert (provenance["number"], provenance["num_right"], provenance["num_samples"]) == (1, 2, 4)
    assert provenance["policy_version"] == 3
    assert (tmp_path / "held_out.jsonl").read_text() == ""


def test_every_answer_is_drawn_by_a_seed_of_its_own(tmp_path: Path):
    """Of one set's tasks, and of two sets' tasks of one number."""
    rejection = sampling(*[WRONG] * 12)
    sets = {"counting": [task(), task()], "ocr": [task()]}
    asyncio.run(rejection.write(sets, tmp_path))
    seeds = {request.seed for request in rejection.conversation.engine.requests}
    assert len(seeds) == 12


@pytest.mark.parametrize(("low", "high", "kept"), [(0.0, 0.5, 1), (0.6, 1.0, 0), (0.0, 0.4, 0)])
def test_tasks_outside_the_band_of_pass_rates_are_left_out(
    low: float, high: float, kept: int, tmp_path: Path
):
    rejection = sampling(SHORT, LONG, WRONG, WRONG, min_pass_rate=low, max_pass_rate=high)
    assert write(rejection, [task()], tmp_path)["kept"] == kept


def test_equal_answers_are_kept_once(tmp_path: Path):
    rejection = sampling(SHORT, SHORT, LONG, SHORT, num_kept=3)
    assert write(rejection, [task()], tmp_path)["kept"] == 2


def test_a_folder_with_a_set_is_refused_and_left_as_it_is(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"train.jsonl is there already"):
        write(sampling(), [task()], tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="num_kept=5, num_samples=4"):
        sampling(num_kept=5)
    with pytest.raises(ValueError, match=r"min_pass_rate=0.9, max_pass_rate=0.1"):
        sampling(min_pass_rate=0.9, max_pass_rate=0.1)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3", 3, True),
        (" 3. ", 3, True),
        ("3 or 4", 3, False),
        ("three", 3, False),
        ("", 3, False),
        ("Top left", "top left", True),
        ("top left or top right", "top left", False),
        ("(0.12, 0.50)", [[0.1234, 0.5]], True),
        ("(0.12, 0.50) (0.1, 0.1)", [[0.1234, 0.5]], False),
        ("box 0.12 0.50", [[0.1234, 0.5]], False),
        ("(0.13, 0.50)", [[0.1234, 0.5]], False),
        ("nan", 3, False),
    ],
)
def test_an_answer_is_exact_or_wrong(answer: str, truth: object, expected: bool):
    assert is_exact(answer, truth) is expected


@pytest.mark.parametrize("family", HELD_OUT_FAMILIES)
def test_the_worlds_own_answers_are_exact(family: str):
    """Oracle: what training shows as the answer to a task is the task's truth."""
    for seed in range(20):
        rng = np.random.default_rng([HELD_OUT, seed])
        item = HELD_OUT_FAMILIES[family](rng, SEEN_PAIRS, 56)
        assert is_exact(item.questions[0].answer, item.task().answer)
