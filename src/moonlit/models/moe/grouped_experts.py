"""Expert MLPs over ``grouped_mm``: one call multiplies all experts' rows.

Axes: T tokens, D model width, F expert width, E experts, K experts per token, R = T*K routed rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moonlit.models.moe.experts import Experts, in_product_dtype


class GroupedExperts(Experts):
    """The same experts, with rows sorted by expert and multiplied in one grouped call."""

    def forward(
        self,
        x: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        expert_ids: Int[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return the weighted sum of each token's chosen experts."""
        w_gate_EDF, w_up_EDF, w_down_EFD = self.stacks
        num_experts, top_k = len(w_up_EDF), expert_ids.shape[-1]

        # Dispatch: sort the T*K copies so that each expert sees one contiguous block.
        order_R = expert_ids.flatten().argsort(stable=True)
        token_of_row_R = order_R // top_k
        rows_per_expert_E = expert_ids.new_zeros(num_experts)
        rows_per_expert_E.scatter_add_(0, expert_ids.flatten(), torch.ones_like(order_R))
        ends_E = rows_per_expert_E.cumsum(0, dtype=torch.int32)
        x_RD = in_product_dtype(x).index_select(0, token_of_row_R)

        # Compute. The combine weight goes onto the narrow side of the last product.
        gate_RF = F.grouped_mm(x_RD, w_gate_EDF, offs=ends_E)
        up_RF = F.grouped_mm(x_RD, w_up_EDF, offs=ends_E)
        weight_R1 = weights.flatten()[order_R, None].to(x_RD.dtype)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF * weight_R1, w_down_EFD, offs=ends_E)

        # Combine: add each copy back to its token.
        return torch.zeros_like(x).index_add(0, token_of_row_R, y_RD.to(x.dtype))
