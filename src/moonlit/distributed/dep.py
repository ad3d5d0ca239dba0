"""The strategy of many processes: FSDP2 for the backbone, the Decoupled Encoder Process for vision.

``moonlit train strategy=dep trainer.devices=N`` trains any phase so; without GPUs the processes
speak gloo. What it gives a phase: ``encoder_process`` and ``backbone_process``, sums over the
data-parallel ranks, and the knowledge which rows are its own.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 4.5.1; K2's layout (arXiv:2507.20534,
Sec. 2.4.2).
"""

from collections.abc import Callable
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from typing_extensions import override

from moonlit.batch import PackedBatch
from moonlit.distributed.backbone import Backbone, LossSum, ShardedBackbone
from moonlit.distributed.decoupled_encoder import DecoupledEncoder, check_recompute
from moonlit.distributed.encoder_process import InlineEncoder, ReplicatedInlineEncoder
from moonlit.distributed.heartbeat import suspects
from moonlit.distributed.initial_model import InitialModel
from moonlit.distributed.launcher import (
    RankLauncher,
    await_others,
    end_with_launcher,
    started_by_launcher,
)
from moonlit.distributed.look_ahead import LookAhead
from moonlit.distributed.mesh import MeshSizes, ProcessMesh, check_devices
from moonlit.distributed.pipeline import PipelineBackbone
from moonlit.distributed.sharded_checkpoint import (
    ShardedWriter,
    load_sharded,
    optimizer_tensors,
)
from moonlit.distributed.sharding import require_equal, shard
from moonlit.distributed.whereabouts import WHEREABOUTS, at
from moonlit.hub.reader import materialise
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape
from moonlit.models.stages import DecoderStage, cut_layers, keep_layers

