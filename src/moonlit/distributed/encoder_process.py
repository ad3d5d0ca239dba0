"""Where the vision encoder runs when it is not decoupled: inside each microbatch's autograd graph.

``DecoupledEncoder`` has the same one method; a phase cannot tell which it was given.

Axes: M merged vision tokens of a microbatch, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moonlit.batch import PackedBatch
from moonlit.distributed.gradients import sum_over_ranks
from moonlit.models.kimi import Kimi


class InlineEncoder:
    """Encodes a microbatch's media just before the backbone needs them: plain autograd."""

    def __init__(self, model: Kimi) -> None:
        self.encode_media = model.encode_media

    @contextmanager
    def around(self, microbatches: Sequence[PackedBatch]) -> Iterator[Iterator[Tensor | None]]:
        """Yield the features [M, D] of each microbatch in turn, None where it has no media.

        They are made lazily, so that one microbatch's encoder graph lives at a time.
        """
        yield (
            None if batch.media is None else self.encode_media(batch.media)
            for batch in microbatches
        )


class ReplicatedInlineEncoder(InlineEncoder):
    """The same with a copy of the encoder on every rank: its gradients are summed after the step.

    Args:
        model: holds the encoder.
        group: ranks that hold a copy and encode different items.
    """

    def __init__(self, model: Kimi, group: dist.ProcessGroup) -> None:
        super().__init__(model)
        self.model, self.group = model, group
        self.trained = trained_encoder_parameters(model)

    @contextmanager
    def around(self, microbatches: Sequence[PackedBatch]) -> Iterator[Iterator[Tensor | None]]:
        """Yield the features of each microbatch; without media they are empty, see ``no_media``."""
        empty = no_media(self.model) if self.trained else None
        yield (
            empty if batch.media is None else self.encode_media(batch.media)
            for batch in microbatches
        )
        has_media = any(batch.media is not None for batch in microbatches)
        any_media = torch.tensor(int(has_media), device=encoder_device(self.model))
        dist.all_reduce(any_media, dist.ReduceOp.MAX, group=self.group)
        if any_media.item():
            sum_over_ranks(self.trained, self.group)


def encoder_parts(model: Kimi) -> list[nn.Module]:
    """Return what every rank holds a copy of: tower and projector, if the model has them."""
    return [part for part in (model.vision_tower, model.mm_projector) if part is not None]


def trained_encoder_parameters(model: Kimi) -> list[nn.Parameter]:
    """Return the parameters of tower and projector that learn."""
    return [p for part in encoder_parts(model) for p in part.parameters() if p.requires_grad]


def encoder_device(model: Kimi) -> torch.device:
    """Return where the encoder's copy lies; the decoder's device for a model without one."""
    parts = encoder_parts(model) or [model.language_model]
    return next(parts[0].parameters()).device


def feature_dtype(model: Kimi) -> torch.dtype:
    """Return the dtype that the projector puts out: autocast's where it is on."""
    device_type = encoder_device(model).type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    parts = encoder_parts(model) or [model.language_model]
    return next(parts[-1].parameters()).dtype


def no_media(model: Kimi) -> Tensor:
    """Return features of no items that want a gradient.

    They make a text-only microbatch's loss differentiable even where only the encoder learns, so
    that every rank runs a backward pass, and its collectives, whatever its rows hold.
    """
    width = model.decoder_shape.model_width
    device = encoder_device(model)
    return torch.empty(0, width, dtype=feature_dtype(model), device=device, requires_grad=True)
