"""Gradients of sharded and replicated parameters: their sum over ranks, their norm, clipping.

A replicated parameter is a plain tensor, the same on every rank. A sharded one is a ``DTensor``;
axes of its mesh without a shard hold copies, axes that its mesh lacks hold other parameters.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 64 * 2**20
"""Gradients summed in one call [bytes]; our default."""


def sum_over_ranks(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add the gradients of replicated parameters over all ranks; none counts as zero."""
    GradientSum(parameters, group).finish()


class GradientSum:
    """Adds the gradients of replicated parameters over ranks, bucket by bucket.

    Every rank sends the same buckets in the same order: last parameters first, as a backward pass
    makes them. ``behind_backward`` sends each as soon as it is complete, ``finish`` the rest.

    Args:
        parameters: alike on every rank.
        group: of the ranks.
        bucket_bytes: sent in one call, at most.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        *,
        bucket_bytes: int | None = None,
    ) -> None:
        self.group = group
        self.buckets = list(buckets(parameters[::-1], bucket_bytes or BUCKET_BYTES))
        self.missing = [set(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, dist.Work]] = []

    @contextmanager
    def behind_backward(self) -> Iterator[None]:
        """Send gradients during the backward pass in this block, the last one to add to them."""
        bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}

        def note(parameter: Any) -> None:
            self.missing[bucket_of[parameter]].discard(parameter)
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send_next()

        hooks = [p.register_post_accumulate_grad_hook(note) for p in bucket_of]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _send_next(self) -> None:
        bucket = self.buckets[len(self.sent)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        self.sent.append((flat, work))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is not yet under way, wait for everything, and put the sums in place."""
        while len(self.sent) < len(self.buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            gradients = [p.grad for p in bucket if p.grad is not None]
            parts = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(
                gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
            )


def buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Cut a list into runs of one dtype and of at most ``bucket_bytes`` (or one parameter)."""
    bucket: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        full = num_bytes + parameter.nbytes > bucket_bytes
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += parameter.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, each element counted once.

    Where there are sharded ones, every rank must call it.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    # Alike on all ranks, also on one whose shards count elsewhere: the sum below needs it.
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    zero = torch.zeros((), dtype=dtype, device=gradients[0].device)
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    squares = zero + sum_of_squares([g.to_local() for g in sharded if counts_here(g)], dtype)
    if sharded:
        dist.all_reduce(squares)
    return (squares + sum_of_squares(plain, dtype)).sqrt()


def counts_here(tensor: DTensor) -> bool:
    """Say whether this rank is the first of those that hold the same shard."""
    coordinates = tensor.device_mesh.get_coordinate() or []
    return all(
        coordinate == 0
        for coordinate, placement in zip(coordinates, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def sum_of_squares(tensors: list[Tensor], dtype: torch.dtype) -> Tensor | float:
    """Return the sum of all squares."""
    norms = [norm.to(dtype) for norm in torch._foreach_norm(tensors)] if tensors else []
    return torch.stack(norms).square().sum() if norms else 0.0


@torch.no_grad()
def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; return the norm before.

    Every rank must call it. Equals ``torch.nn.utils.clip_grad_norm_`` on one process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(
            [g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor
        )
    return norm
