"""One new token of each sequence against its cached pages, all sequences and pages at once.

Every page is attended to by itself, then the pages of a sequence are combined by their softmax
sums, so that sequences of any lengths form one batch without padding. A page that several sequences
share is read once for all of them.

Source: Flash-Decoding (parts combined by their log-sum-exp); Hydragen, arXiv:2402.05099 (shared
prefixes as one product).

Axes: B sequences, G pages, P tokens of a page, Q sequences that share a page, H heads, W width of a
cached token, R latent width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moonlit.models.cache import CachedSequence, LatentCache

MIN_FRACTION_IN_USE = 0.6
"""Where fewer pages than this are read, they are gathered: reading all in place costs no copy."""


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Pages that are read by equally many sequences each."""

    pages_G: Int[Tensor, " G"] | None
    """Which pages; None: the storage's first G, in place."""
    readers_GQ: Int[Tensor, "G Q"]
    """Who reads each; B where there is nobody."""
    hidden_G1P: Bool[Tensor, "G 1 P"] | None
    """True where a page's token is not its reader's; None: all are."""

    def read(self, storage: Float[Tensor, "pages P W"]) -> Float[Tensor, "G P W"]:
        """Return the pages of one layer."""
        if self.pages_G is None:
            return storage[: len(self.readers_GQ)]
        return storage.index_select(0, self.pages_G)


@dataclass(frozen=True, slots=True)
class PageTable:
    """Who reads which pages in a step of one new token a sequence; the same in every layer."""

    groups: list[PageGroup]

    @classmethod
    def of(cls, cache: LatentCache, sequences: Sequence[CachedSequence]) -> "PageTable":
        """Lay out the reads of a step whose room is reserved but not yet counted as held."""
        readers_of_page: defaultdict[int, list[int]] = defaultdict(list)
        own: dict[int, tuple[int, int]] = {}  # page -> its only reader, how many tokens it has
        for reader, sequence in enumerate(sequences):
            left = sequence.length + 1
            for page in sequence.pages:
                if cache.holders_of_page[page] > 1:
                    readers_of_page[page].append(reader)
                else:
                    own[page] = (reader, min(left, cache.page_tokens))
                left -= cache.page_tokens
        device = cache.storage[0].device
        groups = [own_pages(own, cache, len(sequences), device)] if own else []
        if readers_of_page:
            groups.append(shared_pages(readers_of_page, len(sequences), device))
        return cls(groups)


def own_pages(
    own: dict[int, tuple[int, int]], cache: LatentCache, nobody: int, device: torch.device
) -> PageGroup:
    """Group the pages with one reader; unread ones lie among them where they are few."""
    end = max(own) + 1
    in_place = len(own) >= MIN_FRACTION_IN_USE * end
    pages = range(end) if in_place else sorted(own)
    rows = [own.get(page, (nobody, cache.page_tokens)) for page in pages]
    reader_G, tokens_G = torch.tensor(rows, device=device).unbind(1)
    position_P = torch.arange(cache.page_tokens, device=device)
    return PageGroup(
        pages_G=None if in_place else torch.tensor(pages, device=device),
        readers_GQ=reader_G[:, None],
        hidden_G1P=(position_P >= tokens_G[:, None])[:, None],
    )


def shared_pages(
    readers_of_page: dict[int, list[int]], nobody: int, device: torch.device
) -> PageGroup:
    """Group the pages with several holders. They are full: who writes into one copies it first."""
    most = max(map(len, readers_of_page.values()))
    readers = [readers + [nobody] * (most - len(readers)) for readers in readers_of_page.values()]
    return PageGroup(
        pages_G=torch.tensor(list(readers_of_page), device=device),
        readers_GQ=torch.tensor(readers, device=device),
        hidden_G1P=None,
    )


def attend_to_pages(
    q: Float[Tensor, "B H W"],
    storage: Float[Tensor, "pages P W"],
    table: PageTable,
    *,
    latent_width: int,
    scale: float,
) -> Float[Tensor, "B H R"]:
    r"""Mix each sequence's latents.

    With page g's maximum $m_g$, sum $l_g = \sum \exp(s - m_g)$ and mix $o_g$, a sequence's output
    is $\sum_g e^{m_g - m} o_g / \sum_g e^{m_g - m} l_g$, $m = \max_g m_g$.
    """
    num_sequences, num_heads, _ = q.shape
    # One row more than there are sequences: where nobody reads, zeros come in and are dropped.
    q_with_nobody = torch.cat([q, q.new_zeros(1, *q.shape[1:])])
    parts = [
        attend_within_pages(q_with_nobody, storage, group, latent_width=latent_width, scale=scale)
        for group in table.groups
    ]
    readers_X = torch.cat([group.readers_GQ.flatten() for group in table.groups])
    largest_XH, sum_XH, mixed_XHR = (torch.cat(part) for part in zip(*parts, strict=True))

    largest_BH = largest_XH.new_full((num_sequences + 1, num_heads), -torch.inf).scatter_reduce_(
        0, readers_X[:, None].expand(-1, num_heads), largest_XH, "amax"
    )
    share_XH = (largest_XH - largest_BH.index_select(0, readers_X)).exp_()
    total_BH = largest_BH.zero_().index_add_(0, readers_X, sum_XH * share_XH)
    mixed_BHR = mixed_XHR.new_zeros(num_sequences + 1, num_heads, latent_width)
    mixed_BHR.index_add_(0, readers_X, mixed_XHR.mul_(share_XH[..., None]))
    return (mixed_BHR[:-1] / total_BH[:-1, :, None]).to(q.dtype)


def attend_within_pages(
    q_with_nobody: Float[Tensor, "B_plus_1 H W"],
    storage: Float[Tensor, "pages P W"],
    group: PageGroup,
    *,
    latent_width: int,
    scale: float,
) -> tuple[Float[Tensor, "X H"], Float[Tensor, "X H"], Float[Tensor, "X H R"]]:
    """Return the maximum, the sum and the unnormalised mix of each page and reader, X = G Q."""
    num_heads = q_with_nobody.shape[1]
    pages_GPW = group.read(storage)
    q_GXW = q_with_nobody.index_select(0, group.readers_GQ.flatten()).view(
        len(pages_GPW), -1, q_with_nobody.shape[-1]
    )
    scores_GXP = torch.bmm(q_GXW, pages_GPW.mT).float().mul_(scale)
    if group.hidden_G1P is not None:
        scores_GXP.masked_fill_(group.hidden_G1P, -torch.inf)
    largest_GX1 = scores_GXP.amax(dim=-1, keepdim=True)
    weights_GXP = scores_GXP.sub_(largest_GX1).exp_()
    mixed_GXR = torch.bmm(weights_GXP.to(storage.dtype), pages_GPW[..., :latent_width]).float()
    return (
        largest_GX1.view(-1, num_heads),
        weights_GXP.sum(dim=-1).view(-1, num_heads),
        mixed_GXR.view(-1, num_heads, latent_width),
    )
