"""Groups of rollouts to the packed rows of optimizer steps.

Axes: T tokens of a row, S segments in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from moonlit.batch import Group, PackedBatch, PackedMedia, Segment
from moonlit.losses.policy_gradient import group_advantages

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TrainedSegment:
    """A segment and what its sampled tokens are worth."""

    segment: Segment
    advantage: float
    is_trained: list[bool]
    """True at sampled tokens that are learnt from."""


def trained_segments(
    groups: Sequence[Group], *, version: int, max_token_staleness: int | None, normalise: bool
) -> list[TrainedSegment]:
    """Give every sampled token of a group the advantage of its rollout.

    Rollouts that their environment lost are no part of the baseline: they say nothing of a policy.

    Args:
        groups: with final rewards.
        version: of the weights that are about to be trained.
        max_token_staleness: tokens sampled more versions ago are context only (k1.5 leaves older
            segments out of the loss); None: all are trained.
        normalise: divide advantages by the group's deviation, as GRPO does and K2.5 does not.
    """
    trained = []
    for group in groups:
        sound = [one for one in group.trajectories if one.error is None]
        advantages = group_advantages([one.reward for one in sound], normalise=normalise)
        for trajectory, advantage in zip(sound, advantages, strict=True):
            for segment in trajectory.segments:
                is_trained = [
                    sampled
                    and (max_token_staleness is None or version - born <= max_token_staleness)
                    for sampled, born in zip(
                        segment.is_sampled, segment.policy_versions, strict=True
                    )
                ]
                trained.append(TrainedSegment(segment, advantage, is_trained))
    return trained


def pack(
    segments: Sequence[TrainedSegment], *, row_tokens: int, num_rows: int | None, filler_id: int
) -> list[PackedBatch]:
    """Lay segments end to end in rows: the longest first, each where there is room.

    Args:
        segments: none is cut; one longer than a row has a row of its own.
        row_tokens: of a row [tokens].
        num_rows: at least so many, the last ones empty; None: as many as are filled, at least one.
        filler_id: the one untrained token of an empty row.
    """
    rows: list[list[TrainedSegment]] = []
    room: list[int] = []
    for one in sorted(segments, key=lambda one: -len(one.segment.input_ids)):
        length = len(one.segment.input_ids)
        place = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[place].append(one)
        room[place] -= length
    rows += [[] for _ in range(max(num_rows or 1, 1) - len(rows))]
    return [packed_row(row, filler_id) for row in rows]


def packed_row(segments: Sequence[TrainedSegment], filler_id: int) -> PackedBatch:
    """Return one row; what belongs to a token's prediction stands at the token before it."""
    if not segments:
        empty = Segment(
            input_ids=[filler_id],
            is_sampled=[False],
            behavior_logprobs=[0.0],
            policy_versions=[-1],
        )
        segments = [TrainedSegment(empty, 0.0, [False])]
    lengths = [len(one.segment.input_ids) for one in segments]
    media = [one.segment.media for one in segments if one.segment.media is not None]
    return PackedBatch(
        input_ids=torch.tensor([i for one in segments for i in one.segment.input_ids]),
        target_ids=torch.tensor([i for one in segments for i in shifted(one.segment.input_ids, 0)]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        loss_mask=torch.tensor([t for one in segments for t in shifted(one.is_trained, False)]),
        media=PackedMedia(
            pixel_values=torch.cat([some.pixel_values for some in media]),
            grid_thw=torch.cat([some.grid_thw for some in media]),
        )
        if media
        else None,
        behavior_logprobs=torch.tensor(
            [lp for one in segments for lp in shifted(one.segment.behavior_logprobs, 0.0)]
        ),
        advantages=torch.tensor(
            [one.advantage for one in segments for _ in one.segment.input_ids],
            dtype=torch.float32,
        ),
    )


def shifted(values: list[Value], last: Value) -> list[Value]:
    """Move every value one place to the front."""
    return [*values[1:], last]
