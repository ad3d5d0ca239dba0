"""Expert parallelism: each rank of the ``ep`` axis holds some of the experts; token rows travel.

A row is sent to the rank of its expert and comes back multiplied: one uneven all-to-all each way,
and one in each direction of the backward pass. The shared expert runs while rows are on their way.

Axes: T tokens on this rank, D model width, E experts, e experts on this rank, K experts per token,
R = T*K rows sent, A rows that arrive.
Source: Kimi K2, arXiv:2507.20534, Sec. 2.4.2 (the layout); the exchange is the usual one.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moonlit.distributed.mesh import ProcessMesh
from moonlit.models.layers import SwiGLU
from moonlit.models.moe.experts import Experts, in_product_dtype
from moonlit.models.moe.layer import MoELayer
from moonlit.models.moe.router import Routing


def shard_experts(model: nn.Module, mesh: ProcessMesh, **fsdp: Any) -> None:
    """Deal the experts of every MoE layer out over ``ep`` and shard each share by FSDP2.

    Call it once, before ``fully_shard`` of the layers around the experts, on a model that holds the
    same weights on every rank (or none, on the meta device). Each stack keeps its name and its
    global shape [E, ...], as a DTensor: cut by experts over ``ep``; over ``dp_shard`` by experts
    too where they suffice (matrices stay whole, so that Muon needs no communication), else by rows.
    Without expert parallelism it leaves the experts to their layers.

    A share's gradient is the sum of what all of ``ep`` sent: set FSDP2 to sum, not to average.

    Args:
        model: searched for MoE layers.
        mesh: where this process stands.
        **fsdp: handed to ``fully_shard`` (mixed precision, resharding).

    Raises:
        ValueError: if the ranks of ``ep`` do not divide the experts, or those of ``dp_shard``
            neither divide a rank's experts nor their rows.
    """
    if mesh.size("ep") == 1:
        return
    for module in model.modules():
        if isinstance(module, MoELayer):
            deal_out(module, mesh)
            dim = fsdp_dim(module.experts, mesh.size("dp_shard"))
            fully_shard(
                module.experts,
                mesh=mesh.expert_fsdp_mesh,
                shard_placement_fn=lambda _, dim=dim: Shard(dim),
                **fsdp,
            )


def deal_out(layer: MoELayer, mesh: ProcessMesh) -> None:
    """Keep this rank's experts of a layer only, and send rows where their experts are."""
    ep_mesh, experts = mesh.axis("ep"), layer.experts
    if len(experts.w_up_EDF) % ep_mesh.size():
        raise ValueError(
            f"{len(experts.w_up_EDF)} experts cannot be dealt out evenly over ep_size ="
            f" {ep_mesh.size()} ranks"
        )
    for name, weight in list(experts.named_parameters()):
        mine = distribute_tensor(weight.detach(), ep_mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(mine, requires_grad=weight.requires_grad))
    layer.mix = ExpertParallel(mesh.group("ep"))


def fsdp_dim(experts: Experts, num_shards: int) -> int:
    """Return the dimension of the stacks that FSDP cuts: whole experts if they can be shared."""
    num_experts, model_width, expert_width = experts.local(experts.w_up_EDF).shape
    if num_experts % num_shards == 0:
        return 0
    if model_width % num_shards or expert_width % num_shards:
        raise ValueError(
            f"dp_shard_size = {num_shards} divides neither the {num_experts} experts of a rank nor"
            f" both widths of an expert ({model_width} x {expert_width}): use one that does"
        )
    return 1


class ExpertParallel:
    """Mixes a layer's experts whose weights lie on other ranks of the group.

    Every rank of the group calls it equally often, with however many tokens it has, none included.

    Args:
        group: the ranks that share the experts, in the order of their shares.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, experts: Experts, shared_experts: SwiGLU, x: Float[Tensor, "T D"], routing: Routing
    ) -> Float[Tensor, "T D"]:
        """Return ``shared(x) + sum_k weight_k * expert_k(x)``."""
        top_k, num_ranks = routing.expert_ids_TK.shape[1], self.group.size()

        # Dispatch: rows in the order of their experts are in the order of their ranks.
        sent_E = routing.expert_ids_TK.flatten().bincount(minlength=routing.scores_TE.shape[1])
        arriving_PE = self.exchange_counts(sent_E.view(num_ranks, -1))
        num_sent = sent_E.view(num_ranks, -1).sum(dim=1)
        num_sent, num_arriving = torch.stack([num_sent, arriving_PE.sum(dim=1)]).tolist()
        order_R = routing.expert_ids_TK.flatten().argsort(stable=True)
        token_R = order_R // top_k
        x_RD = in_product_dtype(x).index_select(0, token_R)
        arrived_AD = self.exchange(x_RD, num_arriving, num_sent)

        shared_TD = shared_experts(x)  # while the rows travel

        # Compute. The combine weights stay where the tokens are.
        arrived_AD = wait_tensor(arrived_AD)
        expert_A = expert_of_arrived(arriving_PE)
        y_AD = experts(arrived_AD, torch.ones_like(arrived_AD[:, :1]), expert_A[:, None])

        # Combine: each row's product comes back to where the row was.
        y_RD = self.exchange(y_AD, num_sent, num_arriving).to(x.dtype)
        weight_R1 = routing.weights_TK.flatten()[order_R, None].to(x.dtype)
        return shared_TD.to(x.dtype).index_add(0, token_R, y_RD * weight_R1)

    def exchange_counts(self, sent_PE: Int[Tensor, "P e"]) -> Int[Tensor, "P e"]:
        """Tell every rank how many rows each of its experts gets from here."""
        arriving_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(arriving_PE, sent_PE, group=self.group)
        return arriving_PE

    def exchange(
        self, rows: Float[Tensor, "R D"], num_arriving: list[int], num_sent: list[int]
    ) -> Float[Tensor, "A D"]:
        """Send each rank its block of rows; returns at once, and whoever reads them waits."""
        return all_to_all_single_autograd(rows.contiguous(), num_arriving, num_sent, self.group)


def expert_of_arrived(arriving: Int[Tensor, "P e"]) -> Int[Tensor, " A"]:
    """Return the local expert of every row: rows come rank by rank, each by expert."""
    num_ranks, num_local = arriving.shape
    local_e = torch.arange(num_local, device=arriving.device).repeat(num_ranks)
    return local_e.repeat_interleave(arriving.flatten())
