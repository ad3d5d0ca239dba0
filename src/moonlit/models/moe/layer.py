"""The mixture-of-experts layer: routed experts plus shared experts.

Axes: T tokens, S segments, D model width, E experts, K experts per token.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moonlit.models.layers import SwiGLU
from moonlit.models.moe.experts import Experts
from moonlit.models.moe.grouped_experts import GroupedExperts
from moonlit.models.moe.megablocks_experts import MegaBlocksExperts
from moonlit.models.moe.router import Router, Routing
from moonlit.models.segments import Segments
from moonlit.models.shapes import DecoderShape

EXPERTS: dict[str, type[Experts]] = {
    "reference": Experts,
    "grouped_mm": GroupedExperts,
    "megablocks": MegaBlocksExperts,
}


Mix = Callable[[Experts, SwiGLU, Tensor, Routing], Tensor]


class MoELayer(nn.Module):
    """``shared(x) + sum_k weight_k * expert_k(x)``.

    ``mix`` runs the two; expert parallelism puts one in its place that asks other ranks.
    """

    mix: Mix

    def __init__(self, shape: DecoderShape, *, experts: str) -> None:
        super().__init__()
        if experts not in EXPERTS:
            raise ValueError(f"experts must be one of {sorted(EXPERTS)}, got {experts!r}")
        self.aux_loss_alpha = shape.aux_loss_alpha
        self.mix = mix_here
        self.gate = Router(
            model_width=shape.model_width,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            routed_scale=shape.routed_scale,
        )
        self.experts = EXPERTS[experts](
            model_width=shape.model_width,
            expert_width=shape.expert_width,
            num_experts=shape.num_experts,
        )
        self.shared_experts = SwiGLU(
            shape.model_width, shape.num_shared_experts * shape.expert_width
        )

    def forward(
        self,
        x: Float[Tensor, "T D"],
        modality: Int[Tensor, " T"],
        segments: Segments,
        *,
        count_load: bool = True,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
        """Return the layer's output, without the residual, and its load-balance loss."""
        routing = self.gate(x, modality, count_load=count_load)
        return self.mixed(x, routing, segments)

    def mixed(
        self, x: Float[Tensor, "T D"], routing: Routing, segments: Segments
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
        """Run the experts over rows that have been routed."""
        y = self.mix(self.experts, self.shared_experts, x, routing)
        if self.aux_loss_alpha == 0.0 or not self.training:
            return y, routing.weights_TK.new_zeros(())
        return y, self.aux_loss_alpha * sequence_balance_loss(routing, segments)


def mix_here(
    experts: Experts, shared_experts: SwiGLU, x: Float[Tensor, "T D"], routing: Routing
) -> Float[Tensor, "T D"]:
    """Run routed and shared experts that all lie on this rank."""
    return experts(x, routing.weights_TK, routing.expert_ids_TK) + shared_experts(x)


def sequence_balance_loss(routing: Routing, segments: Segments) -> Float[Tensor, ""]:
    r"""Sequence-wise balance loss, averaged over the row's tokens.

    For a segment of length $T$: $\sum_i f_i P_i$ with $f_i = \frac{E}{K T} \sum_t 1[i \in
    \mathrm{topk}_t]$ and $P_i = \frac1T \sum_t s_{ti} / \sum_j s_{tj}$; one at perfect balance.
    Each segment counts with its share of the row's tokens.

    Source: DeepSeek-V3, arXiv:2412.19437, Eq. 17-20.
    """
    scores_TE = routing.scores_TE
    num_experts, top_k = scores_TE.shape[1], routing.expert_ids_TK.shape[1]
    segment_T = segments.segment_of_token(scores_TE.device)
    zeros_SE = scores_TE.new_zeros(len(segments.lengths), num_experts)

    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, routing.expert_ids_TK, 1.0)
    counts_SE = zeros_SE.index_add(0, segment_T, chosen_TE)
    affinity_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    affinity_SE = zeros_SE.index_add(0, segment_T, affinity_TE)

    length_S1 = torch.tensor(segments.lengths, device=scores_TE.device)[:, None]
    fraction_SE = counts_SE * num_experts / (top_k * length_S1)
    return (fraction_SE * affinity_SE).sum() / len(scores_TE)
