"""Segments that begin with one prompt, side by side: it is computed once for all of them.

K answers to a question about a picture train on K + 1 documents instead of K copies of the
question: the prompt, and a branch for each answer, which sees the prompt and itself. Losses and
gradients are those of K copies; only the routers' statistics count the prompt once.

Source: none, it is ours; the objective whose gradients they are is the report's Sec. 2.3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moonlit.batch import PackedMedia, Segment
from moonlit.rl.engines.prompt import Prompt
from moonlit.rl.trained_segments import TrainedSegment

MIN_SAVED = 1 / 3
"""Of all tokens of a bundle: below that its masked attention costs what the prompts would have."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What a segment may share: its prompt but for the last token.

    That one stays with the answer, for each draws a first token of its own from its output.
    """

    num_tokens: int
    """0: nothing can be shared."""
    media: PackedMedia | None = None
    later_media: PackedMedia | None = None
    """Items behind it, such as those that a tool returned."""

    @classmethod
    def of(cls, segment: Segment, media_pad_id: int) -> "Prefix":
        """Find where a segment's first answer begins."""
        num_tokens = segment.is_sampled.index(True) - 1 if any(segment.is_sampled) else 0
        if num_tokens < 1:
            return cls(0)
        if segment.media is None:
            return cls(num_tokens)
        prompt = Prompt(segment.input_ids, segment.media, media_pad_id)
        later, num_skipped = prompt.media_from(num_tokens)
        if num_skipped:  # an item lies on both sides
            return cls(0)
        if later is None:
            return cls(num_tokens, segment.media)
        num_items = len(segment.media.grid_thw) - len(later.grid_thw)
        num_patches = len(segment.media.pixel_values) - len(later.pixel_values)
        first = PackedMedia(
            pixel_values=segment.media.pixel_values[:num_patches],
            grid_thw=segment.media.grid_thw[:num_items],
        )
        return cls(num_tokens, first if num_items else None, later)


Member = tuple[TrainedSegment, PackedMedia | None]
"""A segment, and its items behind what it shares."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Segments of a row that share their prefix, or a lone one that shares nothing."""

    prefix: Prefix
    members: tuple[Member, ...]

    @classmethod
    def alone(cls, one: TrainedSegment) -> "Bundle":
        """Return a bundle of one segment as it stands."""
        return cls(Prefix(0), ((one, one.segment.media),))

    @property
    def num_tokens(self) -> int:
        """Length in a row."""
        num_shared = self.prefix.num_tokens
        return num_shared + sum(len(one.segment.input_ids) - num_shared for one, _ in self.members)

    @property
    def fraction_saved(self) -> float:
        """Of the tokens that its segments have one by one."""
        return 1 - self.num_tokens / sum(len(one.segment.input_ids) for one, _ in self.members)


def bundles_of(
    segments: Sequence[TrainedSegment], *, row_tokens: int, media_pad_id: int
) -> list[Bundle]:
    """Gather segments of equal prefixes, at most as many as a row has room for.

    Args:
        segments: of any groups.
        row_tokens: of a row [tokens].
        media_pad_id: of the placeholder tokens.
    """
    alone: list[Bundle] = []
    alike: dict[tuple[int, ...], list[tuple[Prefix, list[Member]]]] = {}  # by ids, then pictures
    for one in segments:
        prefix = Prefix.of(one.segment, media_pad_id)
        if not prefix.num_tokens:
            alone.append(Bundle.alone(one))
            continue
        others = alike.setdefault(tuple(one.segment.input_ids[: prefix.num_tokens]), [])
        same = next((them for seen, them in others if is_same(seen.media, prefix.media)), None)
        if same is None:
            same = []
            others.append((prefix, same))
        same.append((one, prefix.later_media))
    gathered = [Bundle(prefix, tuple(same)) for others in alike.values() for prefix, same in others]
    return alone + [part for bundle in gathered for part in cut(bundle, row_tokens)]


def cut(bundle: Bundle, row_tokens: int) -> Iterator[Bundle]:
    """Cut a bundle into ones that fit in a row; who would share too little stands alone."""
    left = bundle.members
    while left:
        part = replace(bundle, members=left[:1])
        for end in range(2, len(left) + 1):
            longer = replace(bundle, members=left[:end])
            if longer.num_tokens > row_tokens:
                break
            part = longer
        left = left[len(part.members) :]
        if len(part.members) > 1 and part.fraction_saved >= MIN_SAVED:
            yield part
        else:
            yield from (Bundle.alone(one) for one, _ in part.members)


def is_same(one: PackedMedia | None, other: PackedMedia | None) -> bool:
    """Whether two prompts show the same."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.grid_thw, other.grid_thw) and torch.equal(
        one.pixel_values, other.pixel_values
    )
