"""Attention over packed rows: each token attends inside its own segment and nowhere else.

A segment is a document (decoder, causal) or a visual item (encoder, full). Backends have one
signature and are chosen by name in conf: ``sdpa`` runs everywhere, ``xformers`` on CUDA.

Axes: T tokens of all segments, H heads, Dk and Dv head widths.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths of the segments of one packed row, on the host."""

    lengths: tuple[int, ...]

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Int[Tensor, " S_plus_1"], num_tokens: int) -> "Segments":
        """Read the boundaries; on CUDA this waits for the device, once a forward.

        Raises:
            ValueError: if the boundaries do not rise from 0 to ``num_tokens``.
        """
        bounds = cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 1:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the row's {num_tokens} tokens, got {bounds}"
            )
        return cls(lengths)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring segments of one length, as pairs of length and count."""
        return [(length, len(list(same))) for length, same in groupby(self.lengths)]

    def segment_of_token(self, device: torch.device) -> Int[Tensor, " T"]:
        """Index of the segment that each token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))


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
        """Return the attention output of every token."""
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
    rows_of_runs = [length * count for length, count in segments.runs]
    runs = zip(segments.runs, *(x.split(rows_of_runs) for x in (q, k, v)), strict=True)
    outputs = []
    for (_, count), *qkv in runs:
        q_BHSD, k_BHSD, v_BHSD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in qkv)
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BHSD, v_BHSD, is_causal=causal, scale=scale
        )
        outputs.append(out_BHSD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[..., :v_width]


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
    mask = block_diagonal_mask(segments, causal=causal, device=q.device)
    out_BTHD = fmha.memory_efficient_attention(
        q[None], k[None], v[None], attn_bias=mask, scale=scale
    )
    return out_BTHD[0]


@lru_cache(maxsize=4)  # every layer of a forward asks for the same one
def block_diagonal_mask(segments: Segments, *, causal: bool, device: torch.device) -> Any:
    """Return the xformers mask that keeps each token inside its segment."""
    # Imported here: on a machine without CUDA the import alone prints a warning.
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

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
