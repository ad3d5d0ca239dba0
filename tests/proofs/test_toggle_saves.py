"""Toggle shortens answers and keeps what they earn: a policy of a few thousand weights."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from moonlit.batch import Task, Trajectory
from moonlit.models.kimi import Kimi
from moonlit.rl.length_rules import LengthRule, NoRule
from moonlit.rl.toggle import Toggle

sys.path.append(str(Path(__file__).parents[1] / "phases"))

from policy_run import TOKENIZER, build_model, make_phase, run

WORDS = range(40, 48)


class FirstIsEven:
    """An answer is right if its first word is even; how long it is changes nothing."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        (row,) = trajectory.segments
        first = row.input_ids[row.is_sampled.index(True)]
        return {"even": float(first % 2 == 0)}


def few_words() -> Kimi:
    """Eight words and the end of an answer are about as likely; all else never comes."""
    model = build_model()
    end = TOKENIZER.special.im_end_id
    with torch.no_grad():  # a feature that is always on is a bias of every word
        model.language_model.model.embed_tokens.weight[:, 0] = 2.0
        head = model.language_model.lm_head.weight
        head *= 0.2
        head[:, 0] = -8.0
        head[[*WORDS, end], 0] = 0.0
    return model


def trained(length_rule: LengthRule) -> tuple[float, float]:
    """Return tokens an answer, and earnings, of the last iterations."""
    phase = make_phase(length_rule, group_size=8, max_new_tokens=20, row_tokens=512)
    phase.environment.judge = FirstIsEven()  # pyright: ignore[reportAttributeAccessIssue]
    phase.build_model = few_words
    logged = run(phase, max_steps=20)[-6:]
    return tuple(
        sum(one[name] for one in logged) / len(logged)
        for name in ("rl/tokens_per_answer", "rl/earned_mean")
    )  # pyright: ignore[reportReturnType]


@pytest.mark.slow
def test_toggle_takes_a_fifth_of_the_tokens_and_nothing_of_the_accuracy():
    toggle = partial(Toggle, min_accuracy=0.7, percentile=40.0, estimate_iterations=2)

    (tokens, earned), (tokens_toggled, earned_toggled) = map(trained, (NoRule(), toggle(period=3)))

    print(tokens, earned, tokens_toggled, earned_toggled)
    assert tokens_toggled < 0.8 * tokens
    assert earned_toggled > earned - 0.08
