import math

import torch

from moonlit.batch import Segment, Trajectory
from moonlit.phases.held_out import HeldOut, answer_numbers
from moonlit.phases.held_out_rewards import HeldOutRewards
from moonlit.results import held_out_table

F, T = False, True


def test_answers_are_runs_of_masked_tokens_inside_one_document():
    # documents [0, 4), [4, 9): answers at 1-2, 3 ends at the boundary, 4 begins anew, 7
    mask = torch.tensor([F, T, F, T, T, T, F, T, F])
    numbers = answer_numbers(mask, torch.tensor([0, 4, 9]))
    assert numbers[mask].tolist() == [0, 1, 2, 2, 3]


def test_an_answer_with_one_wrong_token_is_wrong():
    held_out = HeldOut()
    mask = torch.tensor([F, T, T, F, T, F, T])
    is_top1 = torch.tensor([F, T, F, F, T, T, T])
    logprobs = torch.tensor([-9.0, -1.0, -2.0, -9.0, -0.5, -9.0, -0.25])

    held_out.add("count", logprobs, is_top1, mask, torch.tensor([0, 7]))

    assert held_out.metrics() == {
        "held_out/count/nll_per_token": 3.75 / 4,
        "held_out/count/accuracy": 2 / 3,
    }


def test_rows_add_up_and_a_row_without_answers_counts_nothing():
    held_out = HeldOut()
    empty = (torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    held_out.add("count", *empty, torch.tensor([0, 3]))
    assert math.isnan(held_out.scores["count"].accuracy)
    full = (torch.tensor([-1.0]), torch.tensor([T]), torch.tensor([T]))
    for _ in range(2):
        held_out.add("count", *full, torch.tensor([0, 1]))
    assert (held_out.scores["count"].num_answers, held_out.scores["count"].accuracy) == (2, 1.0)


def answer(reward: float, num_tokens: int, error: str | None = None) -> Trajectory:
    segment = Segment(
        input_ids=[1] * num_tokens,
        is_sampled=[True] * num_tokens,
        behavior_logprobs=[0.0] * num_tokens,
        policy_versions=[0] * num_tokens,
    )
    return Trajectory(
        segments=[segment], messages=[], spans=[], stop_reason="answer", reward=reward, error=error
    )


def test_scores_by_generation_are_means_over_what_was_judged_on_all_ranks():
    """Catches: an answer that no verifier could judge as a wrong one."""
    held_out = HeldOutRewards()
    held_out.add("count", [answer(1.0, 4), answer(0.0, 9, error="lost")])
    held_out.add("count", [answer(0.5, 2)])
    held_out.add("none", [answer(1.0, 3, error="lost")])

    held_out.sum_over_ranks(lambda sums: 2 * sums)

    told = held_out.metrics()
    assert {name: told.pop(f"held_out/count/{name}") for name in
            ("reward", "solved", "tokens_per_answer", "errors")} == {
        "reward": 0.75, "solved": 0.5, "tokens_per_answer": 3.0, "errors": 2.0,
    }  # fmt: skip
    assert told.pop("held_out/none/errors") == 2.0
    assert len(told) == 3
    assert all(math.isnan(value) for value in told.values())


def test_what_is_watched_of_a_swarm_is_told_beside_the_reward():
    held_out = HeldOutRewards(("critical_steps", "parallelism"))
    some = [answer(1.0, 4), answer(0.0, 4), answer(0.0, 9, error="lost")]
    for one, steps in zip(some, (5.0, 8.0, 99.0), strict=True):
        one.metrics |= {"critical_steps": steps, "parallelism": 2.0}
    held_out.add("facts", some)
    held_out.sum_over_ranks(lambda sums: 2 * sums)

    assert held_out.metrics()["held_out/facts/critical_steps"] == 6.5
    assert held_out.metrics()["held_out/facts/parallelism"] == 2.0
    table = held_out_table(held_out, {})
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert (cells["critical steps"], cells["parallelism"]) == (["6.50"], ["2.00"])
