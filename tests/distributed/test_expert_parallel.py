"""Experts on several ranks against the same layer in one process."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonlit.distributed.expert_parallel import fsdp_dim, shard_experts
from moonlit.distributed.mesh import MeshSizes, ProcessMesh
from moonlit.models.moe.experts import Experts
from moonlit.models.moe.layer import MoELayer
from moonlit.models.segments import Segments
from moonlit.models.shapes import DecoderShape

needs_megablocks = pytest.mark.skipif(
    find_spec("megablocks") is None, reason="run `make megablocks`"
)
BACKENDS = ["reference", "grouped_mm", pytest.param("megablocks", marks=needs_megablocks)]
LENGTHS = [11, 5, 0, 8]  # tokens by data-parallel rank: one has none
SHAPE = DecoderShape(
    vocab_size=8, media_pad_id=7, num_layers=1, num_dense_layers=0, model_width=8, dense_width=8,
    num_experts=4, top_k=2, num_shared_experts=1, expert_width=12, routed_scale=1.3, num_heads=1,
    q_lora_rank=None, kv_lora_rank=4, qk_nope_width=4, qk_rope_width=2, v_width=4, max_positions=8,
)  # fmt: skip


def moe_layer(experts: str, num_experts: int, *, crowded: bool, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(replace(SHAPE, num_experts=num_experts), experts=experts).to(dtype)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    if crowded:  # everyone goes to the first rank's experts
        layer.gate.e_score_correction_bias[:2] = 9.0
    return layer


def tokens(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(LENGTHS[rank], 8, generator=generator, dtype=torch.float64).to(dtype)


def loss_sum(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    modality = torch.zeros(len(x), dtype=torch.int64)
    y, _ = layer(x, modality, Segments((len(x),)))
    return y, (y * torch.linspace(-1, 2, 8, dtype=y.dtype)).sum()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(layout: dict[str, int], experts: str, crowded: bool, dtype: torch.dtype):
    """Forward and backward of every rank's tokens; gradients are summed over ranks."""
    world = torch.distributed.get_world_size()
    sizes: dict = {"pp": 1, "dp_replicate": 1, "dp_shard": None} | layout
    num_experts = sizes.pop("experts")
    mesh = ProcessMesh(MeshSizes.for_world(world, **sizes), "cpu")
    layer = moe_layer(experts, num_experts, crowded=crowded, dtype=dtype)
    shard_experts(layer, mesh)
    layer.experts.set_force_sum_reduction_for_comms(True)
    layer.experts.set_gradient_divide_factor(1.0)
    x = tokens(mesh.data_parallel_rank, dtype).requires_grad_()
    y, loss = loss_sum(layer, x)
    loss.backward()
    load = layer.gate.tokens_per_expert_ME.clone()
    torch.distributed.all_reduce(load, group=mesh.group("data"))
    gradients = {n: whole(p.grad) for n, p in layer.experts.named_parameters()}
    return y.detach(), x.grad, gradients, load


LAYOUTS = [
    {"experts": 4, "ep": 4},
    {"experts": 4, "ep": 2, "dp_shard": 2},
    {"experts": 6, "ep": 2, "dp_shard": 2},  # three experts on two shards: cut by rows
    {"experts": 4, "ep": 2, "dp_replicate": 2},
]


def assert_equals_one_process(
    ranks: Ranks,
    layout: dict[str, int],
    experts: str,
    *,
    crowded: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    answers = ranks(sharded, layout, experts, crowded, dtype)

    layer = moe_layer("reference", layout["experts"], crowded=crowded, dtype=dtype)
    xs = [tokens(rank, dtype).requires_grad_() for rank in range(len(answers))]
    ys, losses = zip(*(loss_sum(layer, x) for x in xs), strict=True)
    sum(losses).backward()

    def close(ours: Tensor, theirs: Tensor, name: str) -> None:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)

    for rank, (y, x_grad, gradients, load) in enumerate(answers):
        close(y, ys[rank].detach(), f"output of rank {rank}")
        close(x_grad, xs[rank].grad, f"input gradient of rank {rank}")
        for name, weight in layer.experts.named_parameters():
            close(gradients[name], weight.grad, f"{name} on rank {rank}")
        assert torch.equal(load, layer.gate.tokens_per_expert_ME)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("experts", BACKENDS)
def test_experts_on_two_ranks_equal_one_process(two_ranks: Ranks, experts: str, crowded: bool):
    """One rank has no tokens; crowded, one rank gets every row and the other none."""
    dtype = torch.float64 if experts == "reference" else torch.float32
    tolerance = 1e-12 if experts == "reference" else 1e-5
    assert_equals_one_process(
        two_ranks,
        {"experts": 4, "ep": 2},
        experts,
        crowded=crowded,
        dtype=dtype,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_on_four_ranks_equal_one_process(four_ranks: Ranks, layout: dict[str, int]):
    """Catches: a gradient divided by the wrong number of ranks, a share in the wrong order."""
    assert_equals_one_process(
        four_ranks, layout, "reference", crowded=False, dtype=torch.float64, tolerance=1e-12
    )


def test_shards_that_divide_no_dimension_are_refused():
    experts = Experts(model_width=8, expert_width=12, num_experts=3)
    assert [fsdp_dim(experts, shards) for shards in (1, 3, 2, 4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"dp_shard_size = 8 divides neither the 3 .*8 x 12"):
        fsdp_dim(experts, 8)


def deal_three_experts_out_over_two():
    mesh = ProcessMesh(MeshSizes.for_world(2, pp=1, dp_replicate=1, dp_shard=1, ep=2), "cpu")
    shard_experts(moe_layer("reference", 3, crowded=False, dtype=torch.float32), mesh)


def test_experts_that_cannot_be_dealt_out_are_refused(two_ranks: Ranks):
    with pytest.raises(AssertionError, match="3 experts cannot be dealt out evenly over ep_size"):
        two_ranks(deal_three_experts_out_over_two)
