"""Tasks of reasoning-gym: its own verifiers."""

import warnings
from typing import Any


def reasoning_gym(answer: str, truth: dict[str, Any]) -> float:
    """Return the score of the dataset's own verifier.

    Args:
        answer: the words.
        truth: ``name`` of the dataset and its ``entry``.
    """
    score: Any = library().get_score_answer_fn(truth["name"])
    return float(score(answer, truth["entry"]))


def library() -> Any:
    """Return the package; what Python says of the source of its ``cellpylib`` is left unsaid."""
    warnings.filterwarnings(
        "ignore", '"is" with a literal', category=SyntaxWarning, module=r".*[/\\]cellpylib[/\\]"
    )
    import reasoning_gym

    return reasoning_gym
