"""The set as a whole: counts, splits, near-duplicates, stopping and going on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from data_modules.components.dialogue_files import line_starts, read_dialogue
from data_modules.zero_vision import source
from data_modules.zero_vision.duplicates import Seen
from data_modules.zero_vision.lines import assistant, line, user
from data_modules.zero_vision.source import ZeroVision
from data_modules.zero_vision.text_tasks import WORKED, Searches, documentation
from moonlit.agents.sandbox.policy import Policy
from moonlit.cli import conf_folder


def small_set(folder: Path, **changes: Any) -> ZeroVision:
    numbers = {
        "num_trajectories": 4, "num_documentation": 2, "num_worked": 9, "num_searches": 3,
        "num_held_out": 4, "num_workers": 2,
    }  # fmt: skip
    asked = {
        "folder": str(folder),
        "seed": 1,
        "tokenizer": "embedded",
        "sandbox": Policy(),
        "part": None,
    }
    return ZeroVision(**{**asked, **numbers, **changes})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "SHARD", 6)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_set_is_whole(tmp_path: Path):
    small_set(tmp_path, num_documentation=0).prepare_data()

    train, held_out = lines_of(tmp_path / "train.jsonl"), lines_of(tmp_path / "held_out.jsonl")
    assert (len(train), len(held_out)) == (4 + 9 + 3, 4 + 3 * 1)
    assert {value["provenance"]["split"] for value in train} == {"train"}
    questions = {json.dumps(value["messages"]) for value in train}
    assert not questions & {json.dumps(value["messages"]) for value in held_out}
    for start in line_starts(tmp_path / "train.jsonl"):
        assert read_dialogue(tmp_path / "train.jsonl", start).num_images == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["held_out.jsonl", "report.json", "train.jsonl"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_lines"] == len(train) + len(held_out)


@pytest.mark.slow
def test_parts_made_apart_join_into_the_same_set(tmp_path: Path):
    small_set(tmp_path / "whole").prepare_data()
    for part in ("2/2", "1/2"):
        small_set(tmp_path / "parts", part=part).prepare_data()
        assert not (tmp_path / "parts" / "train.jsonl").exists()
    small_set(tmp_path / "parts").prepare_data()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_a_part_that_there_is_not_is_refused(tmp_path: Path, part: str):
    with pytest.raises(ValueError, match=f"source.part={part}: want INDEX/COUNT"):
        small_set(tmp_path, part=part)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stops it when the trajectories are made, then forbids to make them again."""

    async def stop(*_: object) -> None:
        raise KeyboardInterrupt

    async def never(*_: object) -> None:
        raise AssertionError("these shards are there already")

    whole, stopped = small_set(tmp_path / "whole"), small_set(tmp_path / "stopped")
    whole.prepare_data()
    texts = ZeroVision.texts
    monkeypatch.setattr(ZeroVision, "texts", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.prepare_data()
    assert not (tmp_path / "stopped" / "train.jsonl").exists()

    monkeypatch.setattr(ZeroVision, "texts", texts)
    make_shard = ZeroVision.shard

    async def shard(self: ZeroVision, *place: Any) -> Any:
        *_, split, kind, _ = place
        remade = (split, kind) != ("train", "trajectories")
        with monkeypatch.context() as patched:
            if not remade:
                patched.setattr(ZeroVision, "trajectories", never)
            return await make_shard(self, *place)

    monkeypatch.setattr(ZeroVision, "shard", shard)
    stopped.prepare_data()

    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    before = (tmp_path / "whole" / "train.jsonl").stat().st_mtime_ns
    whole.prepare_data()
    assert (tmp_path / "whole" / "train.jsonl").stat().st_mtime_ns == before


def spoken(answer: str, program: str = "p") -> dict[str, Any]:
    told = [user("How many shapes are there in the picture?"), assistant(answer, "I count them.")]
    return line(told, [], {"family": "f", "program": program})


def test_near_duplicates_are_seen_within_a_program():
    seen, long = Seen(), " ".join(map(str, range(40)))

    told = [seen.is_new(spoken(a)) for a in ("3", "3", "4", long, f"{long} eleven")]

    assert told == [True, False, True, True, False]
    assert seen.is_new(spoken("3", program="q"))


def test_too_few_right_answers_are_an_error_that_names_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def nothing(*_: object) -> dict[str, list[Any]]:
        rejected = {"family": "f", "program": "p", "reason": "wrong", "detail": ""}
        return {"lines": [], "rejected": [rejected]}

    monkeypatch.setattr(ZeroVision, "trajectories", nothing)

    with pytest.raises(RuntimeError, match=r"trajectories: 4 dialogues are missing.*'wrong'"):
        small_set(tmp_path).prepare_data()
    assert not (tmp_path / "train.jsonl").exists()


def test_the_command_builds_the_source(tmp_path: Path):
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        cfg = compose("prepare", overrides=["source=zero_vision", f"source.folder={tmp_path}"])

    built = instantiate(cfg.source)

    assert built.wanted["train"]["trajectories"] == 5000
    assert built.sandbox.as_json()["require"] == ["files", "network", "processes"]


@pytest.mark.parametrize("changes", [{"num_worked": -1}, {"num_workers": 0}])
def test_bad_numbers_are_refused(changes: dict[str, int], tmp_path: Path):
    with pytest.raises(ValueError, match="want at least 0 and 1"):
        small_set(tmp_path, **changes)


@pytest.mark.parametrize("number", range(30))
def test_worked_answers_follow_from_their_last_step(number: int):
    for make in WORKED:
        _, messages, tools, truth = make(np.random.default_rng(number))
        last = messages[-1]["reasoning_content"].splitlines()[-1]
        assert (messages[-1]["content"], tools) == (truth, [])
        assert truth.split(",")[0].strip() in last, make.__name__


def test_arithmetic_is_right():
    for number in range(50):
        for make, sign in ((WORKED[0], "+"), (WORKED[1], "*")):
            _, messages, _, truth = make(np.random.default_rng(number))
            text = messages[0]["content"].replace(" by ", " * ").strip(".?:")
            terms = [int(word.strip(":")) for word in text.split() if word.strip(":").isdigit()]
            assert int(truth) == (sum(terms) if sign == "+" else terms[0] * terms[1])


def test_searches_read_the_pages_that_they_name():
    searches = Searches(seed=2)
    for number in range(20):
        kind, messages, _, truth = asyncio.run(searches.dialogue(np.random.default_rng(number)))
        results = "\n".join(m["content"] for m in messages if m["role"] == "tool")
        assert "there is no page" not in results
        if kind == "deep_search":
            assert truth in results
        else:
            cells = messages[-1]["content"].splitlines()[2].strip("| ").split(" | ")
            assert all(cell in results for cell in cells)


def test_documentation_of_the_splits_is_apart():
    names = [
        {
            documentation(np.random.default_rng(n), held_out=split)[1][-1]["content"]
            for n in range(99)
        }
        for split in (False, True)
    ]

    assert not names[0] & names[1]
