"""Attention over cached latents without expanding them: the decoding form of MLA.

The key projection is absorbed into the query and the value projection into the output, so that all
heads attend to the same narrow rows, as in multi-query attention.

Axes: T new tokens of a row, N new tokens of one sequence, C its cached tokens, H heads, Dn and Dr
head widths without and with rotary position, Dv value width, R latent width, W = R + Dr.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moonlit.models.cache import LatentCache
from moonlit.models.paged import PageTable, attend_to_pages
from moonlit.models.segments import Segments

QUERY_BLOCK = 256  # new tokens of one score matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedRow:
    """A cache with room for the row, and where each of the row's tokens goes."""

    cache: LatentCache
    slot_of_token: Int[Tensor, " T"]
    is_fresh: bool
    """Whether no document has a past."""
    table: PageTable | None
    """Where every document has one new token: who reads which pages."""

    @classmethod
    def reserve(cls, cache: LatentCache, segments: Segments) -> "CachedRow":
        """Make room in the cache for the row."""
        slot_of_token = cache.reserve(segments)
        is_fresh = not any(sequence.length for sequence in cache.selected)
        is_step = not is_fresh and max(segments.lengths) == 1
        return cls(
            cache=cache,
            slot_of_token=slot_of_token,
            is_fresh=is_fresh,
            table=PageTable.of(cache, cache.selected) if is_step else None,
        )


def absorbed_attention(
    q_nope: Float[Tensor, "T H Dn"],
    q_rope: Float[Tensor, "T H Dr"],
    kv_weight: Float[Tensor, "H Dn_plus_Dv R"],
    row: CachedRow,
    layer: int,
    segments: Segments,
    *,
    scale: float,
) -> Float[Tensor, "T H Dv"]:
    """Attend from each new token to its sequence's past, its own sequence's new tokens included.

    The layer's new latents must already be written. Source: DeepSeek-V2, arXiv:2405.04434, App. C.
    """
    key_width, latent_width = q_nope.shape[-1], kv_weight.shape[-1]
    q_latent_HTR = torch.bmm(q_nope.transpose(0, 1), kv_weight[:, :key_width])
    q_THW = torch.cat([q_latent_HTR.transpose(0, 1), q_rope], dim=-1)
    if row.table is not None:
        storage = row.cache.storage[layer]
        mixed_THR = attend_to_pages(
            q_THW, storage, row.table, latent_width=latent_width, scale=scale
        )
    else:
        mixed_THR = attend_one_by_one(
            q_THW, row.cache, layer, segments, latent_width=latent_width, scale=scale
        )
    out_HTDv = torch.bmm(mixed_THR.transpose(0, 1), kv_weight[:, key_width:].mT)
    return out_HTDv.transpose(0, 1)


def attend_one_by_one(
    q: Float[Tensor, "T H W"],
    cache: LatentCache,
    layer: int,
    segments: Segments,
    *,
    latent_width: int,
    scale: float,
) -> Float[Tensor, "T H R"]:
    """Mix latents where documents continue by several tokens, such as a tool's result."""
    outputs = []
    for sequence, q_NHW in zip(cache.selected, q.split(list(segments.lengths)), strict=True):
        for first, q_block in enumerate(q_NHW.split(QUERY_BLOCK)):
            past = sequence.length + first * QUERY_BLOCK
            latents_CW = cache.history(layer, sequence, past + len(q_block))
            outputs.append(
                attend_to_latents(q_block, latents_CW, past, latent_width=latent_width, scale=scale)
            )
    return torch.cat(outputs)


def attend_to_latents(
    q: Float[Tensor, "N H W"],
    latents: Float[Tensor, "C W"],
    past: int,
    *,
    latent_width: int,
    scale: float,
) -> Float[Tensor, "N H R"]:
    """Mix latents: new token n sees the first ``past + n + 1``."""
    num_new, num_heads, _ = q.shape
    position_C = torch.arange(len(latents), device=q.device)
    last_N = past + torch.arange(num_new, device=q.device)
    hidden_N1C = position_C > last_N[:, None, None]

    scores_NHC = (q.flatten(0, 1) @ latents.mT).unflatten(0, (num_new, num_heads)).float() * scale
    weights_NHC = scores_NHC.masked_fill_(hidden_N1C, -torch.inf).softmax(dim=-1)
    mixed = weights_NHC.to(latents.dtype).flatten(0, 1) @ latents[:, :latent_width]
    return mixed.unflatten(0, (num_new, num_heads))
