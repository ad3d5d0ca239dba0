"""Rewards: bounded, indifferent to order, better for better answers, and closed to known hacks."""

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonlit.agents.environment import VerifierError
from moonlit.batch import Task, Trajectory
from moonlit.rl.rewards.counting import counting
from moonlit.rl.rewards.grounding import grounding, iou
from moonlit.rl.rewards.ocr import ocr
from moonlit.rl.rewards.pairs import pairs
from moonlit.rl.rewards.parsing import MAX_BRACKETS, only_number, tuples
from moonlit.rl.rewards.pointing import pointing
from moonlit.rl.rewards.rules import RULES, RuleJudge
from moonlit.rl.rewards.segmentation import segmentation

BOX = [0.2, 0.2, 0.4, 0.6]
SQUARE = [[0.2, 0.2], [0.6, 0.2], [0.6, 0.6], [0.2, 0.6]]
TRUTHS = {
    "counting": 4,
    "grounding": [BOX],
    "pointing": [[0.5, 0.25]],
    "segmentation": [SQUARE],
    "ocr": "the moon is lit",
    "caption": "a red circle",
    "exact": "red",
}
unit = st.floats(0, 1)
side = st.floats(0.02, 0.5)
box = st.builds(lambda x, y, w, h: (x / 2, y / 2, x / 2 + w, y / 2 + h), unit, unit, side, side)


def written(*groups) -> str:
    return " ".join("(" + ", ".join(f"{n:.6f}" for n in group) + ")" for group in groups)


@given(
    st.text(max_size=200) | st.text("()., 0123456789-e", max_size=80),
    st.sampled_from(sorted(TRUTHS)),
)
def test_any_answer_earns_between_nothing_and_one(answer: str, name: str):
    assert 0 <= RULES[name](answer, TRUTHS[name]) <= 1


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("counting", "4"),
        ("counting", "There are 4."),
        ("grounding", "(0.2, 0.2, 0.4, 0.6)"),
        ("pointing", "Here: (0.5, 0.25)"),
        ("segmentation", written(*SQUARE)),
        ("ocr", "the  moon\nis lit"),
        ("exact", "Red."),
    ],
)
def test_the_truth_earns_one(name: str, answer: str):
    assert RULES[name](answer, TRUTHS[name]) == pytest.approx(1)


@given(st.lists(box, min_size=1, max_size=4), st.lists(box, min_size=1, max_size=4), st.randoms())
def test_the_order_of_boxes_does_not_matter(predicted, truth, random):
    before = grounding(written(*predicted), truth)
    random.shuffle(predicted)
    random.shuffle(truth)

    assert grounding(written(*predicted), truth) == pytest.approx(before, abs=1e-6)


def test_the_matching_is_the_best_one_not_the_first():
    """The first box fits both truths; greedy matching would leave the second with nothing."""
    left, right = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
    both, only_left = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.6, 1.0]

    reward = grounding(written(only_left, both), [left, right])

    assert reward == pytest.approx((iou(only_left, left) + iou(both, right)) / 2, abs=1e-6)


@given(st.floats(0, 0.15), st.floats(0.01, 0.15))
def test_a_nearer_point_and_a_nearer_box_earn_more(near: float, further: float):
    far = near + further
    assert pointing(written([0.5 + far, 0.25]), TRUTHS["pointing"]) < pointing(
        written([0.5 + near, 0.25]), TRUTHS["pointing"]
    )
    moved = [[x + d if i % 2 == 0 else x for i, x in enumerate(BOX)] for d in (near, far)]
    assert grounding(written(moved[0]), [BOX]) > grounding(written(moved[1]), [BOX])


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_nearer_count_earns_at_least_as_much(truth: int, said: int):
    nearer = said + (truth > said) - (truth < said)
    assert counting(f"{nearer}", truth) >= counting(f"{said}", truth)


def test_a_wrong_count_earns_by_how_far_it_is_off_the_truth():
    assert [counting(said, 4) for said in ("3", "6", "9")] == [0.75, 0.5, 0.0]
    assert (counting("1", 0), counting("0.5", 0)) == (0.0, 0.5)


