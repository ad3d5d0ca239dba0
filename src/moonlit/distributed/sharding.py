"""FSDP2 over the backbone; tower and projector stay whole on every rank.

Gradients are summed over ranks, not averaged: a phase divides by the global token count itself.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from moonlit.distributed.encoder_process import encoder_parts
from moonlit.distributed.expert_parallel import shard_experts
from moonlit.distributed.mesh import ProcessMesh
from moonlit.models.kimi import Kimi
from moonlit.models.stages import DecoderStage


def shard(
    model: Kimi, mesh: ProcessMesh, *, zero_stage: int, stages: Sequence[DecoderStage] = ()
) -> None:
    """Shard every decoder layer as a unit, and embedding, head and final norm as one more.

    The last unit stays whole from a forward to its backward, so that a loss may use the head's
    weight outside the head's own forward. Experts that ``ep`` has dealt out are sharded over what
    is left, ``dp_shard``.

    Args:
        model: the same on every rank of a pipeline stage; in place.
        mesh: of the run.
        zero_stage: see ``ShardedBackbone``.
        stages: what runs in the model's stead: each is sharded as a model is.
    """
    reshard = zero_stage == 3
    shard_experts(model, mesh, reshard_after_forward=reshard)
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh.fsdp_mesh, reshard_after_forward=reshard)
    replicated = {p for part in encoder_parts(model) for p in part.parameters()}
    for root in stages or [model]:
        fully_shard(
            root, mesh=mesh.fsdp_mesh, reshard_after_forward=False, ignored_params=replicated
        )
    for module in (m for root in (model, *stages) for m in root.modules()):
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def require_equal(model: nn.Module) -> None:
    """Refuse ranks that did not build the same weights: the sums of their tensors must agree.

    Raises:
        RuntimeError: naming a tensor that differs.
    """
    named = model.state_dict()
    sums = torch.stack([tensor.double().sum() for tensor in named.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    different = [n for n, bad in zip(named, (low != high).tolist(), strict=True) if bad]
    if different:
        raise RuntimeError(
            f"the ranks built different weights ({len(different)} tensors, the first is "
            f"{different[0]}): give every rank the same seed and the same init_from"
        )
