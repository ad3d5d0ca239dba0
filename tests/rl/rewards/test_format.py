"""The form's share: it helps what is right to be read, and buys nothing by itself."""

import asyncio
from typing import Any

import pytest

from moonlit.batch import Task, Trajectory
from moonlit.rl.rewards.format import FormatJudge
from moonlit.rl.rewards.forms import FORMS, is_well_formed
from moonlit.rl.rewards.rules import RULES, RuleJudge

BOX = [[0.2, 0.2, 0.4, 0.6]]


def judged(
    text: str, environment: str = "grounding", answer: Any = BOX, **changes: Any
) -> dict[str, float]:
    values = {"segments": [], "messages": [], "spans": [], "stop_reason": "answer", "text": text}
    task = Task(prompt=[], domain="perception", environment=environment, answer=answer)
    judge = FormatJudge(content=RuleJudge(), weight=0.1)
    return asyncio.run(judge.judge(task, Trajectory(**values | changes)))


def total(*asked: Any, **changes: Any) -> float:
    return sum(judged(*asked, **changes).values())


def test_only_what_is_right_and_in_form_earns_one():
    assert total("(0.2, 0.2, 0.4, 0.6)") == pytest.approx(1)
    assert total("(0.2, 0.2, 0.4, 0.6)", metrics={"num_malformed": 1.0}) == pytest.approx(0.9)
    assert total("red", "colour", "red") == pytest.approx(1)


@pytest.mark.parametrize(
    "text", ["(0.9, 0.9, 1, 1)", "(0, 0, 0.01, 0.01) " * 50, "(0.9, 0.9, 1, 1) " * 256]
)
def test_wellformed_nonsense_earns_the_forms_share_and_no_more(text: str):
    assert total(text) == pytest.approx(0.1, abs=1e-3)


def test_tool_calls_earn_nothing_by_themselves():
    many = {"num_calls": 50.0, "num_turns": 50.0, "num_malformed": 0.0}
    assert total("no box", metrics=many) == 0
    assert total("(0.2, 0.2, 0.4, 0.6)", metrics=many) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "no box", "(0.4, 0.2, 0.2, 0.6)", "(0.2, 0.2, 0.4"])
def test_what_cannot_be_read_earns_nothing(text: str):
    assert judged(text) == {"grounding": 0.0, "format": 0.0}


def test_an_unfinished_answer_keeps_no_form():
    assert total("(0.2, 0.2, 0.4, 0.6)", stop_reason="length") == 0


@pytest.mark.parametrize(
    ("environment", "good", "bad"),
    [
        ("counting", "There are 3.", "three"),
        ("chart_value", "It is 3.", "3 or 4"),
        ("pointing", "(0.5, 0.5)", "(1.5, 0.5)"),
        ("segmentation", "(0, 0) (0, 1) (1, 1)", "(0, 0) (0, 1)"),
        ("wide_search", "Bato 41", "Bato"),
        ("mathematics", r"so \boxed{3}", r"\boxed{3} or \boxed{4}"),
        ("code", "```python\nx = 1\n```", "x = ("),
        ("ocr", "words", " "),
    ],
)
def test_forms_by_kind(environment: str, good: str, bad: str):
    assert is_well_formed(environment, good)
    assert not is_well_formed(environment, bad)


def test_every_form_belongs_to_a_rule():
    assert set(FORMS) <= {*RULES, "mathematics", "code"}


def test_a_weight_that_outweighs_the_answer_is_refused():
    with pytest.raises(ValueError, match=r"weight=0\.5"):
        FormatJudge(content=RuleJudge(), weight=0.5)
