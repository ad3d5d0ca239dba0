"""Seeing and blind answers, counted by set; the commands' errors."""

import asyncio
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text
from moonlit.cli import conf_folder, quoted_words, settings_of
from moonlit.commands.evaluation import blindfolded, evaluate, summary
from moonlit.commands.talk import chat
from moonlit.models.kimi import Kimi
from moonlit.rl.conversation import pictures_of
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.loading import require_vocabulary, sandboxes
from moonlit.rl.rewards.rules import RuleJudge
from moonlit.train import check_same_tokenizer
from tests.models.shapes import DECODER, ENCODER
from tests.rl.scripted import TOKENIZER, Scripted, conversation, says


def task(colour: str, side: int = 28) -> Task:
    content = [ImagePart(Image.new("RGB", (side, side), colour)), Text("Which colour?")]
    return Task(
        prompt=[Message(role="user", content=content)],
        domain="perception",
        environment="colour",
        answer=colour,
    )


def test_a_blind_task_shows_the_next_picture_of_its_size():
    tasks = [task("red"), task("blue", 56), task("green"), task("white", 84)]
    blind = blindfolded(tasks)
    assert sorted(blind) == [0, 2]  # the others have no twin
    assert pictures_of(blind[0].prompt)[0].getpixel((0, 0)) == (0, 128, 0)
    assert pictures_of(blind[2].prompt)[0].getpixel((0, 0)) == (255, 0, 0)
    assert blind[0].answer == "red"
    assert pictures_of(tasks[0].prompt)[0].getpixel((0, 0)) == (255, 0, 0)


def test_answers_are_counted_by_set_seeing_apart_from_blind():
    engine = Scripted(says("red"), says("grey"), says("blue"), says("blue"), [3, 4])
    sets = {"colours": [task("red"), task("blue")], "more": [task("red")]}

    verdicts = asyncio.run(evaluate(conversation(engine), sets, None, RuleJudge(), seed=0))
    rows = summary(verdicts, {"colours": 0.125})

    assert (rows["colours"]["accuracy"], rows["colours"]["blind_accuracy"]) == (0.5, 0.5)
    assert rows["colours"]["chance"] == 0.125
    assert (rows["more"]["accuracy"], rows["more"]["blind_accuracy"]) == (0.0, None)
    assert rows["more"]["unfinished_fraction"] == 1.0


def test_a_real_engine_answers_every_task():
    torch.manual_seed(0)
    special = TOKENIZER.special
    shape = replace(
        DECODER,
        vocab_size=TOKENIZER.vocab_size,
        media_pad_id=special.media_pad_id,
        max_positions=512,
    )
    engine = NativeEngine(Kimi(decoder=shape, vision=ENCODER), max_sequences=3)
    sets = {"colours": [task("red"), task("blue"), task("green")]}

    talk = conversation(engine, max_new_tokens=4)
    verdicts = asyncio.run(evaluate(talk, sets, None, RuleJudge(), seed=0))

    assert len(verdicts) == 6
    assert all(1 <= verdict.num_tokens <= 4 for verdict in verdicts)
    engine.close()  # waits for its thread
    assert engine.batch.cache.num_pages_in_use == 0


def test_a_checkpoint_of_another_vocabulary_is_refused_by_its_numbers(tmp_path: Path):
    """Before its weights are read: it has none."""
    ckpt = tmp_path / "a.ckpt"
    given = {"ckpt": str(ckpt), "tokenizer": "embedded"}
    torch.save({"shapes": {"decoder": asdict(DECODER), "vision": None}}, ckpt)
    with pytest.raises(ValueError, match=r"a.ckpt has 61 token ids.*embedded has 2304"):
        require_vocabulary(given)

    fits = {"vocab_size": TOKENIZER.vocab_size, "media_pad_id": TOKENIZER.special.media_pad_id}
    shapes = {"decoder": asdict(DECODER) | fits, "vision": None}
    for digest in (TOKENIZER.digest, "of other ranks"):
        torch.save({"shapes": shapes, "made_by": {"tokenizer": digest}}, ckpt)
        if digest == TOKENIZER.digest:
            require_vocabulary(given)
            check_same_tokenizer("embedded", str(ckpt))
    with pytest.raises(ValueError, match="other words than those of tokenizer=embedded"):
        require_vocabulary(given)
    with pytest.raises(ValueError, match="was trained with another tokenizer than"):
        check_same_tokenizer("embedded", str(ckpt))


def settings(**values: object) -> dict[str, object]:
    """The command's own defaults."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return settings_of(compose("chat", overrides=["ckpt=missing.ckpt"])) | values


def test_what_chat_cannot_use_is_named(tmp_path: Path):
    not_a_picture = tmp_path / "text.png"
    not_a_picture.write_text("words")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at missing.ckpt"):
        chat(settings(prompt="Hi, you"))
    with pytest.raises(FileNotFoundError, match=r"no picture at 'gone.png'"):
        chat(settings(image="gone.png"))
    with pytest.raises(ValueError, match=r"text.png' \(5 bytes\): no known format"):
        chat(settings(image=str(not_a_picture)))
    with pytest.raises(ValueError, match=r"text.png is truncated or no checkpoint"):
        chat(settings(ckpt=str(not_a_picture)))
    with pytest.raises(ValueError, match="tools=shell: want null or ipython"):
        asyncio.run(first_sandbox("shell"))


async def first_sandbox(tools: str) -> None:
    async with sandboxes(tools):
        pass


def test_a_set_that_does_not_exist_is_named():
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        data = instantiate(compose("eval", overrides=["ckpt=a"]).data)
    with pytest.raises(ValueError, match="no held-out set 'cats': there are counting"):
        data.tasks("cats", 1, held_out=True)
    with pytest.raises(ValueError, match="no training set 'motion'"):
        data.tasks("motion", 1, held_out=False)


def test_what_a_person_says_may_hold_commas_and_quotes():
    words = quoted_words("prompt=What's this, a {cat}=dog?")
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        assert compose("chat", overrides=[words]).prompt == "What's this, a {cat}=dog?"
