"""Expert MLPs over MegaBlocks' ``ParallelDroplessMLP``, routed by our own router.

Its Triton kernels gather and scatter the rows, its grouped GLU multiplies them. ``experts.py`` is
the readable reference; a test keeps the two equal, on a CPU through Triton's interpreter.

Source: MegaBlocks, arXiv:2211.15841. Differs: rows are grouped, not block-sparse (MegaBlocks
refuses its block-sparse path with Triton >= 3.2); no router and no auxiliary loss of its own.

Axes: T tokens, D model width, F expert width, E experts, K experts per token.
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moonlit.models.moe.experts import in_product_dtype
from moonlit.models.moe.grouped_experts import GroupedExperts
from moonlit.models.moe.megablocks_kernels import stand_in_where_not_compiled

BLOCK = 128  # side of MegaBlocks' sparse blocks


class MegaBlocksExperts(GroupedExperts):
    """The same experts and parameters; MegaBlocks computes with them.

    MegaBlocks is lent the weights for the length of a call: there is one set, under the names that
    checkpoints, MuonClip and the export know.

    Raises:
        ModuleNotFoundError: if MegaBlocks is not installed; names the command that installs it.
    """

    def __init__(self, *, model_width: int, expert_width: int, num_experts: int) -> None:
        super().__init__(
            model_width=model_width, expert_width=expert_width, num_experts=num_experts
        )
        _import_megablocks()

    def forward(
        self,
        x: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        expert_ids: Int[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return the weighted sum of each token's chosen experts.

        Raises:
            RuntimeError: on a CPU without Triton's interpreter.
        """
        if len(x) == 0:  # a kernel cannot be launched on no rows
            return super().forward(x, weights, expert_ids)
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"experts=megablocks needs CUDA, got tensors on {x.device}; use grouped_mm there,"
                " or set TRITON_INTERPRET=1 to let Triton interpret its kernels (slowly)"
            )
        w_gate_EDF, w_up_EDF, w_down_EFD = self.stacks
        layer = _dropless_mlp(*w_gate_EDF.shape, expert_ids.shape[1], get_ident())
        # MegaBlocks keeps w1 (gate) and v1 (up) as [E, F, D] and multiplies with their transposes.
        lent = {"w1": w_gate_EDF.mT, "v1": w_up_EDF.mT, "w2": w_down_EFD}
        vars(layer.mlp).update(lent)
        try:
            return layer(in_product_dtype(x), None, weights, expert_ids).to(x.dtype)
        finally:
            for name in lent:
                del vars(layer.mlp)[name]


@cache
def _import_megablocks() -> Any:
    """Import MegaBlocks over our stand-ins for its compiled parts."""
    missing = [package for package in ("megablocks", "stk") if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"experts=megablocks needs {' and '.join(missing)}: run `make megablocks`"
        )
    stand_in_where_not_compiled()
    megablocks = import_module("megablocks")  # only now: it imports what stands in
    if os.environ.get("TRITON_INTERPRET") == "1":  # nothing to tune, and no clock to tune by
        for kernel in vars(import_module("megablocks.backend.kernels")).values():
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]
    return megablocks


@cache
def _dropless_mlp(
    num_experts: int, model_width: int, expert_width: int, top_k: int, thread: int
) -> Any:
    """MegaBlocks' layer without weights; layers of one shape share it, threads do not."""
    megablocks = _import_megablocks()
    layer = megablocks.ParallelDroplessMLP(
        megablocks.Arguments(
            hidden_size=model_width,
            # Only its block-sparse path reads it, which cannot be built below one block.
            ffn_hidden_size=max(expert_width, BLOCK),
            moe_num_experts=num_experts,
            moe_top_k=top_k,
            moe_loss_weight=0.0,
            mlp_type="glu",
            mlp_impl="grouped",
            activation_fn=F.silu,
            bias=False,
            fp16=False,
            device=torch.device("meta"),
        )
    )
    for name in ("w1", "v1", "w2"):
        delattr(layer.mlp, name)
    return layer
