"""The Decoupled Encoder Process: every rank encodes its fair share of the global batch's media.

Three stages around the backbone, in which all ranks take part whatever their rows hold:

1. Balanced vision forward: grid sizes to everyone, patches to their owners as uint8, encoding
   without a graph, features home.
2. The backbone runs with features as leaves, under any text-only strategy.
3. Recompute and backward: gradients of the features to the owners, which encode again with a graph
   and go backward from them; the encoder's gradients are summed over all ranks.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 4.5.1. Ours, where it states nothing:
the projector belongs to the encoder; stage 3 keeps stage 1's assignment; with memory to spare
stage 1 keeps its graph and stage 3 recomputes nothing; the next step's patches travel while the
backbone runs, and are encoded while it is updated; the encoder's gradients are summed behind its
backward pass.

Axes: P patches, M merged vision tokens, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.background import Background
from moonlit.distributed.encoder_process import (
    encoder_device,
    no_media,
    trained_encoder_parameters,
)
from moonlit.distributed.gradients import GradientSum
from moonlit.distributed.graph_memory import GraphMemory
from moonlit.distributed.item_exchange import ItemExchange, UnderWay
from moonlit.distributed.look_ahead import same_media
from moonlit.distributed.vision_balance import chunks
from moonlit.distributed.whereabouts import at
from moonlit.models.kimi import Kimi

RECOMPUTE = ("always", "never", "auto")


@dataclass(slots=True)
class Encoded:
    """A chunk of owned items: its patches to encode again, or its features with their graph."""

    media: PackedMedia
    features: Float[Tensor, "M D"]
    keeps_graph: bool


@dataclass(slots=True)
class Gathered:
    """The media of a step: who encodes what, and the patches on their way there."""

    microbatches: Sequence[PackedBatch]
    exchange: ItemExchange
    pixels: UnderWay
    encoded: Callable[[], list[Encoded]] | None = None
    """Waits for the owned items, where they are being encoded already."""


class DecoupledEncoder:
    """Encodes the global batch in equal shares; a phase sees only ``around``.

    Args:
        model: holds a copy of tower and projector, equal on all ranks.
        group: all ranks, of all pipeline stages.
        holds_rows: whether this rank's rows feed a backbone's first stage; elsewhere they are
            another rank's, and their media are left to it.
        recompute: ``always`` as in the report, ``never``, or ``auto``: keep the graph of as many
            chunks as fit into the memory that was measured to be free.
        patch_budget: patches encoded at once; a larger item goes alone.
        overlap: communicate behind computation where that can be; the numbers are the same.
        coming: returns the next step's microbatches, or None where they are not known.
    """

    def __init__(
        self,
        model: Kimi,
        *,
        group: dist.ProcessGroup,
        holds_rows: bool,
        recompute: str,
        patch_budget: int,
        overlap: bool,
        coming: Callable[[], Sequence[PackedBatch] | None],
    ) -> None:
        if model.vision_shape is None:
            raise ValueError("the Decoupled Encoder Process needs a model with an encoder")
        self.model, self.group, self.holds_rows = model, group, holds_rows
        self.vision_shape = model.vision_shape
        self.patch_budget, self.overlap, self.coming = patch_budget, overlap, coming
        self.early: Gathered | None = None
        self.trained = trained_encoder_parameters(model)
        self.memory = GraphMemory(recompute, encoder_device(model))
        self.background = Background(encoder_device(model))

    @contextmanager
    def around(self, microbatches: Sequence[PackedBatch]) -> Iterator[list[Tensor | None]]:
        """Yield the features [M, D] of each microbatch as leaves; reap their gradients after."""
        gathered, self.early = self.early, None
        if gathered is None or not same_media(gathered.microbatches, microbatches):
            gathered = self.gather(microbatches)
        exchange = gathered.exchange
        encode = gathered.encoded or partial(self.encode, gathered)
        encoded = encode()
        leaves = self.leaves(exchange, encoded, microbatches)
        coming = self.coming() if self.overlap else None
        self.memory.backbone_begins()
        if coming is not None:
            self.early = self.gather(coming)
        yield leaves
        self.memory.backbone_ends()
        if self.trained and exchange.grids:
            self.backward(exchange, encoded, [leaf for leaf in leaves if leaf is not None])

    def gather(self, microbatches: Sequence[PackedBatch]) -> Gathered:
        """Share out all items, and begin to send patches to where they are encoded."""
        device, side = encoder_device(self.model), self.vision_shape.patch_size
        media = [b.media for b in microbatches if b.media is not None and self.holds_rows]
        grid_thw = torch.zeros(0, 3, dtype=torch.int64, device=device)
        pixels = torch.zeros(0, 3, side, side, dtype=torch.uint8, device=device)
        with at("DEP stage 1, grid sizes to everyone"):
            exchange = ItemExchange.plan(
                torch.cat([grid_thw, *(m.grid_thw for m in media)]), self.vision_shape, self.group
            )
        owned = exchange.pixels_to_owners(torch.cat([pixels, *(m.pixel_values for m in media)]))
        return Gathered(microbatches, exchange, owned)

    def encode_early(self) -> None:
        """Encode the coming step's items beside what follows: the encoder has its new weights."""
        if self.early is not None and self.early.encoded is None:
            self.early.pixels.work.wait()
            torch.clear_autocast_cache()  # of the weights as they were
            self.early.encoded = self.background.start(
                partial(self.encode, self.early),
                tensors=lambda chunks: (chunk.features for chunk in chunks),
            )

    def finish(self) -> None:
        """Wait for what was done early for a step that will not be trained."""
        if self.early is not None:
            with at("DEP stage 1, patches of a step that is not trained"):
                self.early.pixels.arrived()
            if self.early.encoded is not None:
                self.early.encoded()
            self.early = None

    def encode(self, gathered: Gathered) -> list[Encoded]:
        """Encode the owned items chunk by chunk."""
        with at("DEP stage 1, patches to their encoders"):
            pixel_values = gathered.pixels.arrived()
        exchange = gathered.exchange
        owned = exchange.owned
        num_patches = [exchange.patches(item) for item in owned]
        grids = [exchange.grids[item] for item in owned]
        grid_thw = torch.tensor(grids, dtype=torch.int64, device=pixel_values.device).view(-1, 3)
        encoded, first_patch = [], 0
        self.memory.step_begins()
        for chunk in chunks(num_patches, self.patch_budget):
            patches = sum(num_patches[chunk.start : chunk.stop])
            media = PackedMedia(
                pixel_values=pixel_values[first_patch : first_patch + patches],
                grid_thw=grid_thw[chunk.start : chunk.stop],
            )
            keeps_graph = bool(self.trained) and self.memory.allows(patches)
            with torch.set_grad_enabled(keeps_graph), self.memory.measured(patches, keeps_graph):
                features = self.model.encode_media(media)
            features = features if keeps_graph else features.detach()
            encoded.append(Encoded(media, features, keeps_graph))
            first_patch += patches
        # Autocast caches a weight's cast, made without a graph, for the recomputation with one.
        torch.clear_autocast_cache()
        return encoded

    def leaves(
        self,
        exchange: ItemExchange,
        encoded: list[Encoded],
        microbatches: Sequence[PackedBatch],
    ) -> list[Tensor | None]:
        """Send the features home and cut them at the microbatches' borders."""
        nothing = no_media(self.model).detach()
        outgoing = torch.cat([nothing, *(chunk.features.detach() for chunk in encoded)])
        with at("DEP stage 1, features to the first pipeline stage"):
            features = exchange.features_home(outgoing)
        if not self.holds_rows:
            return [None for _ in microbatches]
        lengths = [b.num_vision_tokens for b in microbatches]
        trained = bool(self.trained)
        return [
            part.clone().requires_grad_(trained) if trained or length else None
            for part, length in zip(features.split(lengths), lengths, strict=True)
        ]

    def backward(
        self, exchange: ItemExchange, encoded: list[Encoded], leaves: list[Tensor]
    ) -> None:
        """Bring the features' gradients to their encoders, and from there into the weights."""
        nothing = no_media(self.model).detach()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        with at("DEP stage 3, gradients to their encoders"):
            incoming = exchange.gradients_to_owners(torch.cat([nothing, *gradients]))
        gradient_sum = GradientSum(self.trained, self.group)
        parts = incoming.split([len(chunk.features) for chunk in encoded])
        for number, (chunk, gradient) in enumerate(zip(encoded, parts, strict=True), 1):
            features = chunk.features
            if not chunk.keeps_graph:
                features = self.model.encode_media(chunk.media)
            is_last = number == len(encoded)
            with gradient_sum.behind_backward() if is_last and self.overlap else nullcontext():
                features.backward(gradient)
        with at("DEP stage 3, the encoder's gradients over all ranks"):
            gradient_sum.finish()


def check_recompute(recompute: str, patch_budget: int) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: naming the key.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"strategy.recompute must be one of {list(RECOMPUTE)}, got {recompute!r}")
    if patch_budget < 1:
        raise ValueError(f"strategy.patch_budget must be at least 1, got {patch_budget}")
