"""Matrices that lie in pieces on several ranks, brought together to be orthogonalised.

FSDP2 cuts a parameter along one dimension. Where that leaves matrices whole (a stack of experts,
cut between experts), every rank works on its own. Otherwise each matrix gets one owner: the ranks
send it their pieces in one all-to-all, it orthogonalises once, and a second all-to-all takes the
pieces back. Each rank sends and receives twice the elements it holds, in bf16 on CUDA, whatever the
number of ranks; gathering every matrix on every rank would receive all of them.

Source: Moonlight, arXiv:2502.16982, Algorithm 1 (gather, Newton-Schulz, keep a slice). Differs: one
owner for each matrix, where there every rank repeats the work.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonlit.optim.newton_schulz import orthogonalize

Shape = tuple[int, int, int]

ROUND_NUMEL = 2**26
"""Elements that an owner holds at a time, our default: two copies in bf16 are 256 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How the ranks of a group cut a tensor."""

    group: dist.ProcessGroup
    dim: int
    length: int
    """Of that dimension before the cut."""

    @property
    def lengths(self) -> list[int]:
        """Length of every rank's piece."""
        return lengths_of_pieces(self.length, self.group.size())

    def shape_on(self, rank: int, shape: torch.Size) -> torch.Size:
        """Return the shape of a rank's piece, given that of another rank's."""
        return torch.Size([*shape[: self.dim], self.lengths[rank], *shape[self.dim + 1 :]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What this rank holds of a parameter that Muon updates: plain tensors, views of its own."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    shape: Shape
    """(matrices, rows, columns), on this rank or, where it is cut, of all ranks of the cut."""
    cut: Cut | None
    """None where this rank's matrices are whole."""

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz step, up to a constant."""
        matrices, rows, columns = self.shape
        return matrices * rows * columns * min(rows, columns)


def on_this_rank(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, as a plain tensor that shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lengths_of_pieces(length: int, num_ranks: int) -> list[int]:
    """Cut a dimension as DTensor does: equal pieces, of which the last may be short or empty."""
    longest = -(-length // num_ranks)
    return [max(0, min(longest, length - rank * longest)) for rank in range(num_ranks)]


def sharded_axes(tensor: DTensor) -> list[tuple[int, int]]:
    """Return the axes of its mesh over which a tensor is cut, each with the dimension it cuts."""
    return [
        (axis, placement.dim)  # pyright: ignore[reportAttributeAccessIssue]
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    ]


def piece(param: Tensor, grad: Tensor, momentum: Tensor, shape: Shape, *, stacked: bool) -> Piece:
    """Describe what this rank holds of a parameter.

    Args:
        param: whole, or a DTensor.
        grad: laid out as it is.
        momentum: laid out as it is.
        shape: (matrices, rows, columns) of the whole parameter.
        stacked: the first dimension counts matrices, so that cutting it leaves them whole.

    Raises:
        ValueError: if matrices are cut over more than one axis of a mesh.
    """
    local = on_this_rank(param)
    cuts = []
    if isinstance(param, DTensor):
        cuts = [
            Cut(group=param.device_mesh.get_group(axis), dim=dim, length=param.shape[dim])
            for axis, dim in sharded_axes(param)
            if param.device_mesh.size(axis) > 1 and not (stacked and dim == 0)
        ]
    if len(cuts) > 1:
        raise ValueError(f"Muon needs matrices cut along one axis, got {cuts}")
    return Piece(
        param=local,
        grad=on_this_rank(grad),
        momentum=on_this_rank(momentum),
        shape=(len(local), *shape[1:]) if stacked else shape,
        cut=cuts[0] if cuts else None,
    )


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Split pieces into those to be updated together.

    Whole ones by shape, because they can share one batched call (a matrix and its transpose count
    as equal: Newton-Schulz commutes with transposition); cut ones by group, in rounds that bound
    the owners' memory.
    """
    whole: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
    rounds: dict[dist.ProcessGroup, list[list[Piece]]] = defaultdict(lambda: [[]])
    for one in pieces:
        if one.cut is None:
            whole[tuple(sorted(one.shape[1:]))].append(one)
            continue
        latest = rounds[one.cut.group][-1]
        if latest and numel([*latest, one]) > ROUND_NUMEL * one.cut.group.size():
            rounds[one.cut.group].append([one])
        else:
            latest.append(one)
    yield from whole.values()
    for of_group in rounds.values():
        yield from of_group


def numel(pieces: list[Piece]) -> int:
    """Elements of these pieces' matrices."""
    return sum(m * n * k for m, n, k in (one.shape for one in pieces))


def orthogonalized(pieces: list[Piece], updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalise one batch's matrices; ``updates`` and the result are laid out as the pieces."""
    cut = pieces[0].cut
    if cut is not None:
        return orthogonalized_by_owners(pieces, updates, cut.group)
    stacks = [u.view(one.shape) for one, u in zip(pieces, updates, strict=True)]
    return [u.view_as(one.param) for one, u in zip(pieces, orthogonalize(stacks), strict=True)]


def orthogonalized_by_owners(
    pieces: list[Piece], updates: list[Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send pieces to their matrices' owners, orthogonalise there, take them back."""
    cuts = [one.cut for one in pieces if one.cut is not None]
    ranks = range(group.size())
    owners = owners_by_cost([one.cost for one in pieces], group.size())
    owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in ranks]
    mine = owned[group.rank()]
    here = [[updates[i].shape for i in of_owner] for of_owner in owned]
    there = [[cuts[i].shape_on(rank, updates[i].shape) for i in mine] for rank in ranks]

    arrived = exchange(
        [[updates[i] for i in of_owner] for of_owner in owned], there, group, updates[0]
    )
    wholes = [
        torch.cat(parts, dim=cuts[i].dim)
        for i, parts in zip(mine, zip(*arrived, strict=True), strict=True)
    ]
    wholes = orthogonalize_by_shape(wholes, [pieces[i].shape for i in mine])
    split = [
        whole.split(cuts[i].lengths, dim=cuts[i].dim) for i, whole in zip(mine, wholes, strict=True)
    ]
    returned = exchange(
        [[parts[rank] for parts in split] for rank in ranks], here, group, updates[0]
    )

    by_index = {
        i: update
        for of_owner, from_owner in zip(owned, returned, strict=True)
        for i, update in zip(of_owner, from_owner, strict=True)
    }
    return [by_index[i].to(one.param.dtype) for i, one in enumerate(pieces)]


def owners_by_cost(costs: list[int], num_ranks: int) -> list[int]:
    """Give each matrix an owner, the costliest first, each to whoever has least to do."""
    load, owners = [0] * num_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(num_ranks), key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


def exchange(
    sent: list[list[Tensor]],
    expected: list[list[torch.Size]],
    group: dist.ProcessGroup,
    like: Tensor,
) -> list[list[Tensor]]:
    """Send each rank its tensors; return what each rank sends, given the shapes of it."""
    flat = [tensor.flatten() for to_rank in sent for tensor in to_rank]
    # Newton-Schulz begins by rounding to bf16 on CUDA: nothing is lost on the way.
    dtype = torch.bfloat16 if like.is_cuda else like.dtype
    message = torch.cat([like.new_empty(0, dtype=dtype), *(part.to(dtype) for part in flat)])
    sizes = [sum(tensor.numel() for tensor in to_rank) for to_rank in sent]
    expected_sizes = [sum(shape.numel() for shape in from_rank) for from_rank in expected]
    received = message.new_empty(sum(expected_sizes))
    dist.all_to_all_single(received, message, expected_sizes, sizes, group=group)
    parts = iter(received.split([shape.numel() for shapes in expected for shape in shapes]))
    return [[next(parts).view(shape) for shape in shapes] for shapes in expected]


def orthogonalize_by_shape(wholes: list[Tensor], shapes: list[Shape]) -> list[Tensor]:
    """Orthogonalise matrices of several shapes, those of one shape in batched calls."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        alike[tuple(sorted(shape[1:]))].append(i)
    result = list(wholes)
    for indices in alike.values():
        stacks = orthogonalize([wholes[i].view(shapes[i]) for i in indices])
        for i, stack in zip(indices, stacks, strict=True):
            result[i] = stack.reshape(wholes[i].shape)
    return result
