"""Kimi K2.5: MoonViT-3D, projector, language model; packed rows in, packed rows out.

Axes: T tokens of a packed row, S documents in it, M vision tokens, D model width, V vocabulary.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moonlit.batch import PackedMedia
from moonlit.models.absorbed import CachedRow
from moonlit.models.attention import PackedRow
from moonlit.models.cache import LatentCache
from moonlit.models.decoder import DecoderOutput, LanguageModel
from moonlit.models.rope import decoder_rotation
from moonlit.models.segment_attention import attention_named
from moonlit.models.segments import Segments
from moonlit.models.shapes import DecoderShape, EncoderShape
from moonlit.models.vision.moonvit3d import MoonViT3D
from moonlit.models.vision.projector import Projector


class Kimi(nn.Module):
    """The whole model; parameter names are the released ones, but for stacked routed experts.

    Args:
        decoder: numbers of the language model.
        vision: numbers of the encoder, or None for a text-only model.
        experts: ``grouped_mm``, ``megablocks`` (CUDA, ``make megablocks``) or ``reference``.
        attention: ``sdpa`` or ``xformers`` (CUDA).
        recompute: keep only the inputs of decoder layers for the backward pass.
        compiled: train decoder layers through ``torch.compile``.
    """

    def __init__(
        self,
        *,
        decoder: DecoderShape,
        vision: EncoderShape | None,
        experts: str = "grouped_mm",
        attention: str = "sdpa",
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.decoder_shape = decoder
        self.vision_shape = vision
        backend = attention_named(attention)
        self.vision_tower = None if vision is None else MoonViT3D(vision, attention=backend)
        self.mm_projector = (
            None if vision is None else Projector(vision, model_width=decoder.model_width)
        )
        self.language_model = LanguageModel(
            decoder, experts=experts, attention=backend, recompute=recompute, compiled=compiled
        )

    def encode_media(self, media: PackedMedia) -> Float[Tensor, "M D"]:
        """Encode and project packed items: one feature for each of their placeholder tokens."""
        if self.vision_tower is None or self.mm_projector is None:
            raise ValueError("this model has no encoder: vision is None")
        return self.mm_projector(self.vision_tower(media.pixel_values, media.grid_thw))

    def forward(
        self,
        input_ids: Int[Tensor, " T"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " S_plus_1"],
        features: Float[Tensor, "M D"] | None = None,
        cache: LatentCache | None = None,
        prefix_of_document: Int[Tensor, " S"] | None = None,
    ) -> DecoderOutput:
        """Run the decoder over a packed row.

        Args:
            input_ids: documents end to end.
            position_ids: position of each token inside its document.
            cu_seqlens: document boundaries, from 0 to T.
            features: what replaces the embeddings of the placeholder tokens, in their order.
            cache: holds the documents' past and takes in this row; positions then go on from there.
            prefix_of_document: the document that each continues, as ``PackedBatch`` says.

        Raises:
            ValueError: if features and placeholder tokens differ in number, or the boundaries do
                not fit the row.
        """
        row = packed_row(
            input_ids, position_ids, cu_seqlens, self.decoder_shape, cache, prefix_of_document
        )
        decoder = self.language_model.model
        embedded = decoder.embed_tokens(input_ids)
        embedded = place_features(embedded, features, row.modality.bool())
        output = decoder(embedded, row)
        if cache is not None:
            cache.advance(row.segments)
        return output

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Scores of the next token."""
        return self.language_model.lm_head(hidden)


def packed_row(
    input_ids: Int[Tensor, " T"],
    position_ids: Int[Tensor, " T"],
    cu_seqlens: Int[Tensor, " S_plus_1"],
    shape: DecoderShape,
    cache: LatentCache | None = None,
    prefix_of_document: Int[Tensor, " S"] | None = None,
) -> PackedRow:
    """Return what every layer needs to know of a row; with a cache, room in it is reserved.

    Raises:
        ValueError: if the boundaries do not fit the row, or a cache is to hold branches.
    """
    segments = Segments.from_cu_seqlens(cu_seqlens, len(input_ids), prefix_of_document)
    if cache is not None and segments.prefixes:
        raise ValueError("a latent cache has no branches: its sequences fork instead")
    return PackedRow(
        segments=segments,
        rotation=decoder_rotation(position_ids, shape),
        modality=(input_ids == shape.media_pad_id).long(),
        cached=None if cache is None else CachedRow.reserve(cache, segments),
    )


def place_features(
    embedded: Float[Tensor, "T D"],
    features: Float[Tensor, "M D"] | None,
    is_vision: Bool[Tensor, " T"],
) -> Float[Tensor, "T D"]:
    """Put the features where the placeholder tokens are, in order."""
    position_M = torch.where(is_vision)[0]
    num_features = 0 if features is None else len(features)
    if len(position_M) != num_features:
        raise ValueError(
            f"the row has {len(position_M)} media placeholder tokens but got"
            f" {num_features} vision features"
        )
    if features is None:
        return embedded
    return embedded.index_copy(0, position_M, features.to(embedded.dtype))
