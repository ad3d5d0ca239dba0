"""A model cut into pipeline stages: neighbouring decoder layers, and what stands at both ends.

The first stage has the embedding and takes in vision features; the last has the final norm and the
head. Between them travel the residual stream and the balance loss so far.

Axes: T tokens of a packed row, M vision tokens, D model width, L layers.
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from moonlit.batch import PackedBatch
from moonlit.models.kimi import Kimi, packed_row, place_features


def cut_layers(num_layers: int, num_stages: int) -> list[range]:
    """Cut the layers into runs whose lengths differ by one at most."""
    bounds = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class DecoderStage(nn.Module):
    """One stage of a model, sharing its modules; call it with the row, then what came before.

    Args:
        model: whole, or at least with these layers.
        layers: neighbouring ones.
    """

    def __init__(self, model: Kimi, layers: range) -> None:
        super().__init__()
        decoder, self.shape = model.language_model.model, model.decoder_shape
        self.is_first = layers.start == 0
        self.is_last = layers.stop == self.shape.num_layers
        self.embed_tokens = decoder.embed_tokens if self.is_first else None
        self.layers = nn.ModuleList(decoder.layers[layer] for layer in layers)
        self.norm = decoder.norm if self.is_last else None
        self.lm_head = model.language_model.lm_head if self.is_last else None

    def forward(
        self,
        batch: PackedBatch,
        features: Float[Tensor, "M D"] | None,
        hidden_TD: Float[Tensor, "T D"] | None,
        load_balance_loss: Float[Tensor, ""] | None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
        """Return the residual stream, normalised after the last stage, and the balance loss so far.

        Args:
            batch: the row; its media have become ``features``.
            features: what the first stage puts in the place of placeholder tokens.
            hidden_TD: from the stage before; None for the first.
            load_balance_loss: of the stages before; None for the first.
        """
        row = packed_row(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            self.shape,
            prefix_of_document=batch.prefix_of_document,
        )
        if self.embed_tokens is not None:
            embedded = self.embed_tokens(batch.input_ids)
            hidden_TD = place_features(embedded, features, row.modality.bool())
            load_balance_loss = embedded.new_zeros(())
        if hidden_TD is None or load_balance_loss is None:
            raise ValueError("a stage that is not the first needs what the one before it returned")
        x, balance = hidden_TD, load_balance_loss
        for layer in self.layers:
            x, balance_of_layer = layer(x, row)
            balance = balance + balance_of_layer
        return (x if self.norm is None else self.norm(x)), balance


def keep_layers(model: Kimi, stages: Sequence[range]) -> list[DecoderStage]:
    """Return these stages of a model, and drop the layers of all others from it.

    What stays keeps its name, so that checkpoints are those of the whole model. Of embedding, final
    norm and head a model keeps what its stages need.
    """
    kept = [DecoderStage(model, layers) for layers in stages]
    decoder = model.language_model.model
    for name in [str(layer) for layer in range(model.decoder_shape.num_layers)]:
        if not any(int(name) in layers for layers in stages):
            delattr(decoder.layers, name)  # not `del layers[i]`, which would rename those behind it
    if not any(stage.is_first for stage in kept):
        del decoder.embed_tokens
    if not any(stage.is_last for stage in kept):
        del decoder.norm, model.language_model.lm_head
    return kept