def test_a_text_is_measured_against_the_longer_of_the_two():
    assert [ocr(said, "moon") for said in ("mo", "moonlits", "MOON")] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("bato: 41 and KILU 17", 1.0),
        ("Bato 41", 2 / 3),
        ("Bato 41, Kilu 18", 0.5),
        ("Bato 41, Bato 42, Kilu 17", 0.8),  # a second value costs precision
        ("Bato 41, Bato 41, Kilu 17", 1.0),
        ("Bato 17, Kilu 41", 0.0),
        ("", 0.0),
    ],
)
def test_names_count_with_their_values(answer: str, reward: float):
    assert pairs(answer, [["Bato", "41"], ["Kilu", "17"]]) == pytest.approx(reward)


def test_the_gaussian_is_measured_in_diagonals():
    away = 0.05 * math.sqrt(2)  # one sigma: 0.05 of the diagonal of a unit square
    reward = pointing(written([0.5 + away, 0.25]), [[0.5, 0.25]])
    assert reward == pytest.approx(math.exp(-0.5), abs=1e-5)


def test_areas_of_outlines():
    half = [[0.2, 0.2], [0.4, 0.2], [0.4, 0.6], [0.2, 0.6]]
    assert segmentation(written(*half), [SQUARE]) == pytest.approx(0.5)
    two = [half, [[0.4, 0.2], [0.6, 0.2], [0.6, 0.6], [0.4, 0.6]]]
    assert segmentation(written(*SQUARE), two) == pytest.approx(1)


def test_an_outline_that_crosses_itself_covers_its_two_wings():
    bow_tie = [[0.2, 0.2], [0.6, 0.6], [0.6, 0.2], [0.2, 0.6]]
    assert segmentation(written(*bow_tie), [SQUARE]) == pytest.approx(0.5)


# What does not pay


def test_redundant_boxes_lower_the_reward():
    once = grounding(written(BOX), [BOX])
    assert grounding(written(BOX, BOX), [BOX]) == pytest.approx(2 / 3)
    assert grounding(written(*[BOX] * 20), [BOX]) < 0.1 < once


def test_a_box_around_everything_earns_its_small_overlap():
    assert grounding(written([0, 0, 1, 1]), [BOX]) == pytest.approx(0.08, abs=1e-6)


def test_a_grid_of_points_earns_less_than_one_good_one():
    grid = [[x / 10, y / 10] for x in range(11) for y in range(11)]
    assert pointing(written(*grid), [[0.5, 0.25]]) < 0.05


@pytest.mark.parametrize("answer", ["3 or 4", "3, 4, 5", "4 4", "four", "", "1e400", "nan"])
def test_a_count_must_be_one_number(answer: str):
    assert counting(answer, 4) == 0


@pytest.mark.parametrize("answer", ["red or blue", "red, blue, green", "not red", "it is red"])
def test_several_possibilities_are_no_answer(answer: str):
    assert RULES["exact"](answer, "red") == 0


def test_a_long_answer_that_holds_the_text_earns_little():
    assert ocr("the moon is lit " + "and so on " * 50, TRUTHS["ocr"]) < 0.05


@pytest.mark.parametrize(
    "answer",
    [
        "(0.4, 0.2, 0.2, 0.6)",  # x2 < x1
        "(0.2, 0.2, 0.2, 0.6)",  # no width
        "(0.2, 0.2, 0.4)",
        "(0.2, 0.2, 0.4, 1.6)",
        "(0.2, 0.2, 0.4, nan)",
        "(0.2, 0.2, 0.4, 0.6",
        "(0.2, 0.2, 0.4, 0.6) (see above)",  # a bracket that is no box
        "no box",
        "(0.2, 0.2, 0.4, 0.6)" * (MAX_BRACKETS + 1),
    ],
)
def test_what_is_no_box_earns_nothing(answer: str):
    assert grounding(answer, [BOX]) == 0


def test_two_corners_are_no_outline():
    assert segmentation("(0.2, 0.2) (0.6, 0.6)", [SQUARE]) == 0


def test_numbers_are_read_strictly():
    assert only_number("There are -3.5 of them") == -3.5
    assert [only_number(answer) for answer in ("2py is True", "x2", "f_2", "2é")] == [None] * 4
    assert tuples("(1, .5) and (0, 1e-1)", 2) == [(1.0, 0.5), (0.0, 0.1)]
    assert tuples("((0, 1))", 2) is None


# The judge


