"""The latent cache: what decoding keeps of every token, in pages.

MLA caches the key-value latent and one rotated key per token and layer, shared by all heads. A
sequence's tokens fill pages of ``page_tokens``; only its last page can hold unused room. Sequences
that begin alike share pages, and a shared page is copied before one of them writes into it.

Source: DeepSeek-V2, arXiv:2405.04434, Sec. 2.1 (what is cached); PagedAttention, arXiv:2309.06180.

Axes: T new tokens, G pages, P tokens of a page, R latent width, W = R + rotating width.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moonlit.models.segments import Segments
from moonlit.models.shapes import DecoderShape

PAGE_TOKENS = 64  # measured: 16 to 64 cost the same up to 128 tokens, 64 half of 16 at 512


class CacheFullError(RuntimeError):
    """No page is left."""


@dataclass(slots=True, eq=False)
class CachedSequence:
    """The pages of one sequence, in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class LatentCache:
    """Latents of any number of sequences, written by the model, layer by layer.

    Document i of a packed row continues ``selected[i]``.

    Args:
        shape: the decoder's numbers.
        max_tokens: room at most, rounded up to whole pages; None: as much as is asked for.
        page_tokens: tokens of a page.
        dtype: of the storage; the model's.
        device: of the storage; the model's.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        max_tokens: int | None = None,
        page_tokens: int = PAGE_TOKENS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        width = shape.kv_lora_rank + shape.qk_rope_width
        self.page_tokens = page_tokens
        self.max_pages = None if max_tokens is None else -(-max_tokens // page_tokens)
        self.storage: list[Float[Tensor, "G P W"]] = [
            torch.zeros(0, page_tokens, width, dtype=dtype, device=device)
            for _ in range(shape.num_layers)
        ]
        self.holders_of_page: list[int] = []
        self.free_pages: list[int] = []  # a heap: low pages first, so that those in use lie close
        self.selected: list[CachedSequence] = []

    @property
    def num_pages(self) -> int:
        """Pages there is storage for."""
        return len(self.holders_of_page)

    @property
    def num_pages_in_use(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - len(self.free_pages)

    @property
    def num_pages_left(self) -> int | None:
        """Pages that can still be taken; None: no limit."""
        return None if self.max_pages is None else self.max_pages - self.num_pages_in_use

    def select(self, sequences: Sequence[CachedSequence]) -> None:
        """Name the sequences that the next rows continue, in the order of their documents."""
        if len({id(sequence) for sequence in sequences}) != len(sequences):
            raise ValueError("a sequence was selected twice: a row continues each at most once")
        self.selected = list(sequences)

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Return a sequence that begins like this one and shares its pages."""
        for page in sequence.pages:
            self.holders_of_page[page] += 1
        return CachedSequence(list(sequence.pages), sequence.length)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget a sequence's tokens from ``length`` on, and the room behind them."""
        if len(sequence.pages) * self.page_tokens - length < self.page_tokens:
            sequence.length = min(length, sequence.length)
            return
        kept = -(-length // self.page_tokens)
        for page in sequence.pages[kept:]:
            self._drop(page)
        del sequence.pages[kept:]
        sequence.length = min(length, sequence.length)

    def release(self, sequence: CachedSequence) -> None:
        """Forget a whole sequence; pages that nobody else holds are free."""
        self.truncate(sequence, 0)

    def num_new_pages(self, sequence: CachedSequence, num_tokens: int) -> int:
        """Pages that must be taken before ``num_tokens`` more can be written."""
        whole = -(-(sequence.length + num_tokens) // self.page_tokens)
        return whole - len(sequence.pages) + self._writes_into_shared_page(sequence)

    def reserve(self, segments: Segments) -> Int[Tensor, " T"]:
        """Make room for a row; return where each of its tokens goes, in tokens of storage.

        Raises:
            ValueError: if the row's documents are not as many as the selected sequences.
            CacheFullError: if there is no room; nothing was taken.
        """
        if len(segments.lengths) != len(self.selected):
            raise ValueError(
                f"the row has {len(segments.lengths)} documents but"
                f" {len(self.selected)} sequences of the cache are selected"
            )
        pairs = list(zip(self.selected, segments.lengths, strict=True))
        missing = [self.num_new_pages(*pair) for pair in pairs]
        self._require_pages(sum(missing))
        slots: list[int] = []
        taken: list[int] = []
        for (sequence, new), num_pages in zip(pairs, missing, strict=True):
            if num_pages and self._writes_into_shared_page(sequence):
                self._unshare_last_page(sequence)
            while len(sequence.pages) * self.page_tokens < sequence.length + new:
                taken.append(self._take())
                sequence.pages.append(taken[-1])
            slots += self._slots(sequence, new)
        self._clear(taken)
        return torch.tensor(slots, device=self.storage[0].device)

    def advance(self, segments: Segments) -> None:
        """Count a row's tokens as held, once all layers have written theirs."""
        for sequence, new in zip(self.selected, segments.lengths, strict=True):
            sequence.length += new

    def write(
        self, layer: int, slot_of_token: Int[Tensor, " T"], latents: Float[Tensor, "T W"]
    ) -> None:
        """Store one layer's latents of a row."""
        storage = self.storage[layer].view(-1, latents.shape[-1])
        storage.index_copy_(0, slot_of_token, latents.to(storage.dtype))

    def history(
        self, layer: int, sequence: CachedSequence, length: int
    ) -> Float[Tensor, "tokens W"]:
        """Return a copy of a sequence's first ``length`` latents."""
        storage = self.storage[layer]
        pages = torch.tensor(sequence.pages[: -(-length // self.page_tokens)])
        return storage[pages.to(storage.device)].flatten(0, 1)[:length]

    def _slots(self, sequence: CachedSequence, new: int) -> list[int]:
        size = self.page_tokens
        if new == 1:
            return [sequence.pages[-1] * size + sequence.length % size]
        return [
            sequence.pages[place // size] * size + place % size
            for place in range(sequence.length, sequence.length + new)
        ]

    def _writes_into_shared_page(self, sequence: CachedSequence) -> bool:
        is_partial = sequence.length < len(sequence.pages) * self.page_tokens
        return is_partial and self.holders_of_page[sequence.pages[-1]] > 1

    def _unshare_last_page(self, sequence: CachedSequence) -> None:
        shared, own = sequence.pages[-1], self._take()
        for storage in self.storage:
            storage[own] = storage[shared]
        self._drop(shared)
        sequence.pages[-1] = own

    def _require_pages(self, num_pages: int) -> None:
        if self.num_pages_left is not None and num_pages > self.num_pages_left:
            raise CacheFullError(
                f"the latent cache has {self.num_pages_left} of {self.max_pages} pages left,"
                f" but {num_pages} are needed"
            )
        while len(self.free_pages) < num_pages:
            self._grow(num_pages - len(self.free_pages))

    def _grow(self, missing: int) -> None:
        first = self.num_pages
        added = max(missing, first, 16)
        if self.max_pages is not None:
            added = min(added, self.max_pages - first)
        self.storage = [
            torch.cat([pages, pages.new_zeros(added, *pages.shape[1:])]) for pages in self.storage
        ]
        self.holders_of_page += [0] * added
        self.free_pages += range(first, first + added)
        heapq.heapify(self.free_pages)

    def _take(self) -> int:
        page = heapq.heappop(self.free_pages)
        self.holders_of_page[page] = 1
        return page

    def _clear(self, pages: list[int]) -> None:
        """Zero pages before use: a nan that another sequence left would survive any mask."""
        if pages:
            index = torch.tensor(pages, device=self.storage[0].device)
            for storage in self.storage:
                storage.index_fill_(0, index, 0.0)

    def _drop(self, page: int) -> None:
        self.holders_of_page[page] -= 1
        if self.holders_of_page[page] == 0:
            heapq.heappush(self.free_pages, page)
