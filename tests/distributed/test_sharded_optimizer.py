"""MuonClip over shards against MuonClip in one process, from the same gradients."""

import pytest
import torch
from micro_run import micro_model
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moonlit.distributed.expert_parallel import shard_experts
from moonlit.distributed.mesh import MeshSizes, ProcessMesh
from moonlit.models.kimi import Kimi
from moonlit.optim import matrix_shards
from moonlit.optim.matrix_shards import lengths_of_pieces, owners_by_cost, piece
from moonlit.optim.muon_clip import MuonClip
from moonlit.optim.qk_clip import LatentAttention

NUM_STEPS, TAU = 5, 10.0


def random_model(seed: int) -> Kimi:
    """Every number drawn anew; one model's weights serve as another's gradients."""
    torch.manual_seed(seed)
    model = micro_model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def shard(model: Kimi, mesh: ProcessMesh) -> Kimi:
    shard_experts(model, mesh)
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh.fsdp_mesh)
    encoder = {*model.vision_tower.parameters(), *model.mm_projector.parameters()}
    return fully_shard(model, mesh=mesh.fsdp_mesh, ignored_params=encoder)


def optimizer_of(model: Kimi) -> MuonClip:
    return MuonClip(model, lr=0.02, weight_decay=0.1, qk_clip_threshold=TAU)


def step(model: Kimi, optimizer: MuonClip, gradients: Kimi, logits: Tensor) -> None:
    for parameter, gradient in zip(model.parameters(), gradients.parameters(), strict=True):
        parameter.grad = gradient.detach()
    attentions = [m for m in model.modules() if isinstance(m, LatentAttention)]
    for attention, max_logits_H in zip(attentions, logits, strict=True):
        attention.max_logits_H.copy_(max_logits_H)
    optimizer.step()


def measured(number: int, rank: int) -> Tensor:
    """Largest logits by layer and head; each rank has seen another row, and one head is calm."""
    drawn = torch.rand(2, 2, generator=torch.Generator().manual_seed(10 * number + rank))
    return drawn * torch.tensor([[0.5, 2.0], [2.0, 2.0]]) * TAU


def weights_of(model: Kimi) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def sharded_steps(layout: dict[str, int], *, restored_after: int | None = None):
    world = torch.distributed.get_world_size()
    sizes: dict = {"pp": 1, "dp_replicate": 1, "dp_shard": None, "ep": 1} | layout
    mesh = ProcessMesh(MeshSizes.for_world(world, **sizes), "cpu")
    model = shard(random_model(0), mesh)
    optimizer = optimizer_of(model)
    for number in range(NUM_STEPS):
        if number == restored_after:
            state = get_optimizer_state_dict(model, optimizer)
            optimizer = optimizer_of(model)
            set_optimizer_state_dict(model, optimizer, state)
        gradients = shard(random_model(number + 1), mesh)
        step(model, optimizer, gradients, measured(number, mesh.data_parallel_rank))
    return weights_of(model), optimizer.clipped_heads


def steps_of_one_process(num_ranks: int):
    model = random_model(0)
    optimizer = optimizer_of(model)
    for number in range(NUM_STEPS):
        logits = torch.stack([measured(number, rank) for rank in range(num_ranks)]).amax(dim=0)
        step(model, optimizer, random_model(number + 1), logits)
    return weights_of(model), optimizer.clipped_heads


def assert_equals_one_process(answers: list) -> None:
    expected, clipped = steps_of_one_process(len(answers))
    assert clipped.any()
    assert not clipped.all()
    for weights, clipped_here in answers:
        assert torch.equal(clipped_here, clipped)
        for name, weight in expected.items():  # float64: batched products in another order
            torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"ep": 2}], ids=str)
def test_five_steps_on_two_ranks_equal_one_process(two_ranks: Ranks, layout: dict[str, int]):
    """Catches: a piece in the wrong place, half a matrix orthogonalised, a rank's own maxima."""
    assert_equals_one_process(two_ranks(sharded_steps, layout))


@pytest.mark.parametrize(
    "layout", [{"dp_shard": 4}, {"ep": 2, "dp_shard": 2}, {"dp_replicate": 2, "ep": 2}], ids=str
)
def test_five_steps_on_four_ranks_equal_one_process(four_ranks: Ranks, layout: dict[str, int]):
    assert_equals_one_process(four_ranks(sharded_steps, layout))


def test_a_sharded_state_that_was_saved_and_restored_goes_on_alike(two_ranks: Ranks):
    assert_equals_one_process(two_ranks(sharded_steps, {"dp_shard": 2}, restored_after=2))


def steps_in_rounds(layout: dict[str, int]):
    round_numel, matrix_shards.ROUND_NUMEL = matrix_shards.ROUND_NUMEL, 300
    try:
        return sharded_steps(layout)
    finally:
        matrix_shards.ROUND_NUMEL = round_numel


def test_matrices_too_many_for_one_round_are_all_updated(two_ranks: Ranks):
    """Catches: a round that takes the place of the one before it."""
    assert_equals_one_process(two_ranks(steps_in_rounds, {"dp_shard": 2}))


def steps_of_a_copy():
    model = random_model(0)
    optimizer = optimizer_of(model)
    for number in range(NUM_STEPS):
        logits = measured(number, torch.distributed.get_rank())
        step(model, optimizer, random_model(number + 1), logits)
    return weights_of(model), optimizer.clipped_heads


def test_copies_are_clipped_by_what_any_rank_has_seen(two_ranks: Ranks):
    """Catches: maxima that only sharded weights have in common."""
    assert_equals_one_process(two_ranks(steps_of_a_copy))


def cut_twice() -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    weight = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0), Shard(1)])
    try:
        piece(weight, weight, weight, (1, 4, 6), stacked=False)
    except ValueError as error:
        return str(error)
    return ""


def test_a_matrix_cut_along_two_axes_is_refused(four_ranks: Ranks):
    assert all("cut along one axis" in said for said in four_ranks(cut_twice))


def test_every_matrix_has_one_owner_and_the_costs_are_even():
    owners = owners_by_cost([9, 2, 2, 2, 2, 1, 9], num_ranks=3)

    assert owners == [0, 2, 2, 2, 2, 2, 1]
    assert lengths_of_pieces(10, 4) == [3, 3, 3, 1]
    assert lengths_of_pieces(2, 4) == [1, 1, 0, 0]
