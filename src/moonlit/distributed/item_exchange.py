"""Visual items on their way: patches to the ranks that encode them, features and gradients back.

An item is a run of rows of a tensor, its home the rank whose microbatches hold it, its owner the
rank that encodes it. Every rank knows all grids, so it knows how much comes from whom.

Axes: N items of the global batch in the order of their home ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor

from moonlit.distributed.vision_balance import Grid, assign, encoding_cost
from moonlit.models.shapes import EncoderShape


@dataclass(frozen=True, slots=True)
class ItemExchange:
    """The items of one optimizer step over all ranks, and who encodes which."""

    grids: list[Grid]
    homes: list[int]
    owners: list[int]
    rank: int
    group: dist.ProcessGroup

    @classmethod
    def plan(
        cls, grid_thw: Int[Tensor, "N 3"], shape: EncoderShape, group: dist.ProcessGroup
    ) -> "ItemExchange":
        """Tell all ranks the sizes of this rank's items, and share out the work.

        Args:
            grid_thw: of the items whose home is this rank; may be none.
            shape: of the encoder.
            group: the ranks that encode, all of which must call.
        """
        by_rank = gather_rows(grid_thw, group)
        grids: list[Grid] = [(t, h, w) for rows in by_rank for t, h, w in rows.tolist()]
        homes = [rank for rank, rows in enumerate(by_rank) for _ in rows]
        costs = [encoding_cost(grid, shape) for grid in grids]
        owners = assign(costs, homes, len(by_rank))
        return cls(grids, homes, owners, dist.get_rank(group), group)

    @property
    def at_home(self) -> list[int]:
        """Items of this rank's microbatches."""
        return [item for item, home in enumerate(self.homes) if home == self.rank]

    @property
    def owned(self) -> list[int]:
        """Items that this rank encodes."""
        return [item for item, owner in enumerate(self.owners) if owner == self.rank]

    def patches(self, item: int) -> int:
        """Rows that an item has as patches."""
        t, h, w = self.grids[item]
        return t * h * w

    def tokens(self, item: int) -> int:
        """Rows that an item has as merged features."""
        _, h, w = self.grids[item]
        return h * w // 4

    def pixels_to_owners(self, pixel_values: Shaped[Tensor, "P ..."]) -> "UnderWay":
        """Send the patches of the items at home; those of the owned items will arrive."""
        sizes = [self.patches(item) for item in range(len(self.grids))]
        return self._move(pixel_values, sizes, source=self.homes, target=self.owners)

    def features_home(self, features: Shaped[Tensor, "M D"]) -> Shaped[Tensor, "M2 D"]:
        """Send the features of the owned items; return those of the items at home."""
        sizes = [self.tokens(item) for item in range(len(self.grids))]
        return self._move(features, sizes, source=self.owners, target=self.homes).arrived()

    def gradients_to_owners(self, gradients: Shaped[Tensor, "M D"]) -> Shaped[Tensor, "M2 D"]:
        """Send gradients of features the way their patches went."""
        sizes = [self.tokens(item) for item in range(len(self.grids))]
        return self._move(gradients, sizes, source=self.homes, target=self.owners).arrived()

    def _move(
        self,
        rows: Shaped[Tensor, "R ..."],
        sizes: list[int],
        *,
        source: Sequence[int],
        target: Sequence[int],
    ) -> "UnderWay":
        """Exchange runs of rows; on both sides they lie in the order of the global batch."""
        outgoing = [item for item, rank in enumerate(source) if rank == self.rank]
        incoming = [item for item, rank in enumerate(target) if rank == self.rank]
        num_ranks = dist.get_world_size(self.group)

        # By rank, and inside a rank in global order: what the all-to-all wants and what it gives.
        send_order = sorted(outgoing, key=lambda item: target[item])
        receive_order = sorted(incoming, key=lambda item: source[item])
        send_sizes, receive_sizes = [0] * num_ranks, [0] * num_ranks
        for item in outgoing:
            send_sizes[target[item]] += sizes[item]
        for item in incoming:
            receive_sizes[source[item]] += sizes[item]

        sent = reordered(rows, outgoing, send_order, sizes)
        received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, sent, receive_sizes, send_sizes, group=self.group, async_op=True
        )
        assert work is not None
        return UnderWay(work, sent, received, receive_order, incoming, sizes)


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Runs of rows on their way to this rank; ``sent`` must live until they have arrived."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    order: list[int]
    wanted: list[int]
    sizes: list[int]

    def arrived(self) -> Shaped[Tensor, "R ..."]:
        """Wait for the rows, and return them in the order of the global batch."""
        self.work.wait()
        return reordered(self.received, self.order, self.wanted, self.sizes)


def reordered(
    rows: Shaped[Tensor, "R ..."], order: list[int], wanted: list[int], sizes: list[int]
) -> Shaped[Tensor, "R ..."]:
    """Bring runs of rows from one order of items into another."""
    if order == wanted:
        return rows.contiguous()
    run_of_item = dict(zip(order, rows.split([sizes[item] for item in order]), strict=True))
    return torch.cat([run_of_item[item] for item in wanted])


def gather_rows(rows: Int[Tensor, "N 3"], group: dist.ProcessGroup) -> list[Int[Tensor, "_ 3"]]:
    """Return every rank's few integers, on the host."""
    num_ranks = dist.get_world_size(group)
    counts = [rows.new_empty(1) for _ in range(num_ranks)]
    dist.all_gather(counts, rows.new_tensor([len(rows)]), group=group)
    lengths = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(lengths), 3)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(num_ranks)]
    if len(padded):
        dist.all_gather(gathered, padded, group=group)
    return [part[:length].cpu() for part, length in zip(gathered, lengths, strict=True)]
