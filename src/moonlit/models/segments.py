"""Where the segments of a packed row lie, and which of them continue another.

A segment is a document (decoder) or a visual item (encoder).

Axes: T tokens of all segments, S segments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from jaxtyping import Int
from torch import Tensor

BRANCH_TOKENS = 256
"""Branches that one score matrix holds: each scores all, most of which the mask drops."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring segments of one length that continue nobody."""

    length: int
    count: int

    @property
    def num_tokens(self) -> int:
        """Of all segments."""
        return self.length * self.count


@dataclass(frozen=True, slots=True)
class Branches:
    """Neighbouring segments that continue one prefix: each sees all of it, none another branch."""

    lengths: tuple[int, ...]
    prefix: tuple[int, int]
    """First token of the prefix, and the one behind its last."""

    @property
    def num_tokens(self) -> int:
        """Of all branches, without the prefix."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths of the segments of one packed row, on the host."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    """The segment that each continues, -1: none. A prefix stands right before its branches and
    continues nobody itself. Empty: there are none."""

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Int[Tensor, " S_plus_1"],
        num_tokens: int,
        prefix_of_document: Int[Tensor, " S"] | None = None,
    ) -> "Segments":
        """Read the boundaries; on CUDA this waits for the device, once a forward.

        Raises:
            ValueError: if the boundaries do not rise from 0 to ``num_tokens``, or a prefix does not
                stand right before those who continue it.
        """
        bounds = cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 1:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the row's {num_tokens} tokens, got {bounds}"
            )
        if prefix_of_document is None:
            return cls(lengths)
        prefixes = tuple(prefix_of_document.tolist())
        is_in_place = len(prefixes) == len(lengths) and all(
            prefix == -1
            or (prefix == place - 1 and prefixes[prefix] == -1)
            or (0 <= prefix < place - 1 and prefixes[place - 1] == prefix)
            for place, prefix in enumerate(prefixes)
        )
        if not is_in_place:
            raise ValueError(
                f"prefixes {list(prefixes)} of {len(lengths)} documents: each must name the one"
                " right before those who continue it, or -1"
            )
        return cls(lengths, prefixes)

    @property
    def prefix_of_each(self) -> tuple[int, ...]:
        """``prefixes``, written out where there are none."""
        return self.prefixes or (-1,) * len(self.lengths)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First token of each segment, and the one behind its last."""
        return list(pairwise(accumulate(self.lengths, initial=0)))

    @property
    def seen(self) -> list[list[int]]:
        """Tokens that the last of each segment sees: its prefix and its own."""
        bounds = self.bounds
        return [
            [*(range(*bounds[prefix]) if prefix >= 0 else ()), *range(*own)]
            for prefix, own in zip(self.prefix_of_each, bounds, strict=True)
        ]

    @property
    def parts(self) -> list[Run | Branches]:
        """Neighbours that can be attended to together, in order."""
        parts: list[Run | Branches] = []
        bounds = self.bounds
        pairs = zip(self.prefix_of_each, self.lengths, strict=True)
        for prefix, some in groupby(pairs, key=lambda pair: pair[0]):
            lengths = [length for _, length in some]
            if prefix == -1:
                parts += [Run(length, len(list(same))) for length, same in groupby(lengths)]
            else:
                parts += [Branches(some, bounds[prefix]) for some in chunks(lengths, BRANCH_TOKENS)]
        return parts

    def segment_of_token(self, device: torch.device) -> Int[Tensor, " T"]:
        """Index of the segment that each token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))


def chunks(lengths: Sequence[int], max_total: int) -> Iterator[tuple[int, ...]]:
    """Cut a list of lengths where a chunk would sum to more; a longer one stands alone."""
    chunk: list[int] = []
    for length in lengths:
        if chunk and sum(chunk) + length > max_total:
            yield tuple(chunk)
            chunk = []
        chunk.append(length)
    yield tuple(chunk)
