"""Families that reinforcement learning asks for: the truth is what the pixels show, and earns 1."""

from collections import Counter

import numpy as np
import pytest

from data_modules.tasks.documentation import Documentation, described
from data_modules.tasks.equations import Equations, latex
from data_modules.tasks.pictures import Pictures
from data_modules.tasks.programs import Programs, compositions, function
from data_modules.tasks.source import HELD_OUT, TRAIN
from data_modules.world import charts, referring, sequences
from data_modules.world.question import Item
from data_modules.world.sources import TASK_FAMILIES
from data_modules.world.things import COLOURS, SEEN_PAIRS
from moonlit.chat.messages import Image as ImagePart
from moonlit.rl.rewards.code import source_of
from moonlit.rl.rewards.forms import is_well_formed
from moonlit.rl.rewards.rules import RULES

SIDE = 112


def items(family: str, num: int = 30) -> list[Item]:
    make = TASK_FAMILIES[family]
    return [make(np.random.default_rng(number), SEEN_PAIRS, SIDE) for number in range(num)]


@pytest.mark.parametrize("family", TASK_FAMILIES)
def test_the_truth_in_words_earns_one_and_has_its_form(family: str):
    for item in items(family):
        (question,) = item.questions[:1]
        reward = RULES[question.environment](question.answer, question.truth)
        assert reward == pytest.approx(1, abs=0.15)  # two decimals, of small things
        assert is_well_formed(question.environment, question.answer)


@pytest.mark.parametrize("family", TASK_FAMILIES)
def test_no_one_answer_is_right_for_all(family: str):
    answers = Counter(item.questions[0].answer for item in items(family, 60))
    assert answers.most_common(1)[0][1] <= 24


@pytest.mark.parametrize(("family", "width"), [("every_point", 2), ("every_box", 4)])
def test_every_thing_of_a_kind_is_meant_and_no_other(family: str, width: int):
    several = 0
    for item in items(family):
        question = item.questions[0]
        kind = question.text.removesuffix(".").split("every ")[1]
        names = item.tags["composition"].split(", ")
        meant = [name for name in names if kind.removesuffix(" shape") in name.split(" ")]
        assert len(question.truth) == len(meant)
        assert all(len(one) == width for one in question.truth)
        several += len(meant) > 1
        pixels = np.asarray(item.frames[0])
        for one in question.truth if width == 2 else []:
            column, row = (int(value * SIDE) for value in one)
            shown = tuple(pixels[row, column].tolist())
            assert shown in COLOURS.values()
            assert not kind.endswith(" shape") or shown == COLOURS[kind.removesuffix(" shape")]
    assert several > 5


def test_a_bar_is_as_high_as_its_value():
    """Measured in pixels between the grid's lines."""
    for number in range(20):
        values = np.random.default_rng(number).permutation(charts.LARGEST)[:4] + 1
        bars = dict(zip(tuple(COLOURS)[:4], (int(v) for v in values), strict=True))
        pixels = np.asarray(charts.drawn(bars, SIDE))
        unit = (SIDE - 3 - 4) / charts.LARGEST
        for colour, value in bars.items():
            rows = np.argwhere((pixels == COLOURS[colour]).all(axis=-1))[:, 0]
            assert round((SIDE - 3 - rows.min()) / unit) == value


def test_questions_about_charts_are_answered_from_the_bars():
    bars = {"red": 2, "blue": 7, "green": 5}
    asked = {}
    for number in range(60):
        rng = np.random.default_rng(number)
        for ask in (charts.value_of, charts.extreme, charts.difference):
            question = ask(rng, bars)
            asked[question.text] = question.truth
    assert asked["What is the value of the blue bar?"] == 7
    assert asked["What colour is the lowest bar?"] == "red"
    assert asked["How much higher is the blue bar than the green bar?"] == 2
    assert "How much higher is the green bar than the blue bar?" not in asked


def test_what_comes_next_is_told_by_what_is_shown():
    rows = [
        tuple(rule[(start + place) % len(rule)] ^ flip for place in range(sequences.NUM_PLACES))
        for rule in sequences.RULES
        for start in range(len(rule))
        for flip in (0, 1)
    ]
    goes_on = {}
    for *shown, last in rows:
        assert goes_on.setdefault(tuple(shown), last) == last
    assert len({last for *_, last in rows}) == 2
    for item in items("sequences"):
        assert item.questions[0].answer in item.tags["composition"]


