"""The form of answers: whether one can be read at all, by the kind of task."""

from collections.abc import Callable

from moonlit.rl.rewards.code import source_of
from moonlit.rl.rewards.mathematics import final_expression
from moonlit.rl.rewards.pairs import PAIR
from moonlit.rl.rewards.parsing import boxes, only_number, points, says_none, tuples

FORMS: dict[str, Callable[[str], bool]] = {
    "counting": lambda answer: only_number(answer) is not None,
    "chart_value": lambda answer: only_number(answer) is not None,
    "grounding": lambda answer: bool(boxes(answer)) or says_none(answer),
    "pointing": lambda answer: bool(points(answer)) or says_none(answer),
    "segmentation": lambda answer: len(tuples(answer, 2) or ()) >= 3,
    "wide_search": lambda answer: PAIR.search(answer) is not None,
    "mathematics": lambda answer: final_expression(answer) is not None,
    "code": lambda answer: source_of(answer) is not None,
}


def is_well_formed(environment: str, answer: str) -> bool:
    """Whether an answer has its task's form; of a kind without one, whether there are words."""
    form = FORMS.get(environment)
    return bool(answer.strip()) if form is None else form(answer)
