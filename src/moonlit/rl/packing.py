"""Segments of rollouts to the packed rows of optimizer steps.

Axes: T tokens of a row, S documents in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from moonlit.batch import PackedBatch, PackedMedia, Segment
from moonlit.rl.shared_prompts import Bundle, bundles_of
from moonlit.rl.trained_segments import TrainedSegment

Value = TypeVar("Value")


def pack(
    segments: Sequence[TrainedSegment],
    *,
    row_tokens: int,
    num_rows: int | None,
    filler_id: int,
    media_pad_id: int | None = None,
) -> list[PackedBatch]:
    """Lay segments end to end in rows: the longest first, each where there is room.

    Args:
        segments: none is cut; one longer than a row has a row of its own.
        row_tokens: of a row [tokens].
        num_rows: at least so many, the last ones empty; None: as many as are filled, at least one.
        filler_id: the one untrained token of an empty row.
        media_pad_id: of the placeholder tokens: segments of one prompt then share it. None: each
            stands with its own.
    """
    if media_pad_id is None:
        bundles = [Bundle.alone(one) for one in segments]
    else:
        bundles = bundles_of(segments, row_tokens=row_tokens, media_pad_id=media_pad_id)
    rows: list[list[Bundle]] = []
    room: list[int] = []
    for bundle in sorted(bundles, key=lambda bundle: -bundle.num_tokens):
        length = bundle.num_tokens
        place = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[place].append(bundle)
        room[place] -= length
    rows += [[] for _ in range(max(num_rows or 1, 1) - len(rows))]
    return [packed_row(row, filler_id) for row in rows]


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of a segment as they stand in a row."""

    trained: TrainedSegment
    start: int
    end: int
    media: PackedMedia | None
    prefix: int
    """The document of the row that it continues, -1: none."""

    def part(self, values: Sequence[Value]) -> Sequence[Value]:
        """Return its part of what the segment has one of for each token."""
        return values[self.start : self.end]

    def next_part(self, values: Sequence[Value], last: Value) -> Sequence[Value]:
        """Return what belongs to the token behind each."""
        return [*values[1:], last][self.start : self.end]


def documents_of(bundles: Sequence[Bundle]) -> Iterator[Document]:
    """Lay bundles end to end: a prefix, then those who continue it."""
    place = 0
    for bundle in bundles:
        num_shared, continued = bundle.prefix.num_tokens, -1
        if num_shared:
            yield Document(bundle.members[0][0], 0, num_shared, bundle.prefix.media, -1)
            continued, place = place, place + 1
        for one, media in bundle.members:
            yield Document(one, num_shared, len(one.segment.input_ids), media, continued)
            place += 1


def packed_row(bundles: Sequence[Bundle], filler_id: int) -> PackedBatch:
    """Return one row; what belongs to a token's prediction stands at the token before it."""
    if not bundles:
        empty = Segment(
            input_ids=[filler_id],
            is_sampled=[False],
            behavior_logprobs=[0.0],
            policy_versions=[-1],
        )
        bundles = [Bundle.alone(TrainedSegment(empty, 0.0, [False]))]
    documents = list(documents_of(bundles))
    pairs = [(one, one.trained.segment) for one in documents]
    media = [one.media for one in documents if one.media is not None]
    prefixes = [one.prefix for one in documents]
    return PackedBatch(
        input_ids=torch.tensor([i for one, seg in pairs for i in one.part(seg.input_ids)]),
        target_ids=torch.tensor([i for one, seg in pairs for i in one.next_part(seg.input_ids, 0)]),
        position_ids=torch.cat([torch.arange(one.start, one.end) for one in documents]),
        cu_seqlens=torch.tensor([0, *(one.end - one.start for one in documents)])
        .cumsum(0)
        .to(torch.int32),
        prefix_of_document=torch.tensor(prefixes) if max(prefixes) >= 0 else None,
        loss_mask=torch.tensor(
            [t for one in documents for t in one.next_part(one.trained.is_trained, False)]
        ),
        media=PackedMedia(
            pixel_values=torch.cat([some.pixel_values for some in media]),
            grid_thw=torch.cat([some.grid_thw for some in media]),
        )
        if media
        else None,
        behavior_logprobs=torch.tensor(
            [lp for one, seg in pairs for lp in one.next_part(seg.behavior_logprobs, 0.0)]
        ),
        advantages=torch.tensor(
            [one.trained.advantage for one in documents for _ in range(one.start, one.end)],
            dtype=torch.float32,
        ),
    )
