"""Sums along a chain, and answers of unlike lengths to them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data_modules.tasks.chain_traces import AGAIN, ChainTraces
from data_modules.tasks.chains import Chains

CHAINS = {"seed": 0, "min_steps": 2, "max_steps": 5, "modulus": 7}


def numbers_of(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


def test_the_answer_is_the_sum_and_the_steps_lead_there():
    for number in range(50):
        task = Chains(**CHAINS)("train", number)
        numbers, steps = numbers_of(task.prompt[0].content), numbers_of(task.tags["steps"])
        assert task.answer == sum(numbers) % 7 == steps[-1] % 10
        sums = [sum(numbers[: n + 1]) % 7 for n in range(len(numbers))]
        assert steps == [10 * number + total for number, total in zip(numbers, sums, strict=True)]
        assert 2 <= len(numbers) == int(task.tags["difficulty"]) <= 5


def test_splits_share_no_chain_and_a_number_means_the_same_task():
    chains = Chains(**CHAINS)
    asked = {
        split: {chains(split, n).prompt[0].content for n in range(300)}
        for split in ("train", "held_out")
    }
    assert not asked["train"] & asked["held_out"]
    assert chains("train", 5) == Chains(**CHAINS)("train", 5) != chains("train", 6)


def test_traces_go_over_the_chain_as_often_as_weighted(tmp_path: Path):
    source = ChainTraces(
        folder=str(tmp_path), source=Chains(**CHAINS), first=10, num_train=400, num_held_out=3,
        passes={0: 1.0, 1: 2.0, 3: 1.0}, seed=0,
    )  # fmt: skip
    source.prepare_data()

    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 3
    counts = Counter(line["provenance"]["passes"] for line in lines)
    assert counts[1] / 400 == pytest.approx(0.5, abs=0.08)
    assert set(counts) == {0, 1, 3}
    for line in lines:
        asked, answered = line["messages"]
        sums = answered["reasoning_content"].split(AGAIN) if answered["reasoning_content"] else []
        assert len(set(sums)) <= 1
        assert len(sums) == line["provenance"]["passes"]
        assert sum(numbers_of(asked["content"])) % 7 == int(answered["content"])


@pytest.mark.parametrize(
    ("change", "told"),
    [({"max_steps": 27}, "max_steps=27"), ({"min_steps": 1}, "min_steps=1"), ({"modulus": 1}, "1")],
)
def test_chains_that_cannot_be_are_refused(change: dict[str, int], told: str):
    with pytest.raises(ValueError, match=told):
        Chains(**CHAINS | change)


@pytest.mark.parametrize("passes", [{}, {1: -1.0}, {-1: 1.0}, {1: 0.0}])
def test_weights_that_are_none_are_refused(passes: dict[int, float], tmp_path: Path):
    with pytest.raises(ValueError, match="passes"):
        ChainTraces(
            folder=str(tmp_path), source=Chains(**CHAINS), first=0, num_train=1, num_held_out=1,
            passes=passes, seed=0,
        )  # fmt: skip