def judged(task: Task, text: str, stop_reason: str = "answer", **rules) -> dict[str, float]:
    trajectory = Trajectory(segments=[], messages=[], spans=[], stop_reason=stop_reason, text=text)
    return asyncio.run(RuleJudge(rules=rules).judge(task, trajectory))


def task(environment: str = "counting", answer: object = 4) -> Task:
    return Task(prompt=[], domain="perception", environment=environment, answer=answer)


def test_an_unfinished_answer_earns_nothing_though_its_words_are_right():
    assert judged(task(), "4") == {"counting": 1.0}
    assert judged(task(), "4", "length") == {"counting": 0.0}


@pytest.mark.parametrize("value", [float("nan"), 3.7, -0.1])
def test_a_reward_out_of_bounds_is_the_verifiers_error(value: float):
    with pytest.raises(VerifierError, match=r"'counting' returned .*: it promises"):
        judged(task(), "4", counting=lambda answer, truth: value)


def test_a_broken_reward_is_no_zero():
    with pytest.raises(VerifierError, match="'counting' failed: ZeroDivisionError"):
        judged(task(), "4", counting=lambda answer, truth: 1 / 0)


def test_a_task_without_a_rule_or_an_answer_is_named():
    with pytest.raises(VerifierError, match="no reward for environment 'weather'"):
        judged(task("weather"), "4")
    with pytest.raises(VerifierError, match="has no answer"):
        judged(task(answer=None), "4")


@pytest.mark.parametrize(
    ("environment", "truth", "told"),
    [
        ("counting", float("nan"), "true count is nan"),
        ("counting", -1, "true count is -1"),
    ],
)
def test_a_truth_that_no_answer_could_meet_is_the_verifiers_error(environment, truth, told):
    with pytest.raises(VerifierError, match=rf"reward '{environment}' failed.*{told}"):
        judged(task(environment, truth), "(0.1, 0.1) (0.3, 0.3) (0.5, 0.5)")


def test_what_cannot_be_read_is_counted_beside_its_zero():
    for text, expected in (("4", 1.0), ("four", 0.0)):
        trajectory = Trajectory(segments=[], messages=[], spans=[], stop_reason="answer", text=text)
        asyncio.run(RuleJudge().judge(task(), trajectory))
        assert trajectory.metrics == {"well_formed": expected}


@pytest.mark.parametrize(
    ("environment", "truth", "right", "wrong"),
    [
        ("counting", 4, "4", "There are 4."),  # earns 1, but is not just the truth
        (
            "grounding",
            [[0.204, 0.2, 0.4, 0.6]],
            "(0.20, 0.20, 0.40, 0.60)",
            "(0.21, 0.2, 0.4, 0.6)",
        ),
        ("colour", "red", "Red.", "red or blue"),
        ("code", {"tests": ["f"]}, "f", "g"),
        ("mathematics", "3", r"\boxed{3}", "4"),
    ],
)
def test_right_is_what_is_the_truth_or_earns_all_where_that_is_no_text(
    environment: str, truth, right: str, wrong: str
):
    async def boxed(answer: str, truth: str) -> float:
        return float(answer == rf"\boxed{{{truth}}}")

    judge = RuleJudge(
        rules={"code": lambda answer, truth: float(answer in truth["tests"]), "mathematics": boxed}
    )
    task = Task(prompt=[], domain="perception", environment=environment, answer=truth)

    assert asyncio.run(judge.is_right(task, right))
    assert not asyncio.run(judge.is_right(task, wrong))


def test_what_nothing_can_tell_right_is_an_error():
    task = Task(prompt=[], domain="chat", environment="chat", answer={"rubric": "be kind"})
    with pytest.raises(VerifierError, match="chat"):
        asyncio.run(RuleJudge().is_right(task, "hello"))


def test_what_a_rule_fails_of_is_no_wrong_answer():
    def fails(answer: str, truth: object) -> float:
        raise ZeroDivisionError("no tests")

    task = Task(prompt=[], domain="coding", environment="mine", answer={"tests": []})
    with pytest.raises(VerifierError, match="reward 'mine' failed: ZeroDivisionError: no tests"):
        asyncio.run(RuleJudge(rules={"mine": fails}).is_right(task, "hello"))
    almost = RuleJudge(rules={"mine": lambda answer, truth: 1 - 1e-9})
    assert asyncio.run(almost.is_right(task, "hello"))
