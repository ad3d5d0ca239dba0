"""How the backbone runs over the microbatches of an optimizer step: forward, loss, backward.

Axes: T tokens of a microbatch, M its merged vision tokens, D model width.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.whereabouts import at
from moonlit.models.decoder import DecoderOutput
from moonlit.models.decoding import greedy
from moonlit.models.kimi import Kimi

LossSum = Callable[[DecoderOutput, PackedBatch], Tensor]
"""A phase's loss of one microbatch, summed over its trained tokens."""


class Backbone:
    """One microbatch after another, each forward at once followed by its backward.

    Args:
        model: takes features where placeholder tokens are.
        loss: of the phase.
        backward: runs a backward pass from a scalar.
    """

    def __init__(self, model: Kimi, *, loss: LossSum, backward: Callable[[Tensor], None]) -> None:
        self.model, self.loss, self.backward = model, loss, backward

    def run(
        self,
        microbatches: Sequence[PackedBatch],
        features: Iterable[Tensor | None],
        *,
        normalise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Accumulate every microbatch's gradient; return the sum of their losses on this rank.

        Args:
            microbatches: of this rank, in order.
            features: vision features [M, D] of each, or None.
            normalise: turns a summed loss into what is differentiated.
        """
        loss_sum = torch.zeros((), device=microbatches[0].input_ids.device)
        for number, (batch, feature) in enumerate(zip(microbatches, features, strict=True)):
            with at(f"the backbone, microbatch {number + 1} of {len(microbatches)}"):
                self.before(number, len(microbatches))
                output = self.model(
                    batch.input_ids,
                    batch.position_ids,
                    batch.cu_seqlens,
                    feature,
                    prefix_of_document=batch.prefix_of_document,
                )
                loss = self.loss(output, batch)
                if loss.requires_grad:  # text alone teaches a lone encoder nothing
                    self.backward(normalise(loss))
            loss_sum = loss_sum + loss.detach()
        return loss_sum

    def before(self, number: int, num_microbatches: int) -> None:
        """Prepare for a microbatch."""

    def encoded(self, batch: PackedBatch) -> Tensor | None:
        """Return a row's vision features [M, D], outside of any training step."""
        return None if batch.media is None else self.model.encode_media(batch.media)

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> DecoderOutput | None:
        """Return the output of one row; None where another rank has it."""
        with at("the backbone, validation"):
            return self.model(
                batch.input_ids, batch.position_ids, batch.cu_seqlens, self.encoded(batch)
            )

    def greedy(
        self,
        input_ids: Int[Tensor, " T"],
        media: PackedMedia | None,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        banned_ids: Collection[int],
    ) -> list[int]:
        """Return the most likely continuation of a prompt, decoded through the latent cache."""
        with at("the backbone, decoding"):
            return greedy(
                self.model,
                input_ids,
                None if media is None else self.model.encode_media(media),
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                banned_ids=banned_ids,
            )

    def from_last_stage(self, value: Tensor) -> Tensor:
        """Return, on all ranks of a pipeline, the value of the one that ``evaluate`` answers."""
        return value


class ShardedBackbone(Backbone):
    """The same over FSDP2 shards.

    Args:
        model: sharded.
        zero_stage: 3 frees a layer's weights after its forward; 2 keeps them through the step; 1
            also sums gradients over ranks once, after the last microbatch.
    """

    def __init__(
        self, model: Kimi, *, loss: LossSum, backward: Callable[[Tensor], None], zero_stage: int
    ) -> None:
        super().__init__(model, loss=loss, backward=backward)
        self.zero_stage = zero_stage

    def before(self, number: int, num_microbatches: int) -> None:
        """Tell the shards when to sum gradients and when to let go of the weights."""
        root: nn.Module = self.model
        if not isinstance(root, FSDPModule):
            raise TypeError("ShardedBackbone needs a model that fully_shard has seen")
        is_last = number == num_microbatches - 1
        prepare_backward(root, is_last=is_last, zero_stage=self.zero_stage)


def prepare_backward(root: FSDPModule, *, is_last: bool, zero_stage: int) -> None:
    """Tell shards when to sum gradients and when to let go of the weights."""
    root.set_is_last_backward(is_last)
    root.set_reshard_after_backward(is_last or zero_stage == 3)
    root.set_requires_gradient_sync(is_last or zero_stage > 1)
