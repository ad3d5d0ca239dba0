"""QK-Clip: rescale the query and key weights of every head whose attention logits grew too large.

Axes: L attention layers, H heads.
Source: Kimi K2, arXiv:2507.20534, Sec. 2.1 and Algorithm 1. The mapping to the latent (MLA)
tensors is ours: a query's no-position and rope rows lie one after the other in each head.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moonlit.optim.matrix_shards import lengths_of_pieces, on_this_rank, sharded_axes


@runtime_checkable
class LatentAttention(Protocol):
    """What QK-Clip needs of an attention; any module with these attributes is clipped."""

    max_logits_H: Float[Tensor, " H"]
    """Largest scaled logit of each head over every microbatch since the last reset."""
    logit_threshold: float
    """Logits below it need no exact measurement."""
    measure_logits: str
    """``off``, ``bounded`` (exact above the threshold) or ``exact``."""
    num_heads: int
    qk_nope_head_dim: int
    kv_b_proj: nn.Linear

    def reset_max_logits(self) -> None:
        """Begin a new measurement."""
        ...


class QKClip:
    """Keeps every head's largest logit at or below ``threshold``, one optimizer step late.

    With S the largest logit of a head and gamma = threshold / S < 1, the head's no-position query
    and key weights are multiplied by sqrt(gamma) and its rope query weights by gamma. The rope
    key is shared by all heads and stays. Heads below the threshold keep their bits.

    Turns on the measurement in every attention that is trained (an ``exact`` one stays exact); a
    frozen one is neither measured nor clipped.

    Args:
        model: searched for modules with the attributes of ``LatentAttention``.
        threshold: tau, the largest logit allowed [unitless]; 100 in Kimi K2.
        process_group: ranks over which a head's largest logit is taken where its weights are not
            sharded; None means all of them. Sharded ones know their ranks.

    Raises:
        ValueError: if the threshold is not positive or the model has no such attention.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if threshold <= 0:
            raise ValueError(f"qk_clip_threshold must be positive, got {threshold}")
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LatentAttention)
        }
        if not found:
            raise ValueError(
                f"qk_clip_threshold={threshold} needs attention modules that measure max_logits_H;"
                f" {type(model).__name__} has none (set it to null to train without QK-Clip)"
            )
        self.attentions = {n: a for n, a in found.items() if query_weight(a).requires_grad}
        self.threshold = threshold
        self.process_group = process_group
        for attention in self.attentions.values():
            attention.logit_threshold = threshold
            if attention.measure_logits == "off":
                attention.measure_logits = "bounded"
        self.max_logits_LH: Float[Tensor, "L H"] | None = None
        """What the last step measured, before its clip."""
        self.clipped_heads_LH: Bool[Tensor, "L H"] | None = None
        """The heads that the last step clipped."""

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """Groups of the ranks that run the same layers on other rows.

        Sharded weights lie on just those: the axes of their mesh. A pipeline's other stages do not.
        """
        weight = query_weight(next(iter(self.attentions.values())))
        if isinstance(weight, DTensor):
            return list(weight.device_mesh.get_all_groups())
        return [self.process_group] if dist.is_initialized() else []

    def apply(self) -> None:
        """Clip by what was measured since the last call, then begin a new measurement.

        A layer without a gradient (in a skipped step) is left as it is. Reads nothing back from
        the device.
        """
        if not self.attentions:
            return
        max_logits_LH = torch.stack([a.max_logits_H for a in self.attentions.values()])
        for group in self.groups:
            dist.all_reduce(max_logits_LH, dist.ReduceOp.MAX, group=group)
        updated_L = torch.tensor(
            [query_weight(a).grad is not None for a in self.attentions.values()],
            device=max_logits_LH.device,
        )
        clipped_LH = (max_logits_LH > self.threshold) & updated_L[:, None]
        gamma_LH = torch.where(clipped_LH, self.threshold / max_logits_LH, 1.0)
        for attention, gamma_H in zip(self.attentions.values(), gamma_LH, strict=True):
            rescale_heads(attention, gamma_H)
            attention.reset_max_logits()
        self.max_logits_LH, self.clipped_heads_LH = max_logits_LH, clipped_LH


@torch.no_grad()
def rescale_heads(attention: LatentAttention, gamma_H: Float[Tensor, " H"]) -> None:
    """Multiply the logits of each head by its ``gamma`` through the weights that make them."""
    query, key_value = query_weight(attention), attention.kv_b_proj.weight
    for weight, gamma_of_the_rest_H in ((query, gamma_H), (key_value, torch.ones_like(gamma_H))):
        rows = len(weight) // attention.num_heads
        factor_HR = gamma_of_the_rest_H[:, None].repeat(1, rows)
        factor_HR[:, : attention.qk_nope_head_dim] = gamma_H.sqrt()[:, None]
        factor = rows_on_this_rank(factor_HR.flatten(), weight)
        on_this_rank(weight).mul_(factor[:, None].to(weight.dtype))


def rows_on_this_rank(values: Float[Tensor, " rows"], weight: Tensor) -> Float[Tensor, " _"]:
    """Cut one value a row as the rows of a weight are cut over ranks."""
    if not isinstance(weight, DTensor):
        return values
    for axis, dim in sharded_axes(weight):
        if dim != 0:
            raise ValueError(f"QK-Clip needs weights cut by rows, got {weight.placements}")
        lengths = lengths_of_pieces(len(values), weight.device_mesh.size(axis))
        values = values.split(lengths)[weight.device_mesh.get_local_rank(axis)]
    return values


def query_weight(attention: LatentAttention) -> nn.Parameter:
    """The weight that makes the queries: of ``q_b_proj``, or of ``q_proj`` without a query rank."""
    projection = getattr(attention, "q_b_proj", None) or attention.q_proj  # pyright: ignore
    return projection.weight
