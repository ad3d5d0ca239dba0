"""Decoder layers through torch.compile against the same layers run as they are written."""

import pytest
import torch
from shapes import MEDIA_PAD_ID, packed, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from moonlit.models.kimi import Kimi


def step(model: Kimi, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(sum(lengths))
    row = packed([torch.randint(0, MEDIA_PAD_ID, (length,)) for length in lengths])
    model.zero_grad()
    output = model(**row)
    (output.hidden_TD.square().sum() + output.load_balance_loss).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()) | {"hidden": output.hidden_TD.detach()}


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_equal_eager_ones_without_compiling_anew(recompute: bool):
    """Catches: a second count of the load, a graph for every layout of documents."""
    eager, compiled = tiny_model().train(), tiny_model().train()
    for layer in compiled.language_model.model.layers:
        layer.compiled, layer.recompute = True, recompute
    num_graphs = []

    for lengths in ((7, 12), (9,), (3, 4, 5, 6), (20, 11)):
        ours, theirs = step(compiled, lengths), step(eager, lengths)
        for name, expected in theirs.items():  # fp32: sums in another order
            scale = expected.abs().max().item()
            assert (ours[name] - expected).abs().max() <= 1e-5 * scale, name
        num_graphs.append(counters["stats"]["unique_graphs"])

    assert len(set(num_graphs[1:])) == 1
