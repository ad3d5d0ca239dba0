"""What travels behind computation gives the same bits as what is waited for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_run import NUM_STEPS, Outcome, SaveAt, exact_model, step_rows, train
from ranks import Ranks
from torch import nn

from moonlit.distributed import gradients
from moonlit.distributed.decoupled_encoder import DecoupledEncoder
from moonlit.distributed.gradients import GradientSum
from moonlit.distributed.look_ahead import LookAhead, same_media


def train_counting(layout: dict[str, Any], **settings: Any) -> tuple[Outcome, int, int]:
    """Train with buckets of few gradients.

    Count the steps whose patches were there already, and those that were encoded already.
    """
    num_early, num_encoded, around = 0, 0, DecoupledEncoder.around

    def counting(self: DecoupledEncoder, microbatches: Any) -> Any:
        nonlocal num_early, num_encoded
        if self.early is not None and same_media(self.early.microbatches, microbatches):
            num_early += 1
            num_encoded += self.early.encoded is not None
        return around(self, microbatches)

    bucket_bytes = gradients.BUCKET_BYTES
    gradients.BUCKET_BYTES, DecoupledEncoder.around = 5_000, counting
    try:
        outcome = train(layout, dtype=torch.float32, **settings)
        return outcome, num_early, num_encoded
    finally:
        gradients.BUCKET_BYTES, DecoupledEncoder.around = bucket_bytes, around


def assert_bits(ours: Outcome, theirs: Outcome) -> None:
    assert ours.metrics == theirs.metrics
    for name, expected in theirs.weights.items():
        assert torch.equal(ours.weights[name], expected), name


@pytest.mark.parametrize("recompute", ["always", "never"])
def test_overlap_changes_no_bit(four_ranks: Ranks, recompute: str):
    """Catches: a bucket sent before its last gradient, or early patches of another step."""
    layout = {"recompute": recompute, "zero_stage": 1}
    with_it = four_ranks(train_counting, layout, num_ranks=4)
    without = four_ranks(train_counting, layout | {"overlap": False}, num_ranks=4)

    assert [counts for _, *counts in with_it] == [[NUM_STEPS - 1, 0]] * 4
    assert [counts for _, *counts in without] == [[0, 0]] * 4
    assert_bits(with_it[2][0], without[2][0])


@pytest.mark.parametrize("recompute", ["always", "never"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_encoding_beside_the_update_changes_no_bit(
    two_ranks: Ranks, recompute: str, precision: str
):
    """Catches: old weights of the encoder, or autocast left off in the background."""
    layout, settings = {"recompute": recompute}, {"muon": True, "precision": precision}
    with_it = two_ranks(train_counting, layout, num_ranks=2, **settings)
    without = two_ranks(train_counting, layout | {"overlap": False}, num_ranks=2, **settings)

    assert [counts for _, *counts in with_it] == [[NUM_STEPS - 1, NUM_STEPS - 1]] * 2
    assert [counts for _, *counts in without] == [[0, 0]] * 2
    assert_bits(with_it[1][0], without[1][0])


def test_a_resumed_run_with_overlap_changes_no_bit(two_ranks: Ranks, tmp_path: Path):
    """Saved while the next step's patches are already on the wire."""
    whole = two_ranks(train_saving, tmp_path / "two.ckpt")[1]
    resumed, num_early, _ = two_ranks(
        train_counting, {}, num_ranks=2, resume_from=str(tmp_path / "two.ckpt")
    )[1]

    assert num_early == NUM_STEPS - 3
    assert resumed.metrics == whole.metrics[2:]
    assert_bits(Outcome(whole.gradients, resumed.metrics, whole.weights), resumed)


def train_saving(path: Path) -> Outcome:
    return train_counting({}, num_ranks=2, callbacks=[SaveAt(2, path)])[0]


def test_a_step_is_shown_before_it_is_handed_out_and_none_is_lost():
    rows = [step_rows(step) for step in range(3)]
    ahead = LookAhead(rows, to_device=lambda step: step)

    seen = []
    for number, step in enumerate(ahead):
        seen.append(step)
        if number != 1:
            assert ahead.coming() is (rows[number + 1] if number < 2 else None)
    assert all(a is b for a, b in zip(seen, rows, strict=True))
    assert len(ahead) == 3


def test_a_pass_that_was_broken_off_leaves_nothing_to_the_next_one():
    """Catches: a step that was read ahead and is handed out first when another pass begins."""
    rows = [step_rows(step) for step in range(3)]
    ahead = LookAhead(rows, to_device=lambda step: step)
    next(iter(ahead))
    assert ahead.coming() is rows[1]

    assert [id(step) for step in ahead] == [id(step) for step in rows]


def test_pixels_tell_one_step_from_another():
    rows = step_rows(0)
    assert same_media(rows, list(rows))
    assert not same_media(rows, step_rows(0))  # equal, but not those that were sent
    assert not same_media(rows, rows[:2])


def sent_in_backward() -> tuple[int, int, list[float]]:
    """One backward pass through two of three layers; two gradients a bucket."""
    layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    parameters = list(layers.parameters())
    rank = torch.distributed.get_rank()
    total = GradientSum(parameters, torch.distributed.group.WORLD, bucket_bytes=24)
    with total.behind_backward():
        (layers[2](layers[1](torch.ones(1, 2))).sum() * (rank + 1)).backward()
    before_the_end = len(total.sent)
    total.finish()
    bias: Any = layers[2].bias
    return before_the_end, len(total.buckets), bias.grad.tolist()


def test_buckets_leave_while_the_backward_pass_runs(two_ranks: Ranks):
    """Two of three are complete when it ends; the layer that was not used is sent as zeros."""
    assert two_ranks(sent_in_backward) == [(2, 3, [3.0, 3.0])] * 2


def encoded_by_what() -> list[bool]:
    """Train, move the encoder, encode early: is it by the new weights?"""
    model, rows = exact_model(torch.float32), step_rows(0)[torch.distributed.get_rank() :: 2]
    encoder = DecoupledEncoder(
        model, group=torch.distributed.group.WORLD, holds_rows=True, recompute="always",
        patch_budget=20, overlap=True, coming=lambda: rows,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):  # remembers the casts; Lightning's does not
        with encoder.around(rows) as leaves:
            torch.cat([leaf for leaf in leaves if leaf is not None]).sum().backward()
        with torch.no_grad():
            for parameter in encoder.trained:
                parameter.mul_(1.5)
        encoder.encode_early()
        early = encoder.early
        assert early is not None
        assert early.encoded is not None
        ours, theirs = early.encoded(), encoder.encode(early)
    return [torch.equal(a.features, b.features) for a, b in zip(ours, theirs, strict=True)]


def test_autocast_does_not_keep_the_encoders_old_weights(two_ranks: Ranks):
    for same in two_ranks(encoded_by_what):
        assert same
        assert all(same)
