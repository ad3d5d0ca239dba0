"""Tasks by number: pure, split, mixed as asked."""

import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from lightning import Trainer

from data_modules.rl_tasks import RLTasks
from data_modules.tasks.arithmetic import Arithmetic
from data_modules.tasks.downloads import Downloads
from data_modules.tasks.pictures import Pictures
from data_modules.tasks.reasoning import ReasoningGym
from data_modules.tasks.source import HELD_OUT, TRAIN
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, VideoChunk
from moonlit.rl.rewards.rules import RULES

SOURCES = {
    "counting": Pictures(seed=3, family="counting", picture_side=56, first=1000),
    "sums": Arithmetic(seed=3, largest=4, picture_fraction=0.5, picture_side=56),
    "chain": ReasoningGym(seed=3, name="chain_sum", config={"max_terms": 2}),
    "downloads": Downloads(seed=3, min_pages=2, max_pages=6),
}


def words(task) -> str:
    return "".join(getattr(p, "text", "") for m in task.prompt for p in m.parts)


def tasks(**changes) -> RLTasks:
    settings = {
        "seed": 3, "tokenizer": "embedded", "sources": SOURCES, "held_out": None,
        "weights": {"counting": 3.0, "sums": 1.0}, "num_held_out": 4, "chance": {},
    }  # fmt: skip
    return RLTasks(**settings | changes)


@pytest.mark.parametrize("name", SOURCES)
def test_a_task_is_a_function_of_its_number(name: str):
    one, again, other = (SOURCES[name](TRAIN, n) for n in (5, 5, 6))
    assert (words(one), one.answer) == (words(again), again.answer)
    pictures = [p.image.tobytes() for p in one.prompt[0].parts if isinstance(p, ImagePart)]
    assert pictures == [
        p.image.tobytes() for p in again.prompt[0].parts if isinstance(p, ImagePart)
    ]
    assert one.domain in ("perception", "reasoning", "agentic")
    assert other is not one


def test_tasks_come_from_the_split_and_the_number_that_is_asked_for():
    data = tasks(held_out=["downloads", "sums"])

    def written(name: str, split: str, *numbers: int) -> list[str]:
        return [words(SOURCES[name](split, n)) for n in numbers]

    held = data.tasks("chain", 2, held_out=True, first=3)
    trained = data.tasks("chain", 2, held_out=False, first=3)
    assert [words(task) for task in held] == written("chain", HELD_OUT, 3, 4)
    assert [words(task) for task in trained] == written("chain", TRAIN, 3, 4)
    assert not {*written("chain", HELD_OUT, *range(9))} & {*written("chain", TRAIN, *range(9))}
    shown = [words(task) for task in data.sample_tasks(4)]
    assert shown[::2] == written("downloads", HELD_OUT, 0, 1)
    assert shown[1::2] == written("sums", HELD_OUT, 0, 1)


def test_sums_that_are_held_out_are_never_trained_on():
    def seen(split: str) -> set:
        plain = Arithmetic(seed=0, largest=6, picture_fraction=0.0, picture_side=56)
        return {words(plain(split, n)) for n in range(400)}

    assert seen(TRAIN)
    assert seen(HELD_OUT)
    assert not seen(TRAIN) & seen(HELD_OUT)


def test_half_of_the_sums_are_pictures():
    shown = Counter(SOURCES["sums"](TRAIN, n).tags["modality"] for n in range(400))
    assert shown["picture"] == pytest.approx(200, abs=40)


def test_the_verifier_of_reasoning_gym_knows_right_from_wrong():
    task = SOURCES["chain"](TRAIN, 0)
    assert RULES["reasoning_gym"](str(task.answer["entry"]["answer"]), task.answer) == 1.0
    assert RULES["reasoning_gym"]("no idea", task.answer) < 0.1


def test_weights_are_the_shares_of_tasks():
    drawn = Counter(tasks().task(number).environment for number in range(160))
    assert drawn["counting"] == pytest.approx(120, abs=22)
    assert drawn["counting"] + drawn["exact"] == 160


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_held_out_tasks_come_once_over_the_ranks(num_ranks: int):
    data, seen = tasks(held_out=["downloads"]), {}
    for rank in range(num_ranks):
        strategy = SimpleNamespace(data_parallel_rank=rank, data_parallel_size=num_ranks)
        data.trainer = Mock(Trainer, strategy=strategy)
        (loader,) = data.val_dataloader()
        mine = [words(task) for task in next(iter(loader))]
        seen |= dict(zip(range(rank, 4, num_ranks), mine, strict=True))
    assert seen == {n: words(SOURCES["downloads"](HELD_OUT, n)) for n in range(4)}


def made(task: Any) -> RLTasks:
    return tasks(sources={"mine": lambda split, number: task}, weights={"mine": 1.0})


def asking(prompt: Any) -> Task:
    return Task(prompt=prompt, domain="perception", environment="counting", answer=3)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (None, "is None: want a moonlit.batch.Task"),
        ({"prompt": []}, "want a moonlit.batch.Task"),
        (Mock(Task, prompt="How many?", environment="counting"), "has the prompt 'How many.'"),
        (Mock(Task, prompt=[{"role": "user"}], environment="counting"), "want a list of moonlit"),
        (Mock(Task, prompt=None, environment="counting"), "has the prompt None"),
        (asking([]), "asks nothing"),
        (asking([Message(role="user", content="  ")]), "asks nothing"),
        (asking([Message(role="user", content=[Mock(ImagePart, image=None)])]), "has the part"),
        (asking([Message(role="user", content=[Mock(VideoChunk, frames=[])])]), "has the part"),
        (Mock(Task, prompt=[], environment=None), "has the environment None"),
    ],
)
def test_what_is_no_task_is_named_where_it_enters(task: Any, told: str):
    data = made(task)
    with pytest.raises(ValueError, match=rf"^train task 7 of data\.sources\.mine .*{told}"):
        data.task(7)
    with pytest.raises(ValueError, match=rf"^held_out task 0 .*{told}"):
        next(iter(data.val_dataloader()[0]))


def test_a_special_token_in_words_is_told_of_once():
    data = made(asking([Message(role="user", content="<|media_pad|> How many?")]))
    with pytest.warns(
        UserWarning, match=r"^train task 2 of data\.sources\.mine holds <\|media_pad"
    ):
        data.task(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.task(3)


def test_none_held_out_is_no_set():
    data = tasks(num_held_out=0)
    assert (data.held_out_names, data.val_dataloader(), data.sample_tasks(3)) == ([], [], [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": {"weather": 1.0}}, "weights names"),
        ({"weights": {"sums": 0.0}}, "want one above 0"),
        ({"held_out": ["weather"]}, "held_out names"),
        ({"num_held_out": -3}, r"data\.num_held_out=-3: want at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, told: str):
    with pytest.raises(ValueError, match=told):
        tasks(**change)


def test_an_unknown_family_or_dataset_is_named():
    with pytest.raises(ValueError, match="family=weather"):
        Pictures(seed=0, family="weather", picture_side=56, first=0)
    with pytest.raises(ValueError, match="'weather'"):
        ReasoningGym(seed=0, name="weather", config={})
