"""Sigmoid router with a selection-only bias: loss-free balancing.

Axes: T tokens, D model width, E experts, K experts per token, M modalities (text, vision).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moonlit.models.layers import INIT_STD

NUM_MODALITIES = 2  # 0 text, 1 vision


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each token goes."""

    weights_TK: Float[Tensor, "T K"]
    """Combine weights in fp32; each row sums to the routed scale."""
    expert_ids_TK: Int[Tensor, "T K"]
    """The chosen experts, without repetition in a row."""
    scores_TE: Float[Tensor, "T E"]
    """Sigmoid affinities in fp32, before bias and normalisation."""


class Router(nn.Module):
    r"""Choose the top-k experts of every token.

    Scores are $s = \sigma(W x)$; the experts with the largest $s + b$ are chosen; the weights are
    their $s$, normalised to sum to one and multiplied by the routed scale. The bias $b$ takes no
    gradient and never enters the weights.

    Source: DeepSeek-V3, arXiv:2412.19437, Sec. 2.1.2; Moonlight, arXiv:2502.16982, App. C.
    """

    def __init__(
        self, *, model_width: int, num_experts: int, top_k: int, routed_scale: float
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.routed_scale = routed_scale
        self.weight = nn.Parameter(torch.empty(num_experts, model_width))
        self.e_score_correction_bias = nn.Buffer(torch.empty(num_experts, dtype=torch.float32))
        self.tokens_per_expert_ME = nn.Buffer(
            torch.empty(NUM_MODALITIES, num_experts, dtype=torch.int64), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; no bias, no load."""
        nn.init.normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.e_score_correction_bias)
        self.reset_load()

    def reset_load(self) -> None:
        """Forget the load counted so far."""
        self.tokens_per_expert_ME.zero_()

    def forward(
        self, x: Float[Tensor, "T D"], modality: Int[Tensor, " T"], *, count_load: bool = True
    ) -> Routing:
        """Route every token and, in training, count the load (not again in a recomputation)."""
        # fp32, under autocast too: in bf16, 29 % of tokens tie at the top-8 boundary.
        with torch.autocast(x.device.type, enabled=False):
            scores_TE = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            biased_TE = scores_TE + self.e_score_correction_bias
            expert_ids_TK = biased_TE.topk(self.top_k, dim=-1, sorted=False).indices
            if self.training and count_load:
                self._count(expert_ids_TK, modality)
        chosen_TK = scores_TE.gather(-1, expert_ids_TK)
        weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True) * self.routed_scale
        return Routing(weights_TK, expert_ids_TK, scores_TE)

    def _count(self, expert_ids: Int[Tensor, "T K"], modality: Int[Tensor, " T"]) -> None:
        load = self.tokens_per_expert_ME
        slot = (expert_ids + modality[:, None] * load.shape[1]).flatten()
        load.view(-1).scatter_add_(0, slot, torch.ones_like(slot))

    @torch.no_grad()
    def update_selection_bias(self, rate: float) -> None:
        r"""Raise the bias of underloaded experts: $b \leftarrow b + u (s - \bar s)$.

        $s = \mathrm{sign}(\bar c - c)$ for the counted load $c$; removing the mean keeps the biases
        centred. Call it once an optimizer step, with the load summed over all ranks, then
        ``reset_load``.

        Source: Moonlight, arXiv:2502.16982, App. C.

        Args:
            rate: u, 1e-3 in Moonlight and 0 in its cooldown.
        """
        load_E = self.tokens_per_expert_ME.sum(dim=0).float()
        sign_E = torch.sign(load_E.mean() - load_E)
        self.e_score_correction_bias += rate * (sign_E - sign_E.mean())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move with the module, but keep the bias in fp32: its updates are 1e-3."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self
