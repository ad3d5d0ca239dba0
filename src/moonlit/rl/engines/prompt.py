"""A prompt as an engine sees it: ids, media, and what of it another sequence already computed.

Axes: T tokens of a prompt, P patches, N visual items.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
from jaxtyping import Float
from torch import Tensor

from moonlit.batch import PackedMedia
from moonlit.models.cache import CachedSequence
from moonlit.models.shapes import DecoderShape, EncoderShape
from moonlit.rl.engines.base import Request


@dataclass
class Prompt:
    """Token ids with their media; comparable by content."""

    ids: list[int]
    media: PackedMedia | None
    media_pad_id: int

    @cached_property
    def grids(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of each item."""
        return [] if self.media is None else [(t, h, w) for t, h, w in self.media.grid_thw.tolist()]

    @cached_property
    def digests(self) -> list[bytes]:
        """A name for each item's content."""
        if self.media is None:
            return []
        items = self.media.pixel_values.split([t * h * w for t, h, w in self.grids])
        return [
            hashlib.blake2b(
                repr(grid).encode() + item.cpu().numpy().tobytes(), digest_size=16
            ).digest()
            for grid, item in zip(self.grids, items, strict=True)
        ]

    @cached_property
    def placeholders(self) -> list[int]:
        """Where the placeholder tokens are."""
        return [place for place, token_id in enumerate(self.ids) if token_id == self.media_pad_id]

    @cached_property
    def ends_of_items(self) -> list[int]:
        """How many placeholders the items take, up to and with each."""
        return list(accumulate(h * w // 4 for _, h, w in self.grids))

    @cached_property
    def key(self) -> bytes:
        """Equal for prompts that are the same."""
        ids = np.array(self.ids, dtype=np.int64).tobytes()
        return hashlib.blake2b(ids + b"".join(self.digests), digest_size=16).digest()

    def num_common(self, other: "Prompt") -> int:
        """How many tokens both begin with: up to the first other id, or an id of another item."""
        pairs = zip(self.ids, other.ids, strict=False)
        common = next(
            (place for place, (mine, theirs) in enumerate(pairs) if mine != theirs),
            min(len(self.ids), len(other.ids)),
        )
        starts = [0, *self.ends_of_items]
        for item, digest in enumerate(self.digests):
            if other.digests[item : item + 1] != [digest]:
                return min(common, self.placeholders[starts[item]])
        return common

    def media_from(self, first: int) -> tuple[PackedMedia | None, int]:
        """Return the items with a placeholder at ``first`` or later.

        Also how many features of the first of them belong to tokens before.
        """
        num_before = sum(place < first for place in self.placeholders)
        if self.media is None or num_before == len(self.placeholders):
            return None, 0
        item = next(i for i, end in enumerate(self.ends_of_items) if end > num_before)
        first_patch = sum(t * h * w for t, h, w in self.grids[:item])
        starts = [0, *self.ends_of_items]
        media = PackedMedia(
            pixel_values=self.media.pixel_values[first_patch:],
            grid_thw=self.media.grid_thw[item:],
        )
        return media, num_before - starts[item]


@dataclass(slots=True, eq=False)
class Session:
    """A dialogue whose latents stay between its requests; one request at a time.

    A request's prompt may go on from the last one in any way: what both begin with is not computed
    again.
    """

    prompt: Prompt | None = None
    """What ``sequence`` holds, the last sampled token excepted."""
    sequence: CachedSequence | None = None
    is_busy: bool = False
    is_closed: bool = False


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """A computed prompt that requests start from."""

    sequence: CachedSequence
    next_logits_V: Float[Tensor, " V"] = field(repr=False)
    """Of the token behind the prompt."""


def require_fit(
    request: Request,
    decoder: DecoderShape,
    vision: EncoderShape | None,
    *,
    max_tokens: int | None,
    always_banned: frozenset[int],
) -> None:
    """Refuse a request that cannot be served.

    Raises:
        ValueError: names what is wrong, what was got and what is allowed.
    """
    ids, sampling = request.input_ids, request.sampling
    if not ids:
        raise ValueError("the prompt is empty: want at least one token id")
    if len(ids) >= decoder.max_positions:
        raise ValueError(
            f"the prompt has {len(ids)} tokens: the model has {decoder.max_positions} positions,"
            " and one is needed for an answer"
        )
    if max_tokens is not None and len(ids) + sampling.max_new_tokens > max_tokens:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} do not"
            f" fit the cache: max_cache_tokens={max_tokens}"
        )
    outside = [i for i in ids if not 0 <= i < decoder.vocab_size]
    if outside:
        raise ValueError(
            f"the prompt holds id {outside[0]}: the vocabulary has {decoder.vocab_size} ids"
        )
    if sampling.banned_ids and sampling.banned_ids | always_banned >= set(
        range(decoder.vocab_size)
    ):
        raise ValueError("banned_ids leave no token to sample")
    require_media(request, decoder.media_pad_id, vision)


def require_media(request: Request, media_pad_id: int, vision: EncoderShape | None) -> None:
    """Refuse media that do not belong to the placeholders, or that the encoder cannot take."""
    num_placeholders = sum(i == media_pad_id for i in request.input_ids)
    media = request.media
    if media is not None and vision is None:
        raise ValueError("the prompt has media but this model has no encoder")
    num_features = 0 if media is None else media.num_tokens
    if num_placeholders != num_features:
        raise ValueError(
            f"the prompt has {num_placeholders} media placeholder tokens but its"
            f" {0 if media is None else len(media.grid_thw)} items make {num_features}"
        )
    if media is None or vision is None:
        return
    for t, h, w in media.grid_thw.tolist():
        if not 1 <= t <= vision.max_frames or min(h, w) < 1 or h % vision.merge or w % vision.merge:
            raise ValueError(
                f"an item of the prompt has grid {(t, h, w)}: want 1 to {vision.max_frames} frames"
                f" and sides that are positive multiples of {vision.merge}"
            )
    num_patches = int(media.grid_thw.prod(dim=1).sum())
    if num_patches != len(media.pixel_values):
        raise ValueError(
            f"the prompt has {len(media.pixel_values)} patches but its grids say {num_patches}"
        )