ENCODERS = ("decoupled", "inline")
ZERO_STAGES = (1, 2, 3)
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class DEPStrategy(ModelParallelStrategy):
    """Lays the processes out on a mesh, shards the backbone, decouples the encoder.

    Args:
        pp_size: ranks that a pipeline's stages lie on.
        stages_per_rank: of the pipeline; above 1 they are interleaved: less waiting, more traffic.
        dp_replicate_size: copies of the sharded model.
        dp_shard_size: FSDP2 shards beside ``ep``; None: what the other sizes leave.
        ep_size: ranks that experts are dealt out to.
        zero_stage: 3 frees a layer's weights after its forward, 2 keeps them through the step, 1
            also sums gradients once a step (K2 trains with ZeRO-1).
        encoder: ``decoupled``, or ``inline`` in each microbatch's graph.
        recompute: ``always``, ``never`` or ``auto``: see ``DecoupledEncoder``.
        patch_budget: patches encoded at once.
        overlap: the encoder communicates behind computation: the next step's patches behind the
            backbone, its own gradients behind its backward pass. The numbers are the same.
        process_group_backend: None: nccl on CUDA, gloo elsewhere.
        timeout_s: a rank that waits longer in one collective ends the run [s].
        run_dir: folder that all processes share.
    """

    sums_gradients = True
    """Gradients are summed over ranks; a phase divides by the global token count alone."""
    mesh: ProcessMesh

    def __init__(
        self,
        *,
        pp_size: int,
        stages_per_rank: int,
        dp_replicate_size: int,
        dp_shard_size: int | None,
        ep_size: int,
        zero_stage: int,
        encoder: str,
        recompute: str,
        patch_budget: int,
        overlap: bool,
        process_group_backend: str | None,
        timeout_s: float,
        run_dir: str,
    ) -> None:
        if encoder not in ENCODERS:
            raise ValueError(f"strategy.encoder must be one of {list(ENCODERS)}, got {encoder!r}")
        if zero_stage not in ZERO_STAGES:
            raise ValueError(
                f"strategy.zero_stage must be one of {list(ZERO_STAGES)}, got {zero_stage}"
            )
        check_recompute(recompute, patch_budget)
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=2 * timeout_s),  # the watch below is first, and says more
        )
        self.pp_size, self.stages_per_rank = pp_size, stages_per_rank
        self.dp_replicate_size = dp_replicate_size
        self.dp_shard_size, self.ep_size = dp_shard_size, ep_size
        self.stages: list[DecoderStage] = []
        self.initial: InitialModel | None = None
        self.zero_stage, self.encoder = zero_stage, encoder
        self.recompute, self.patch_budget, self.overlap = recompute, patch_budget, overlap
        self.look_ahead: LookAhead | None = None
        self.decoupled: DecoupledEncoder | None = None
        self.timeout_s, self.run_dir = timeout_s, run_dir

    @cached_property
    def sizes(self) -> MeshSizes:
        """Ranks along each axis, completed for this run's processes."""
        return MeshSizes.for_world(
            self.world_size,
            pp=self.pp_size,
            dp_replicate=self.dp_replicate_size,
            dp_shard=self.dp_shard_size,
            ep=self.ep_size,
        )

    def check_layout(self, shape: DecoderShape, *, samples: bool = False) -> None:
        """Refuse a layout that cannot work, before any process is started.

        Args:
            shape: of the decoder.
            samples: whether every rank samples from the whole model, as RL does.

        Raises:
            ValueError: with the sum that does not work, and a suggestion.
        """
        check_devices(list(self.parallel_devices or []), self._get_process_group_backend())
        self.sizes.check_model(shape, stages_per_rank=self.stages_per_rank)
        if samples and self.pp_size > 1:
            raise ValueError(
                f"strategy.pp_size={self.pp_size}: this phase samples from a copy of the whole "
                "model, and a pipeline's ranks have a part of it each: use pp_size=1, and "
                "dp_shard_size or ep_size to spread the model"
            )

    # What a phase and its data ask for.

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different rows."""
        return self.mesh.data_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """This process' place among those that read different rows."""
        return self.mesh.data_parallel_rank

    def over_stages(self, named: dict[str, Any]) -> dict[str, Any]:
        """Return what every stage of the pipeline has by name, in the order of the layers."""
        if self.pp_size == 1:
            return named
        parts: list[Any] = [None] * self.pp_size
        mine = {name: value.cpu() for name, value in named.items()}
        dist.all_gather_object(parts, mine, group=self.mesh.group("pp"))
        union = {name: value for part in parts for name, value in part.items()}
        return dict(sorted(union.items(), key=lambda item: numbers_in(item[0])))

    def encoder_process(self, model: Kimi) -> DecoupledEncoder | InlineEncoder:
        """Return how this rank takes part in encoding."""
        if model.vision_shape is None:
            return InlineEncoder(model)
        if self.encoder == "inline":
            return ReplicatedInlineEncoder(model, self.mesh.group("world"))
        self.decoupled = DecoupledEncoder(
            model,
            group=self.mesh.group("world"),
            holds_rows=self.mesh.rank("pp") == 0,
            recompute=self.recompute,
            patch_budget=self.patch_budget,
            overlap=self.overlap,
            coming=self.coming_step,
        )
        for optimizer in self.optimizers:  # torch's own update all parameters at once
            when_updated = getattr(optimizer, "when_updated", None)
            if self.overlap and when_updated is not None:
                when_updated(self.decoupled.trained, self.decoupled.encode_early)
        return self.decoupled

    def coming_step(self) -> list[PackedBatch] | None:
        """Return the microbatches of the next step, where they are known and will be trained."""
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if self.look_ahead is None or trainer is None:
            return None
        is_last = 0 <= trainer.max_steps <= trainer.global_step + 1
        return None if is_last else self.look_ahead.coming()

    def backbone_process(
        self, model: Kimi, *, loss: LossSum, backward: Callable[[Tensor], None]
    ) -> Backbone:
        """Return how this rank runs the backbone."""
        if self.stages:
            group = self.mesh.group("pp")
            return PipelineBackbone(
                model, self.stages, group, loss=loss, zero_stage=self.zero_stage
            )
        return ShardedBackbone(model, loss=loss, backward=backward, zero_stage=self.zero_stage)

    def build(self, make: Callable[[], Kimi]) -> Kimi:
        """Build a phase's model: without memory, where it can be filled once it is cut."""
        if not isinstance(make, InitialModel):
            return make()
        self.initial = make
        return make.empty()

    # Lightning's hooks, in the order in which it calls them.

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = RankLauncher(
                self.cluster_environment,
                self.num_processes,
                self.num_nodes,
                overrides=(f"run_dir={self.run_dir}", "hydra.output_subdir=null"),
            )

    @override
    def setup_environment(self) -> None:
        """Join the other processes and find this one's place."""
        super(ModelParallelStrategy, self).setup_environment()
        reset_seed()
        self.set_world_ranks()
        backend = self._process_group_backend = self._get_process_group_backend()
        on_gpu = self.root_device.type == "cuda"
        assert self.cluster_environment is not None
        _init_dist_connection(
            self.cluster_environment,
            backend,
            timeout=self._timeout,
            device_id=self.root_device if on_gpu else None,
        )
        self.mesh = ProcessMesh(self.sizes, self.root_device.type)
        self._device_mesh = self.mesh.device_mesh
        group: Any = dist.new_group(backend="gloo")  # writing must not meet training's collectives
        self.writer = ShardedWriter(group)
        end_with_launcher(self.global_rank)
        WHEREABOUTS.watch(
            rank=self.global_rank,
            timeout_s=self.timeout_s,
            suspects=partial(suspects, Path(self.run_dir)),
        )

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        """Shard the model that the phase has built, then let Lightning make the optimizer."""
        phase: Any = self.lightning_module
        if not any(isinstance(module, FSDPModule) for module in phase.model.modules()):
            model: Kimi = phase.model
            if self.initial is None:
                model.to(self.root_device)
                require_equal(model)
            if self.pp_size > 1:
                self.check_precision(trainer)
                self.stages = keep_layers(model, self.layers(model.decoder_shape))
            shard(model, self.mesh, zero_stage=self.zero_stage, stages=self.stages)
            if self.initial is not None:
                for root in (model, *self.stages):  # a stage's own shards notice only through it
                    materialise(root, self.root_device)
                self.initial.fill(model)
        super().setup(trainer)

    def check_precision(self, trainer: lightning.Trainer) -> None:
        """Refuse to scale losses where the schedule goes backward, not Lightning."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"trainer.precision={trainer.precision} scales the loss, which a pipeline "
                "(strategy.pp_size above 1) does not: use bf16-mixed, bf16-true or 32-true"
            )

    def layers(self, shape: DecoderShape) -> list[range]:
        """Return the layers of this rank's pipeline stages."""
        cut = cut_layers(shape.num_layers, self.pp_size * self.stages_per_rank)
        return cut[self.mesh.rank("pp") :: self.pp_size]

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Read a planned loader of training steps through a look-ahead."""
        if not getattr(dataloader, "is_planned", False):
            return dataloader
        loader: Any = dataloader
        to_device = partial(move_data_to_device, device=self.root_device)
        self.look_ahead = LookAhead(loader, to_device=to_device)
        return self.look_ahead

    @override
    def on_train_end(self) -> None:
        """Leave nothing on the wire."""
        if self.decoupled is not None:
            self.decoupled.finish()

    @override
    def reduce(
        self,
        tensor: Tensor | Any,
        group: Any | None = None,
        reduce_op: Any | None = "mean",
    ) -> Any:
        """Reduce over the ranks that read different rows, or over ``group``."""
        if not isinstance(tensor, Tensor):
            return tensor
        group = self.mesh.group("data") if group is None else group
        name = "mean" if reduce_op is None else str(reduce_op).rpartition(".")[2].lower()
        result = tensor.clone()
        if name in ("mean", "avg"):
            dist.all_reduce(result, group=group)
            return result / dist.get_world_size(group)
        dist.all_reduce(result, REDUCTIONS[name], group=group)
        return result

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Say whether all ranks, or any, decided so."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else int(votes) > 0

    # Checkpoints: folders of shards, see ``sharded_checkpoint``.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, this rank's shards of them."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's tensors by name, this rank's shards of them."""
        plain: Any = getattr(optimizer, "optimizer", optimizer)
        assert self.lightning_module is not None
        return optimizer_tensors(plain, self.lightning_module)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Begin to write a folder; ``finish_saving`` waits for it."""
        if storage_options is not None:
            raise ValueError(f"storage_options must be None, got {storage_options}")
        path = Path(self.broadcast(str(filepath)))
        tensors = dict(checkpoint.pop("state_dict"))
        for state in checkpoint.pop("optimizer_states", []):
            tensors |= state
        with at(f"saving {path}"):
            self.writer.save(tensors, checkpoint, path)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        if hasattr(self, "writer"):
            self.writer.finish()

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder into model and optimizer, whatever layout wrote it."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        optimizer = self.optimizers[0] if self.optimizers else None
        return load_sharded(path, self.lightning_module, optimizer, weights_only=weights_only)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Let the rank that failed first be named before this one ends of the consequences."""
        if isinstance(self._launcher, RankLauncher):
            self._launcher.await_verdict()
        elif started_by_launcher():
            await_others(exception)

    @override
    def teardown(self) -> None:
        """Finish what is being written."""
        self.finish_saving()
        super().teardown()


def numbers_in(name: str) -> list[int]:
    """Return the numbers in a parameter's name: what its layer is sorted by."""
    return [int(part) for part in name.split(".") if part.isdigit()]
