"""How the processes of a run are laid out: one mesh with the axes pp, dp_replicate, dp_shard, ep.

- ``pp``: pipeline stages, each with its own layers; its ranks read the same rows.
- ``dp_replicate``: copies of the sharded model (HSDP).
- ``dp_shard``: FSDP2 shards of every parameter.
- ``ep``: experts are dealt out over it; everything else is sharded over it too.

So rows differ over the last three axes, which together are the data-parallel ranks; parameters are
sharded over ``fsdp`` = (dp_shard, ep), routed experts over dp_shard and, expert by expert, over ep.
The encoder is replicated on all ranks. This is K2's layout, PP x EP x ZeRO without tensor
parallelism (arXiv:2507.20534, Sec. 2.4.2).
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moonlit.models.shapes import DecoderShape

AXES = ("pp", "dp_replicate", "dp_shard", "ep")
FLATTENED = {"fsdp": ("dp_shard", "ep"), "data": ("dp_replicate", "dp_shard", "ep")}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSizes:
    """Ranks along each axis; their product is the number of processes."""

    pp: int
    dp_replicate: int
    dp_shard: int
    ep: int

    @classmethod
    def for_world(
        cls, world_size: int, *, pp: int, dp_replicate: int, dp_shard: int | None, ep: int
    ) -> "MeshSizes":
        """Complete the sizes for so many processes; ``dp_shard`` None takes what the others leave.

        Raises:
            ValueError: if a size is below one or the product is not the world, with the sum.
        """
        for axis, size in zip(AXES, (pp, dp_replicate, dp_shard, ep), strict=True):
            if size is not None and size < 1:
                raise ValueError(f"strategy.{axis}_size must be at least 1, got {size}")
        others = pp * dp_replicate * ep
        if dp_shard is None:
            if world_size % others:
                raise ValueError(
                    f"pp {pp} x dp_replicate {dp_replicate} x ep {ep} = {others} does not divide "
                    f"the {world_size} processes: {suggestion(world_size, others)}"
                )
            dp_shard = world_size // others
        if others * dp_shard != world_size:
            raise ValueError(
                f"pp {pp} x dp_replicate {dp_replicate} x dp_shard {dp_shard} x ep {ep} = "
                f"{others * dp_shard}, but there are {world_size} processes (trainer.devices x "
                f"trainer.num_nodes): {suggestion(world_size, others)}"
            )
        return cls(pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, ep=ep)

    @property
    def data_parallel(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard * self.ep

    def check_model(self, shape: DecoderShape, *, stages_per_rank: int = 1) -> None:
        """Refuse a model that cannot be laid out so.

        Args:
            shape: of the model.
            stages_per_rank: of the pipeline.

        Raises:
            ValueError: for experts that cannot be dealt out evenly, or layers that cannot be split.
        """
        if shape.num_experts % self.ep:
            fitting = [n for n in range(1, shape.num_experts + 1) if shape.num_experts % n == 0]
            raise ValueError(
                f"strategy.ep_size={self.ep} cannot share out the model's {shape.num_experts} "
                f"experts evenly ({shape.num_experts} / {self.ep} = "
                f"{shape.num_experts / self.ep:.4g} a rank): use one of {fitting}"
            )
        check_stages(shape.num_layers, self.pp, stages_per_rank)


def check_stages(num_layers: int, pp: int, stages_per_rank: int) -> None:
    """Refuse a pipeline with more stages than layers.

    Raises:
        ValueError: with the sum that does not work, and a suggestion.
    """
    if stages_per_rank < 1:
        raise ValueError(f"strategy.stages_per_rank must be at least 1, got {stages_per_rank}")
    if pp == 1 and stages_per_rank > 1:
        raise ValueError(
            f"strategy.stages_per_rank={stages_per_rank} needs a pipeline, but strategy.pp_size is "
            "1: set it to 2 or more, or stages_per_rank to 1"
        )
    if num_layers < pp * stages_per_rank:
        fewer = (
            f"stages_per_rank={num_layers // pp}" if num_layers >= pp else f"pp_size={num_layers}"
        )
        raise ValueError(
            f"strategy.pp_size={pp} x stages_per_rank={stages_per_rank} = {pp * stages_per_rank} "
            f"stages need a layer each, but the model has {num_layers} layers: use at most {fewer}"
        )


def suggestion(world_size: int, others: int) -> str:
    """Say which change of the number of processes or of dp_shard would work."""
    if world_size % others == 0:
        return f"use strategy.dp_shard_size={world_size // others}, or leave it null"
    fewer, more = world_size // others * others, -(-world_size // others) * others
    counts = f"{fewer} or {more}" if fewer else f"{more}"
    return f"use {counts} processes, or sizes whose product divides {world_size}"


def check_devices(devices: list[torch.device], backend: str) -> None:
    """Refuse mixed devices, and NCCL without GPUs.

    Raises:
        ValueError: naming what there is and what to use.
    """
    kinds = sorted({device.type for device in devices})
    if len(kinds) > 1:
        raise ValueError(
            f"devices of one kind are needed, got {' and '.join(kinds)}: use trainer.accelerator="
            f"{kinds[-1]} on every process"
        )
    if "nccl" in backend and kinds != ["cuda"]:
        raise ValueError(
            f"strategy.process_group_backend={backend} needs CUDA devices, got {kinds[0]}: use "
            "gloo, or leave it null"
        )


class ProcessMesh:
    """The run's processes on their axes, with a process group for every axis.

    Axes by name: the four of ``AXES``, ``fsdp`` and ``data`` (see above), and ``world``.

    Args:
        sizes: ranks along each axis.
        device_type: ``cpu`` or ``cuda``.
    """

    def __init__(self, sizes: MeshSizes, device_type: str) -> None:
        self.sizes = sizes
        shape = tuple(getattr(sizes, axis) for axis in AXES)
        if prod(shape) != dist.get_world_size():
            raise ValueError(f"a mesh of {shape} does not fit {dist.get_world_size()} processes")
        self.device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        self._flat = {
            name: self.device_mesh[axes]._flatten(name) for name, axes in FLATTENED.items()
        }

    def axis(self, name: str) -> DeviceMesh:
        """Return the one-dimensional mesh of an axis."""
        return self._flat[name] if name in self._flat else self.device_mesh[name]

    def group(self, name: str) -> dist.ProcessGroup:
        """Return the process group of this rank along an axis; ``world`` is everyone."""
        if name == "world":
            return dist.group.WORLD  # pyright: ignore[reportReturnType]  # set once initialised
        return self.axis(name).get_group()

    def size(self, name: str) -> int:
        """Ranks along an axis."""
        return dist.get_world_size() if name == "world" else self.axis(name).size()

    def rank(self, name: str) -> int:
        """This process' place along an axis."""
        return dist.get_rank() if name == "world" else self.axis(name).get_local_rank()

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """What ``fully_shard`` takes for everything but routed experts: HSDP if replicated."""
        return self._sharding("fsdp")

    @cached_property
    def expert_fsdp_mesh(self) -> DeviceMesh:
        """What ``fully_shard`` takes for routed experts, which ``ep`` has already dealt out."""
        return self._sharding("dp_shard")

    def _sharding(self, name: str) -> DeviceMesh:
        if self.sizes.dp_replicate == 1:
            return self.axis(name)
        with warnings.catch_warnings():  # torch warns of its own way to slice a flattened axis
            warnings.simplefilter("ignore")
            return self.device_mesh["dp_replicate", name]

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different rows."""
        return self.size("data")

    @property
    def data_parallel_rank(self) -> int:
        """This process' place among those that read different rows."""
        return self.rank("data")

    def coordinates(self) -> str:
        """Say where this process stands, for messages: ``pp 0, dp_replicate 0, ...``."""
        return ", ".join(f"{axis} {self.rank(axis)}" for axis in AXES if self.size(axis) > 1)
