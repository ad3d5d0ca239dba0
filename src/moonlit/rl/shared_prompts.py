"""Segments that begin with one prompt, side by side: it is computed once for all of them.

K answers to a question about a picture train on K + 1 documents instead of K copies of the
question: the prompt, and a branch for each answer, which sees the prompt and itself. Losses and
gradients are those of K copies; only the routers' statistics count the prompt once.
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
class Opening:
    """What a segment may share: its prompt but for the last token.

    That one stays with the answer, for each draws a first token of its own from its output.
    """

    num_tokens: int
    """0: nothing can be shared."""
    media: PackedMedia | None = None
    later_media: PackedMedia | None = None
    """Items behind it, such as those that a tool returned."""

    @classmethod
    def of(cls, segment: Segment, media_pad_id: int) -> "Opening":
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


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Segments of a row that share their opening, or a lone one that shares nothing."""

    opening: Opening
    segments: tuple[TrainedSegment, ...]
    later_media: tuple[PackedMedia | None, ...]
    """Of each segment, behind the opening."""

    @classmethod
    def alone(cls, one: TrainedSegment) -> "Bundle":
        """Return a bundle of one segment as it stands."""
        return cls(Opening(0), (one,), (one.segment.media,))

    @property
    def num_tokens(self) -> int:
        """Length in a row."""
        shared = self.opening.num_tokens
        return shared + sum(len(one.segment.input_ids) - shared for one in self.segments)

    @property
    def fraction_saved(self) -> float:
        """Of the tokens that its segments have one by one."""
        return 1 - self.num_tokens / sum(len(one.segment.input_ids) for one in self.segments)


def bundles_of(
    segments: Sequence[TrainedSegment], *, row_tokens: int, media_pad_id: int
) -> list[Bundle]:
    """Gather segments of equal openings, at most as many as a row has room for.

    Args:
        segments: of any groups.
        row_tokens: of a row [tokens].
        media_pad_id: of the placeholder tokens.
    """
    alone: list[Bundle] = []
    alike: dict[tuple[int, ...], list[Bundle]] = {}  # one for each content of their pictures
    for one in segments:
        opening = Opening.of(one.segment, media_pad_id)
        if not opening.num_tokens:
            alone.append(Bundle.alone(one))
            continue
        others = alike.setdefault(tuple(one.segment.input_ids[: opening.num_tokens]), [])
        own = Bundle(opening, (one,), (opening.later_media,))
        for place, other in enumerate(others):
            if is_same(other.opening.media, opening.media):
                others[place] = replace(
                    other,
                    segments=(*other.segments, one),
                    later_media=(*other.later_media, opening.later_media),
                )
                break
        else:
            others.append(own)
    gathered = [bundle for others in alike.values() for bundle in others]
    return alone + [part for bundle in gathered for part in cut(bundle, row_tokens)]


def cut(bundle: Bundle, row_tokens: int) -> Iterator[Bundle]:
    """Cut a bundle into ones that fit in a row; who would share too little stands alone."""
    pairs = list(zip(bundle.segments, bundle.later_media, strict=True))
    while pairs:
        taken = 1
        while taken < len(pairs) and taking(bundle, pairs[: taken + 1]).num_tokens <= row_tokens:
            taken += 1
        some, pairs = pairs[:taken], pairs[taken:]
        part = taking(bundle, some)
        if taken > 1 and part.fraction_saved >= MIN_SAVED:
            yield part
        else:
            yield from (Bundle.alone(one) for one, _ in some)


def taking(bundle: Bundle, pairs: Sequence[tuple[TrainedSegment, PackedMedia | None]]) -> Bundle:
    """Return a bundle of some of its segments."""
    return replace(
        bundle,
        segments=tuple(one for one, _ in pairs),
        later_media=tuple(media for _, media in pairs),
    )


def is_same(one: PackedMedia | None, other: PackedMedia | None) -> bool:
    """Whether two prompts show the same."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.grid_thw, other.grid_thw) and torch.equal(
        one.pixel_values, other.pixel_values
    )
