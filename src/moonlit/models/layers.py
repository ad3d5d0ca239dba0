"""The primitives every part is made of: linear, embedding, norms, SwiGLU.

``reset_parameters`` of each is the recipe's initialisation, so that a model built on the meta
device and then materialised starts like any other.

Axes: T tokens, D model width, F MLP width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

INIT_STD = 0.02  # initializer_range of the release; for the encoder it is our default


class Linear(nn.Linear):
    """Linear map with normal(0, 0.02) weights and a zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Embedding table with normal(0, 0.02) rows."""

    def reset_parameters(self) -> None:
        """Draw the rows anew."""
        nn.init.normal_(self.weight, std=INIT_STD)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in fp32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        """Set the gain to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return ``x / sqrt(mean(x^2) + eps) * weight``."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if not torch.is_grad_enabled():  # entering a Function costs more than a short row's norm
            return normalised(x, self.weight, self.eps)[0]
        return RMSNormOnCPU.apply(x, self.weight, self.eps)


def normalised(
    x: Float[Tensor, "T D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T 1"]]:
    """Normalise in fp32 (fp64 where given), then apply the gain; return the inverse RMS too."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    inverse_rms_T1 = (norm_T1.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms_T1).to(x.dtype).mul_(weight), inverse_rms_T1


class RMSNormOnCPU(torch.autograd.Function):
    """``F.rms_norm`` with a backward of its own, in half the time.

    PyTorch fuses the norm on CUDA; on a CPU forward and backward run as separate operations, each
    of which walks through memory again (torch 2.13, [4096, 192], one thread: 5.5 ms against 2.7).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Float[Tensor, "T D"], weight: Float[Tensor, " D"], eps: float
    ) -> Float[Tensor, "T D"]:
        """Normalise, and keep what the backward pass needs."""
        y, inverse_rms_T1 = normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms_T1)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, " D"], None]:
        r"""With $r$ the inverse RMS: $g w r - x r^3 \langle g w, x \rangle / D$, and $g x r$."""
        x, weight, inverse_rms_T1 = ctx.saved_tensors
        exact = inverse_rms_T1.dtype
        grad_times_x_TD = grad.to(exact) * x
        grad_weight_D = inverse_rms_T1[:, 0] @ grad_times_x_TD
        projection_T1 = (grad_times_x_TD @ weight.to(exact))[:, None] / x.shape[-1]
        grad_x_TD = (grad.to(exact) * weight).mul_(inverse_rms_T1)
        grad_x_TD.addcmul_(x, projection_T1 * inverse_rms_T1.pow(3), value=-1)
        return grad_x_TD.to(x.dtype), grad_weight_D.to(weight.dtype), None


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``: the dense MLP and the shared experts."""

    def __init__(self, model_width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(model_width, mlp_width, bias=False)
        self.up_proj = Linear(model_width, mlp_width, bias=False)
        self.down_proj = Linear(mlp_width, model_width, bias=False)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return the MLP's output, without the residual."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
