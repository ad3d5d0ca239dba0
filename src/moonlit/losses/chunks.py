"""Trained tokens of a row in chunks: logits exist for one chunk at a time.

Axes: T tokens of a packed row, C trained tokens of a chunk, D width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_TOKENS = 1024
"""Rows of logits that exist at once; our default."""


def chunks_of(loss_mask: Bool[Tensor, " T"], chunk_tokens: int) -> tuple[Int[Tensor, " C"], ...]:
    """Return the positions of the trained tokens, ``chunk_tokens`` at a time.

    Raises:
        ValueError: if ``chunk_tokens`` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    return loss_mask.nonzero().squeeze(-1).split(chunk_tokens)


def accumulation_dtype(hidden_TD: Float[Tensor, "T D"]) -> torch.dtype:
    """Return fp32 (fp64 where given): sums run over thousands of tokens."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)
