"""Every program really answers; what is wrong is thrown away; no line holds a picture."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_modules.components.dialogue_files import line_starts, read_dialogue
from data_modules.zero_vision import solve as solving
from data_modules.zero_vision.lines import line, user
from data_modules.zero_vision.problem import Answer, Cell, Problem, Program, Rng, same, within
from data_modules.zero_vision.solve import FAMILIES, Rejected, problem_rng, solve
from moonlit.agents.sandbox.pool import Pool
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer

NUM_TRIES = 4
SURE = 0.7
"""Share of a family's problems that must come out right, by our own measure of NUM_TRIES."""


@pytest.fixture(scope="module")
def pooled() -> Iterator[tuple[asyncio.Runner, Pool]]:
    with asyncio.Runner() as runner:
        pool = Pool(num_warm=1)
        runner.run(pool.__aenter__())
        yield runner, pool
        runner.run(pool.close())


def solved(pooled: tuple[asyncio.Runner, Pool], family: str, number: int) -> Any:
    runner, pool = pooled
    return runner.run(solve(pool, family, problem_rng(3, 0, family, number), {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_programs_reach_the_truth(
    family: str, pooled: tuple[asyncio.Runner, Pool], tmp_path: Path
):
    made = [solved(pooled, family, number) for number in range(NUM_TRIES)]

    right = [value for value in made if not isinstance(value, Rejected)]
    assert len(right) >= SURE * NUM_TRIES, [v for v in made if isinstance(v, Rejected)]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in right))
    for start in line_starts(file):
        dialogue = read_dialogue(file, start)
        assert dialogue.num_images == 0
        assert render(dialogue.messages, Tokenizer.embedded(), tools=dialogue.tools).media == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_of_a_family_works(family: str, pooled: tuple[asyncio.Runner, Pool]):
    made = [solved(pooled, family, number) for number in range(30)]

    problem = FAMILIES[family](np.random.default_rng(0))
    right = {value["provenance"]["program"] for value in made if not isinstance(value, Rejected)}
    assert right == set(problem.programs)


def test_questions_are_paraphrased_and_state_no_answer():
    for family, make in FAMILIES.items():
        problems = [make(problem_rng(0, 0, family, number)) for number in range(30)]
        assert len({problem.question for problem in problems}) > 1, family
        assert len(FAMILIES) >= 12


def test_a_problem_is_a_function_of_its_number():
    one, same_one, other = (FAMILIES["maze"](problem_rng(0, 0, "maze", n)) for n in (4, 4, 5))

    assert (one.question, one.truth) == (same_one.question, same_one.truth)
    assert one.images[0].tobytes() == same_one.images[0].tobytes()
    assert one.images[0].tobytes() != other.images[0].tobytes()
    held_out = FAMILIES["maze"](problem_rng(0, 1, "maze", 4))
    assert one.images[0].tobytes() != held_out.images[0].tobytes()


def liar(rng: Rng, stated: dict[str, Any]) -> Program:
    output = yield Cell("I guess.", "print(6)")
    return Answer("So.", output.strip(), output.strip())


def crash(rng: Rng, stated: dict[str, Any]) -> Program:
    yield Cell("I divide.", "1 / 0")
    raise AssertionError("it must not be asked to go on")


def flood(rng: Rng, stated: dict[str, Any]) -> Program:
    yield Cell("I print.", "print('x' * 5000)")
    raise AssertionError("it must not be asked to go on")


@pytest.mark.parametrize(
    ("program", "reason"), [(liar, "wrong"), (crash, "error"), (flood, "long")]
)
def test_what_is_not_right_is_thrown_away(
    program: Any,
    reason: str,
    pooled: tuple[asyncio.Runner, Pool],
    monkeypatch: pytest.MonkeyPatch,
):
    def problem(rng: Rng) -> Problem:
        return Problem(
            family="test", question="?", images=[Image.new("RGB", (2, 2))], truth="5",
            is_right=same, programs={"p": program}, stated={}, difficulty=1,
        )  # fmt: skip

    monkeypatch.setitem(solving.FAMILIES, "test", problem)

    rejected = solved(pooled, "test", 0)

    assert (rejected.family, rejected.program, rejected.reason) == ("test", "p", reason)


@pytest.mark.parametrize(
    ("value", "truth", "is_right"),
    [("1, 2", "1.01, 2", True), ("1, 2", "1.1, 2", False), ("1", "1, 2", False), ("x", "1", False)],
)
def test_measurements_are_compared_number_by_number(value: str, truth: str, is_right: bool):
    assert within(0.02)(value, truth) == is_right


def test_a_line_says_where_it_comes_from():
    value = line([user("?")], [], {"family": "maze"})

    assert value == {"messages": [user("?")], "tools": [], "provenance": {"family": "maze"}}
