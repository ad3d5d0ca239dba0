"""Where every process stands, and layouts that cannot be."""

from dataclasses import replace

import pytest
import torch
from micro_run import micro_model
from ranks import Ranks

from moonlit.distributed.mesh import MeshSizes, ProcessMesh, check_devices


def sizes(world: int, pp: int = 1, dp_replicate: int = 1, dp_shard: int | None = None, ep: int = 1):
    return MeshSizes.for_world(world, pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, ep=ep)


def test_shards_take_what_the_other_axes_leave():
    assert sizes(24, pp=2, dp_replicate=3, ep=2).dp_shard == 2
    assert sizes(24, pp=2, dp_replicate=3, ep=2).data_parallel == 12


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"world": 6, "pp": 2, "ep": 2}, r"pp 2 x dp_replicate 1 x ep 2 = 4 does not .* 6 proc"),
        ({"world": 6, "pp": 2, "ep": 2}, "use 4 or 8 processes"),
        ({"world": 2, "ep": 4}, "use 4 processes"),
        ({"world": 8, "dp_shard": 2}, r"= 2, but there are 8 processes"),
        ({"world": 8, "dp_shard": 2}, "use strategy.dp_shard_size=8, or leave it null"),
        ({"world": 4, "ep": 0}, "strategy.ep_size must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_world_are_refused(given: dict, said: str):
    with pytest.raises(ValueError, match=said):
        sizes(given.pop("world"), **given)


def test_experts_and_layers_that_cannot_be_split_are_refused():
    shape = micro_model().decoder_shape  # 4 experts, 2 layers
    sizes(8, ep=4, pp=2).check_model(shape)
    with pytest.raises(ValueError, match=r"4 experts evenly \(4 / 8 = 0.5 a rank\).*\[1, 2, 4\]"):
        sizes(8, ep=8).check_model(shape)
    with pytest.raises(ValueError, match=r"3 experts evenly .*\[1, 3\]"):
        sizes(8, ep=2).check_model(replace(shape, num_experts=3))


@pytest.mark.parametrize(
    ("pp", "stages_per_rank", "said"),
    [
        (4, 1, r"pp_size=4 x stages_per_rank=1 = 4 stages .* has 2 layers: use at most pp_size=2"),
        (2, 3, r"pp_size=2 x stages_per_rank=3 = 6 .* 2 layers: use at most stages_per_rank=1"),
        (1, 2, r"stages_per_rank=2 needs a pipeline, but strategy.pp_size is 1: set it to 2"),
        (2, 0, r"strategy.stages_per_rank must be at least 1, got 0"),
    ],
)
def test_pipelines_that_have_a_stage_without_a_layer_are_refused(
    pp: int, stages_per_rank: int, said: str
):
    shape = micro_model().decoder_shape  # 2 layers
    with pytest.raises(ValueError, match=said):
        sizes(8, pp=pp).check_model(shape, stages_per_rank=stages_per_rank)


def test_mixed_devices_and_nccl_without_gpus_are_refused():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    check_devices([cpu, cpu], "gloo")
    check_devices([cuda], "nccl")
    with pytest.raises(ValueError, match="one kind are needed, got cpu and cuda"):
        check_devices([cpu, cuda], "gloo")
    with pytest.raises(ValueError, match="process_group_backend=nccl needs CUDA devices, got cpu"):
        check_devices([cpu], "nccl")


def places() -> dict[str, list[int]]:
    mesh = ProcessMesh(sizes(4, pp=2, ep=2), "cpu")
    named = {
        axis: torch.distributed.get_process_group_ranks(mesh.group(axis))
        for axis in ("pp", "ep", "dp_shard", "fsdp", "data", "world")
    }
    assert mesh.data_parallel_size == 2
    assert mesh.rank("ep") == mesh.data_parallel_rank
    return named


def test_every_axis_has_its_group(four_ranks: Ranks):
    answers = four_ranks(places)
    assert answers[0] == {
        "pp": [0, 2], "ep": [0, 1], "dp_shard": [0], "fsdp": [0, 1], "data": [0, 1],
        "world": [0, 1, 2, 3],
    }  # fmt: skip
    assert (answers[3]["pp"], answers[3]["ep"], answers[3]["data"]) == ([1, 3], [2, 3], [2, 3])


def replicated_axes() -> tuple[tuple[str, ...], ...]:
    mesh = ProcessMesh(sizes(4, dp_replicate=2, ep=2), "cpu")
    names = (mesh.fsdp_mesh.mesh_dim_names, mesh.expert_fsdp_mesh.mesh_dim_names)
    assert (mesh.fsdp_mesh.size(), mesh.expert_fsdp_mesh.size()) == (4, 2)
    return names


def test_replicas_add_a_second_axis_to_the_sharding(four_ranks: Ranks):
    assert four_ranks(replicated_axes)[1] == (
        ("dp_replicate", "fsdp"),
        ("dp_replicate", "dp_shard"),
    )
