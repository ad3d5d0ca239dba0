"""Shapes that are listed in words, and dialogues made of tasks with their answers."""

import asyncio
import json
from pathlib import Path

import pytest

from data_modules.tasks.arithmetic import Arithmetic
from data_modules.tasks.equations import Equations
from data_modules.tasks.listed_shapes import ListedShapes
from data_modules.tasks.solved_tasks import SolvedTasks
from data_modules.tasks.source import HELD_OUT, TRAIN
from data_modules.world.things import COLOURS
from moonlit.rl.rewards.mathematics import Mathematics


def test_the_count_is_what_the_words_list():
    source, asked = ListedShapes(seed=0, most=5), set()
    for number in range(80):
        task = source(TRAIN, number)
        listed, question = task.prompt[0].content.removeprefix("A picture shows: ").split(". ")
        colour = question.removeprefix("How many shapes are ").removesuffix("?")
        shapes = [words.split()[0] for words in listed.split(", ")]
        assert task.answer == (len(shapes) if colour == "there" else shapes.count(colour)) >= 1
        assert len(shapes) <= 5
        asked.add(colour)
    assert asked == {"there", *COLOURS}


def test_splits_share_no_list_and_a_number_means_the_same_task():
    source = ListedShapes(seed=0, most=3)
    asked = {
        split: {source(split, n).prompt[0].content.split(".")[0] for n in range(300)}
        for split in (TRAIN, HELD_OUT)
    }
    assert not asked[TRAIN] & asked[HELD_OUT]
    assert source(TRAIN, 5) == ListedShapes(seed=0, most=3)(TRAIN, 5) != source(TRAIN, 6)


def test_dialogues_hold_the_questions_and_answers_that_earn_one(tmp_path: Path):
    sources = {
        "listed": ListedShapes(seed=0, most=4),
        "equations": Equations(seed=0, largest=9, picture_fraction=0.0, picture_side=28),
    }
    SolvedTasks(
        folder=str(tmp_path), sources=sources, first=7, num_train=3, num_held_out=1
    ).prepare_data()  # fmt: skip

    lines = {
        split: [json.loads(row) for row in (tmp_path / f"{split}_solved.jsonl").open()]
        for split in ("train", "held_out")
    }
    assert [len(rows) for rows in lines.values()] == [6, 2]
    first, *_, last = lines["train"]
    assert first["messages"] == [
        {"role": "user", "content": sources["listed"](TRAIN, 7).prompt[0].content},
        {"role": "assistant", "content": str(sources["listed"](TRAIN, 7).answer)},
    ]
    mathematics = Mathematics(timeout_s=60.0, memory_bytes=2**31)
    earned = mathematics(last["messages"][1]["content"], sources["equations"](TRAIN, 9).answer)
    assert asyncio.run(closing(mathematics, earned)) == 1.0


async def closing(mathematics: Mathematics, earned) -> float:
    try:
        return await earned
    finally:
        await mathematics.aclose()


def test_pictures_and_sets_of_nothing_are_refused(tmp_path: Path):
    drawn = Arithmetic(seed=0, largest=9, picture_fraction=1.0, picture_side=56)
    settings = {"folder": str(tmp_path), "first": 0, "num_train": 1, "num_held_out": 1}
    with pytest.raises(ValueError, match=r"sources\.sums"):
        SolvedTasks(sources={"sums": drawn}, **settings).prepare_data()
    with pytest.raises(ValueError, match="at least one"):
        SolvedTasks(sources={}, **settings)
    with pytest.raises(ValueError, match="most=1"):
        ListedShapes(seed=0, most=1)
