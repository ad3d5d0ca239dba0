"""Attention over packed rows: each token attends inside its own segment and nowhere else.

But for branches, which see the segment that they continue, too. Causal in the decoder, full in the
encoder. Backends have one signature and are chosen by name in conf: ``sdpa`` runs everywhere,
``xformers`` on CUDA.

Axes: T tokens of all segments, H heads, Dk and Dv head widths.
"""

from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moonlit.models.segments import Branches, Run, Segments


@runtime_checkable
class SegmentAttention(Protocol):
    """Softmax attention inside each segment."""

    def __call__(
        self,
        q: Float[Tensor, "T H Dk"],
        k: Float[Tensor, "T H Dk"],
        v: Float[Tensor, "T H Dv"],
        segments: Segments,
        *,
        causal: bool,
        scale: float,
    ) -> Float[Tensor, "T H Dv"]:
        """Return the attention output of every token; branches are causal in any case."""
        ...


def sdpa_attention(
    q: Float[Tensor, "T H Dk"],
    k: Float[Tensor, "T H Dk"],
    v: Float[Tensor, "T H Dv"],
    segments: Segments,
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, "T H Dv"]:
    """PyTorch's attention: neighbouring segments of one length as a batch, others one by one.

    Gathering and padding segments of unlike lengths into batches was measured slower on a CPU (34
    documents of 30-200 tokens: 51 ms against 41 ms, forward and backward).
    """
    v_width = v.shape[-1]
    # The flash kernels want one head width: padding is 3x faster than the general path at 1,024
    # tokens. The padded columns come out zero and are dropped.
    v = F.pad(v, (0, q.shape[-1] - v_width))
    parts = segments.parts
    rows_of_parts = [part.num_tokens for part in parts]
    outputs = []
    for part, *qkv in zip(parts, *(x.split(rows_of_parts) for x in (q, k, v)), strict=True):
        if isinstance(part, Run):
            q_BHSD, k_BHSD, v_BHSD = (x.unflatten(0, (part.count, -1)).transpose(1, 2) for x in qkv)
            mask: Any = {"is_causal": causal}
        else:
            first, end = part.prefix
            q_BHSD, k_BHSD, v_BHSD = (
                x[None].transpose(1, 2)
                for x in (
                    qkv[0],
                    torch.cat([k[first:end], qkv[1]]),
                    torch.cat([v[first:end], qkv[2]]),
                )
            )
            mask = {"attn_mask": branch_mask(part, q.device)}
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, scale=scale, **mask)
        outputs.append(out_BHSD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[..., :v_width]


def branch_mask(branches: Branches, device: torch.device) -> Tensor:
    """Return what each token of the branches sees: the prefix, and its own branch up to itself."""
    first, end = branches.prefix
    if len(branches.lengths) == 1:
        return causal_lower_right(branches.num_tokens, end - first + branches.num_tokens)
    return F.pad(own_branch_mask(branches.lengths, device), (end - first, 0), value=True)


@lru_cache(maxsize=256)  # every layer of a forward asks for those of all parts of a row
def own_branch_mask(lengths: tuple[int, ...], device: torch.device) -> Bool[Tensor, "T T"]:
    """Return where one token of some branches sees another of the same branch."""
    with torch.inference_mode(False):
        branch_T = torch.repeat_interleave(torch.tensor(lengths, device=device))
        return (branch_T[:, None] == branch_T).tril_()


def xformers_attention(
    q: Float[Tensor, "T H Dk"],
    k: Float[Tensor, "T H Dk"],
    v: Float[Tensor, "T H Dv"],
    segments: Segments,
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, "T H Dv"]:
    """Memory-efficient attention of xformers, with a block-diagonal mask.

    Raises:
        ValueError: on a CPU tensor; the kernels are CUDA only.
    """
    if not q.is_cuda:
        raise ValueError("attention=xformers needs CUDA tensors, got cpu: use attention=sdpa")
    from xformers.ops import fmha

    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves rotated parts in fp32
    if segments.prefixes:
        seen = torch.tensor([i for tokens in segments.seen for i in tokens], device=q.device)
        k, v = k[seen], v[seen]
    mask = block_diagonal_mask(segments, causal=causal, device=q.device)
    out_BTHD = fmha.memory_efficient_attention(
        q[None], k[None], v[None], attn_bias=mask, scale=scale
    )
    return out_BTHD[0]


@lru_cache(maxsize=4)  # every layer of a forward asks for the same one
def block_diagonal_mask(segments: Segments, *, causal: bool, device: torch.device) -> Any:
    """Return the xformers mask that keeps each token inside its segment."""
    # Imported here: on a machine without CUDA the import alone prints a warning.
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalCausalMask,
        BlockDiagonalMask,
    )

    if segments.prefixes:
        return BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            list(segments.lengths), [len(tokens) for tokens in segments.seen], device=device
        )
    mask_type = BlockDiagonalCausalMask if causal else BlockDiagonalMask
    return mask_type.from_seqlens(list(segments.lengths), device=device)


ATTENTION: dict[str, SegmentAttention] = {"sdpa": sdpa_attention, "xformers": xformers_attention}


def attention_named(name: str) -> SegmentAttention:
    """Return the backend of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention must be one of {sorted(ATTENTION)}, got {name!r}")
    return ATTENTION[name]
