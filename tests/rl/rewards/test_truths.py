"""Truths that say where things are: one that no answer could meet is no zero, whatever is said."""

import asyncio

import pytest

from moonlit.agents.environment import VerifierError
from moonlit.batch import Task, Trajectory
from moonlit.rl.rewards.forms import is_well_formed
from moonlit.rl.rewards.rules import RULES, RuleJudge

NAN = float("nan")
TRIANGLE = [[0.2, 0.2], [0.6, 0.2], [0.6, 0.6]]
BROKEN = [
    ("grounding", [[10, 10, 40, 40]], "shares of the picture's width and height in"),
    ("grounding", [[0.1, 0.1, NAN, 0.4]], "shares of"),
    ("grounding", [0.1, 0.1, 0.4, 0.4], "holds 0.1, no box: want a list of boxes"),
    ("grounding", [[0.1, 0.1, 0.4]], "no box"),
    ("grounding", [["0.1", "0.1", "0.4", "0.4"]], "no box"),
    ("grounding", {"box": [0.1, 0.1, 0.4, 0.4]}, "is no list: want a list of boxes"),
    ("grounding", "(0.1, 0.1, 0.4, 0.4)", "is no list"),
    ("grounding", [[0.4, 0.2, 0.2, 0.6]], "turned round"),
    ("grounding", [[0.2, 0.2, 0.2, 0.6]], "empty"),
    ("pointing", [[28, 14]], "shares of"),
    ("pointing", [[-0.1, 0.5]], "shares of"),
    ("pointing", [0.5, 0.5], "holds 0.5, no point: want a list of points"),
    ("pointing", [[0.2]], "no point"),
    ("segmentation", [[[0.2, 0.2], [0.6, NAN], [0.6, 0.6]]], "shares of"),
    ("segmentation", [[[2, 2], [60, 2], [60, 60]]], "shares of"),
    ("segmentation", [], "holds no outline"),
    ("segmentation", [[]], "has 0 corners"),
    ("segmentation", [[[0.2, 0.2], [0.6, 0.6]]], "has 2 corners"),
    ("segmentation", [[[0.2, 0.2], [0.4, 0.4], [0.6, 0.6]]], "covers nothing"),
    ("segmentation", TRIANGLE, "no corner: want a list of outlines"),
]
SAID = ["", "banana", "(0.1, 0.1) (0.3, 0.3) (0.5, 0.1)"]


def task(environment: str, truth: object) -> Task:
    return Task(prompt=[], domain="perception", environment=environment, answer=truth)


@pytest.mark.parametrize(("environment", "truth", "told"), BROKEN)
@pytest.mark.parametrize("answer", SAID)
def test_a_broken_truth_is_named_whatever_the_answer(environment, truth, told, answer: str):
    with pytest.raises(ValueError, match=told):
        RULES[environment](answer, truth)


@pytest.mark.parametrize(("environment", "truth", "told"), BROKEN)
def test_a_broken_truth_is_the_verifiers_error_of_unfinished_answers_too(environment, truth, told):
    unfinished = Trajectory(segments=[], messages=[], spans=[], stop_reason="length")
    with pytest.raises(VerifierError, match=rf"environment '{environment}': .*{told}"):
        asyncio.run(RuleJudge().judge(task(environment, truth), unfinished))
    with pytest.raises(VerifierError, match=told):
        asyncio.run(RuleJudge().is_right(task(environment, truth), "none"))


def test_a_rule_of_ones_own_may_have_truths_of_its_own():
    judge = RuleJudge(rules={"grounding": lambda answer, truth: float(answer == truth)})
    assert asyncio.run(judge.is_right(task("grounding", "10 10 40 40"), "10 10 40 40"))


def test_a_rounded_sum_of_shares_is_no_pixel():
    reward = RULES["grounding"]("(0, 0, 1, 1)", [[0.0, 0.0, 1.0000000000000002, 1]])
    assert reward == pytest.approx(1)


@pytest.mark.parametrize("environment", ["grounding", "pointing", "wide_search"])
def test_only_none_is_right_where_nothing_is_there(environment: str):
    """Catches: garbage, no words at all, or a place somewhere that earns."""
    right, wrong = ("none", " None. ", "[]"), ("", " ", "banana", "none, I think", "()", "(", "[")
    places = ("(0.5, 0.5)", "(0.1, 0.1, 0.4, 0.4)", "Bato 41")

    earned = [RULES[environment](answer, []) for answer in (*right, *wrong, *places)]
    told = [
        asyncio.run(RuleJudge().is_right(task(environment, []), answer))
        for answer in (*right, *wrong, *places)
    ]

    assert earned == [1.0] * len(right) + [0.0] * (len(wrong) + len(places))
    assert told == [bool(reward) for reward in earned]


@pytest.mark.parametrize(
    ("environment", "truth"), [("grounding", [[0.1, 0.1, 0.4, 0.4]]), ("pointing", [[0.5, 0.5]])]
)
def test_none_has_a_form_but_is_wrong_where_something_is(environment: str, truth: object):
    assert RULES[environment]("none", truth) == 0
    assert is_well_formed(environment, "none")
    assert not is_well_formed(environment, "banana")