def test_pointing_asks_for_the_centre():
    item = referring.pointing(np.random.default_rng(1), SEEN_PAIRS, SIDE)
    assert item.questions[0].environment == "pointing"


def test_the_splits_of_a_family_differ():
    source = Pictures(seed=0, family="charts", picture_side=SIDE, first=0)
    train, held = source(TRAIN, 0), source(HELD_OUT, 0)
    assert train.prompt[0].parts[0].image.tobytes() != held.prompt[0].parts[0].image.tobytes()


# Joint RL


def test_documentation_asks_for_what_is_there_once():
    held, train = described(True), described(False)
    assert not {module for module, _ in held} & {module for module, _ in train}
    for module, functions in train[:40]:
        names, summaries = zip(*functions, strict=True)
        assert len(set(summaries)) == len(summaries), module
        assert all(n.lower() not in s.lower() for n, s in zip(names, summaries, strict=True))


def test_documentation_mixes_text_and_pages():
    source = Documentation(seed=0, picture_fraction=0.5)
    tasks = [source(TRAIN, number) for number in range(40)]
    drawn = [any(isinstance(p, ImagePart) for p in task.prompt[0].parts) for task in tasks]
    assert 8 < sum(drawn) < 32
    assert {task.domain for task in tasks} == {"knowledge"}
    assert all(RULES["exact"](task.answer, task.answer) == 1 for task in tasks)


KEEP = {
    "all numbers": lambda x: True,
    "the even numbers": lambda x: x in range(-10, 11, 2),
    "the odd numbers": lambda x: x in range(-9, 10, 2),
    "the numbers above 3": lambda x: x >= 4,
    "the negative numbers": lambda x: x <= -1,
}
CHANGE = {
    "as they are": int,
    "each doubled": lambda x: x + x,
    "each squared": lambda x: x**2,
    "each without its sign": lambda x: max(x, -x),
}
SAY = {
    "their sum": lambda xs: sum(xs),
    "how many they are": lambda xs: sum(1 for _ in xs),
    "their list in order": lambda xs: sorted(xs),
    "their list the other way round": lambda xs: list(reversed(xs)),
    "the largest, or 0 if there is none": lambda xs: sorted(xs)[-1] if xs else 0,
}


def test_programs_are_tested_by_what_their_words_mean_and_solved_by_their_solution():
    source, seen = Programs(seed=0, num_tests=4), set()
    for number in range(150):
        task = source(TRAIN, number)
        keep, change, say = task.tags["composition"].split(", ", 2)
        seen |= {keep, change, say}
        solve = function(source_of(source.solution(task)) or "")
        for test in task.answer["tests"]:
            xs = eval(test["call"].removeprefix("solve"))  # our own list
            wanted = SAY[say]([CHANGE[change](x) for x in xs if KEEP[keep](x)])
            assert test["expected"] == wanted == solve(xs)
            assert test["call"] not in task.prompt[0].content
        assert len(task.answer["tests"]) == 4
    assert seen == {*KEEP, *CHANGE, *SAY}
    assert not set(compositions(TRAIN)) & set(compositions(HELD_OUT))
    assert compositions(HELD_OUT)


def test_equations_are_solved_by_their_answer():
    source = Equations(seed=0, largest=9, picture_fraction=0.0, picture_side=28)
    seen = {split: set() for split in (TRAIN, HELD_OUT)}
    for split, texts in seen.items():
        for number in range(60):
            task = source(split, number)
            words = task.prompt[0].content[0].text
            texts.add(words)
            a, b, c = (
                int(part) for part in words.split(".")[0].replace("x", "").split() if part.isdigit()
            )
            value = task.answer.replace(r"\frac{", "").replace("}{", "/").replace("}", "")
            top, _, bottom = value.partition("/")
            assert a * int(top) + b * int(bottom or 1) == c * int(bottom or 1)
    assert not seen[TRAIN] & seen[HELD_OUT]


def test_fractions_are_written_for_the_verifier():
    from fractions import Fraction

    assert [latex(Fraction(*pair)) for pair in ((1, 2), (-3, 4), (6, 2))] == [
        r"\frac{1}{2}", r"-\frac{3}{4}", "3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Documentation(seed=0, picture_fraction=2.0), "picture_fraction=2"),
        (lambda: Programs(seed=0, num_tests=0), "num_tests=0"),
        (lambda: Equations(seed=0, largest=2, picture_fraction=0.0, picture_side=28), "largest=2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, told: str):
    with pytest.raises(ValueError, match=told):
        make()
