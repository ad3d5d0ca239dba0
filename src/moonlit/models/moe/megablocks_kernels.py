"""The compiled parts of MegaBlocks, in PyTorch: what ``megablocks_ops`` and ``grouped_gemm`` offer.

Neither extension compiles with CUDA 13, and MegaBlocks does not import without them. Its dropless
grouped path needs four small operations on the routing's integers and one grouped product, which
PyTorch has; MegaBlocks' own Triton kernels move the rows. An extension that is installed is used.

Axes: R routed rows, E experts, N and M rows and columns of a weight.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def stand_in_where_not_compiled() -> None:
    """Offer these functions under the names that MegaBlocks imports, where nothing else does."""
    offered = {
        "megablocks_ops": {
            "sort": sort,
            "histogram": histogram,
            "inclusive_cumsum": inclusive_cumsum,
            "exclusive_cumsum": exclusive_cumsum,
        },
        "grouped_gemm": {"ops": _namespace("grouped_gemm.ops", gmm=gmm), "backend": None},
    }
    for name, members in offered.items():
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = _namespace(name, **members)


def sort(
    keys: Int[Tensor, " R"], end_bit: int, keys_out: Int[Tensor, " R"], order_out: Int[Tensor, " R"]
) -> None:
    """Stable sort of the keys, and where each came from; ``end_bit`` is for a radix sort."""
    sorted_R, order_R = keys.sort(stable=True)
    keys_out.copy_(sorted_R)
    order_out.copy_(order_R)


def histogram(expert_ids: Int[Tensor, " R"], num_experts: int) -> Int[Tensor, " E"]:
    """Count the rows of each expert, in int32 and without a synchronisation."""
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=expert_ids.device)
    return counts_E.index_add_(0, expert_ids, torch.ones_like(expert_ids, dtype=torch.int32))


def inclusive_cumsum(x: Int[Tensor, "B E"], dim: int, out: Int[Tensor, "B E"]) -> None:
    """Sum of everything up to each position."""
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Int[Tensor, "B E"], dim: int, out: Int[Tensor, "B E"]) -> None:
    """Sum of everything before each position."""
    out.copy_(x.cumsum(dim) - x)


def gmm(
    rows: Float[Tensor, "R N"],
    weights: Float[Tensor, "E _ _"],
    rows_per_expert: Int[Tensor, " E"],
    trans_b: bool = False,
) -> Float[Tensor, "R M"]:
    """Multiply each expert's block of rows with its weight, transposed where ``trans_b``."""
    ends_E = rows_per_expert.cumsum(0).to(rows.device, torch.int32)
    return F.grouped_mm(rows, weights.mT if trans_b else weights, offs=ends_E)


def _namespace(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module
