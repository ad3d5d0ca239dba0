"""Tasks of reasoning-gym: its own verifiers."""

from typing import Any


def reasoning_gym(answer: str, truth: dict[str, Any]) -> float:
    """Return the score of the dataset's own verifier.

    Args:
        answer: the words.
        truth: ``name`` of the dataset and its ``entry``.
    """
    from reasoning_gym import get_score_answer_fn

    score: Any = get_score_answer_fn(truth["name"])
    return float(score(answer, truth["entry"]))
