"""Rollouts to rows: everything stands at the token that predicts, and only sampled tokens train."""

import pytest
import torch

from moonlit.batch import Group, PackedMedia, Segment, Task, Trajectory
from moonlit.rl.packing import pack
from moonlit.rl.trained_segments import TrainedSegment, trained_segments

TASK = Task(prompt=[], domain="d", environment="e", answer=1)


def segment(ids: list[int], sampled_from: int, version: int = 5, **more) -> Segment:
    is_sampled = [place >= sampled_from for place in range(len(ids))]
    return Segment(
        input_ids=ids,
        is_sampled=is_sampled,
        behavior_logprobs=[-i / 10 if s else 0.0 for i, s in zip(ids, is_sampled, strict=True)],
        policy_versions=[version if s else -1 for s in is_sampled],
        **more,
    )


def rollout(reward: float, *segments: Segment, error: str | None = None) -> Trajectory:
    return Trajectory(
        segments=list(segments),
        messages=[],
        spans=[],
        stop_reason="answer",
        reward=reward,
        error=error,
    )


def trained(*trajectories: Trajectory, **settings) -> list[TrainedSegment]:
    settings = {"version": 5, "max_token_staleness": None, "normalise": False, **settings}
    return trained_segments([Group(task=TASK, trajectories=list(trajectories))], **settings)


def test_a_row_by_hand():
    one, two = segment([7, 8, 9, 4], 2), segment([3, 6], 1)

    (row,) = pack(
        trained(rollout(1.0, one), rollout(0.0, two)), row_tokens=10, num_rows=None, filler_id=0
    )

    assert row.input_ids.tolist() == [7, 8, 9, 4, 3, 6]
    assert row.target_ids.tolist() == [8, 9, 4, 0, 6, 0]
    assert row.loss_mask.tolist() == [False, True, True, False, True, False]
    assert row.behavior_logprobs.tolist() == pytest.approx([0, -0.9, -0.4, 0, -0.6, 0])
    assert row.advantages.tolist() == [0.5, 0.5, 0.5, 0.5, -0.5, -0.5]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 4, 6]
    assert row.media is None


def test_rollouts_that_were_lost_are_no_part_of_the_baseline():
    some = trained(
        rollout(1.0, segment([1, 2], 1)),
        rollout(0.0, segment([1, 3], 1)),
        rollout(0.0, error="a crash"),
    )
    assert [one.advantage for one in some] == [0.5, -0.5]


def test_stale_tokens_are_context_where_asked():
    old_and_new = Segment(
        input_ids=[1, 2, 3, 4],
        is_sampled=[False, True, True, True],
        behavior_logprobs=[0.0, -1.0, -1.0, -1.0],
        policy_versions=[-1, 3, 4, 5],
    )
    group = rollout(1.0, old_and_new), rollout(0.0, segment([1, 2], 1))

    assert trained(*group)[0].is_trained == [False, True, True, True]
    assert trained(*group, max_token_staleness=1)[0].is_trained == [False, False, True, True]
    assert trained(*group, max_token_staleness=0)[0].is_trained == [False, False, False, True]


def test_no_segment_is_cut_and_no_row_is_longer_than_it_must_be():
    lengths = [9, 3, 4, 5, 2, 14]
    segments = trained(*(rollout(float(n), segment(list(range(n)), 1)) for n in lengths))

    rows = pack(segments, row_tokens=10, num_rows=None, filler_id=0)

    assert sorted(n for row in rows for n in row.cu_seqlens.diff().tolist()) == sorted(lengths)
    assert [row.num_tokens for row in rows] == [14, 9, 9, 5]


def test_empty_rows_fill_up_to_what_other_ranks_have():
    rows = pack([], row_tokens=10, num_rows=3, filler_id=42)

    assert [row.input_ids.tolist() for row in rows] == [[42]] * 3
    assert not any(row.loss_mask.any() for row in rows)
    assert all(row.behavior_logprobs is not None for row in rows)


def test_pictures_follow_the_order_of_the_segments():
    def picture(value: int) -> PackedMedia:
        return PackedMedia(
            pixel_values=torch.full((4, 3, 14, 14), value, dtype=torch.uint8),
            grid_thw=torch.tensor([[1, 2, 2]]),
        )

    short = rollout(0.0, segment([9, 1], 1, media=picture(1)))
    long = rollout(1.0, segment([9, 1, 1], 1, media=picture(2)))

    (row,) = pack(trained(short, long), row_tokens=10, num_rows=None, filler_id=0)

    assert row.cu_seqlens.tolist() == [0, 3, 5]  # the longer one first
    assert row.media is not None
    assert row.media.pixel_values[:, 0, 0, 0].tolist() == [2] * 4 + [1] * 4
