"""The largest attention logit of every head, which QK-Clip needs and fused attention hides.

Axes: T tokens, H heads, Dk query and key width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moonlit.models.segments import Segments

BLOCK = 256  # queries and keys of one score block [tokens]


@torch.no_grad()
def max_logits(
    q: Float[Tensor, "T H Dk"], k: Float[Tensor, "T H Dk"], segments: Segments, *, scale: float
) -> Float[Tensor, " H"]:
    r"""Return $\max_{i \ge j} q_i \cdot k_j \cdot$ ``scale`` of each head over all segments.

    Exact, in blocks: memory is one ``BLOCK`` x ``BLOCK`` square per head, never a score matrix.
    """
    largest_H = torch.full((q.shape[1],), -torch.inf, device=q.device)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    k_of_segment = k.split(segments.lengths)
    for q_SHD, k_SHD, prefix in zip(
        q.split(segments.lengths), k_of_segment, segments.prefix_of_each, strict=True
    ):
        q_blocks = q_SHD.float().transpose(0, 1).split(BLOCK, dim=1)
        k_blocks = k_SHD.float().permute(1, 2, 0).split(BLOCK, dim=2)
        if prefix >= 0:
            for k_HDb in k_of_segment[prefix].float().permute(1, 2, 0).split(BLOCK, dim=2):
                for q_HbD in q_blocks:
                    largest_H = torch.maximum(largest_H, (q_HbD @ k_HDb).amax(dim=(1, 2)))
        for index, q_HbD in enumerate(q_blocks):
            for earlier, k_HDb in enumerate(k_blocks[: index + 1]):
                scores_Hbb = q_HbD @ k_HDb
                if earlier == index:
                    rows, columns = scores_Hbb.shape[1:]
                    scores_Hbb.masked_fill_(future[:rows, :columns], -torch.inf)
                largest_H = torch.maximum(largest_H, scores_Hbb.amax(dim=(1, 2)))
    return largest_H * scale


@torch.no_grad()
def logit_bounds(
    q: Float[Tensor, "T H Dk"], k: Float[Tensor, "T H Dk"], *, scale: float
) -> Float[Tensor, " H"]:
    r"""Return $\max_i |q_i| \max_j |k_j| \cdot$ ``scale``: no logit of the head is larger."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q_norm_TH = torch.linalg.vector_norm(q, dim=-1, dtype=exact)
    k_norm_TH = torch.linalg.vector_norm(k, dim=-1, dtype=exact)
    return (q_norm_TH.amax(dim=0) * k_norm_TH.amax(dim=0) * scale).float()
