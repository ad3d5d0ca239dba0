"""Autocast without its casts: weights of products lie in its dtype already.

For a model that is only evaluated, many times between two changes of its weights. The numbers are
those of autocast over fp32 weights: embeddings, norms and routers stay as they are.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from moonlit.models.kimi import Kimi
from moonlit.models.moe.experts import Experts

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What Lightning's names of mixed precisions mean."""


def autocast_of(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return what a forward in this precision runs under."""
    if precision not in DTYPES:
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def lower_products(model: Kimi, precision: str) -> None:
    """Cast what autocast would cast in every forward: weights of linear maps and of experts."""
    if precision not in DTYPES:
        return
    for module in model.modules():
        if isinstance(module, (nn.Linear, Experts)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(DTYPES[precision])
