"""Expert MLPs in plain PyTorch: the readable reference.

``grouped_experts.py`` holds the fast one; a test keeps the two equal.

Axes: T tokens, D model width, F expert width, E experts, K experts per token, R = T*K routed rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moonlit.models.layers import INIT_STD


class Experts(nn.Module):
    """``num_experts`` SwiGLU MLPs, each applied to the rows routed to it; drops no token."""

    def __init__(self, *, model_width: int, expert_width: int, num_experts: int) -> None:
        super().__init__()
        self.w_gate_EDF = nn.Parameter(torch.empty(num_experts, model_width, expert_width))
        self.w_up_EDF = nn.Parameter(torch.empty(num_experts, model_width, expert_width))
        self.w_down_EFD = nn.Parameter(torch.empty(num_experts, expert_width, model_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD)

    @staticmethod
    def local(stack: Tensor) -> Tensor:
        """Return this rank's experts of a stack that is dealt out over ranks, or all of them."""
        return stack.to_local() if isinstance(stack, DTensor) else stack

    @property
    def stacks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down weights of the experts on this rank, in the dtype of products."""
        weights = (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD)
        gate_EDF, up_EDF, down_EFD = (in_product_dtype(self.local(weight)) for weight in weights)
        return gate_EDF, up_EDF, down_EFD

    def forward(
        self,
        x: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        expert_ids: Int[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return the weighted sum of each token's chosen experts."""
        gate_EDF, up_EDF, down_EFD = self.stacks
        y_TD = torch.zeros_like(x)
        for expert in range(len(up_EDF)):
            token, slot = torch.where(expert_ids == expert)
            rows = in_product_dtype(x[token])
            hidden = F.silu(rows @ gate_EDF[expert]) * (rows @ up_EDF[expert])
            weighted = hidden @ down_EFD[expert] * weights[token, slot, None]
            y_TD = y_TD.index_add(0, token, weighted.to(x.dtype))
        return y_TD


def in_product_dtype(tensor: Tensor) -> Tensor:
    """Cast to autocast's dtype where it is on: it does not know grouped products."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor
