"""The Kimi K2 language model: layers, stack, head.

Axes: T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moonlit.models.attention import MultiHeadLatentAttention, PackedRow
from moonlit.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from moonlit.models.moe.layer import MoELayer
from moonlit.models.segment_attention import SegmentAttention
from moonlit.models.shapes import DecoderShape


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """What the stack returns for a packed row."""

    hidden_TD: Float[Tensor, "T D"]
    """After the final norm: ``Kimi.logits`` maps it to the vocabulary."""
    load_balance_loss: Float[Tensor, ""]
    """``aux_loss_alpha`` times the balance loss: its mean over the row's tokens, summed over
    layers. Zero where alpha is zero or the model is not in training mode."""


class DecoderLayer(nn.Module):
    """Pre-norm attention, then a pre-norm MLP: dense or experts.

    With ``recompute`` a training step keeps the layer's input only and runs it again in the
    backward pass: about a third more work for a small part of the memory. With ``compiled`` it
    trains through ``torch.compile``.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        layer: int,
        experts: str,
        attention: SegmentAttention,
        recompute: bool,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.compiled = compiled
        self.input_layernorm = RMSNorm(shape.model_width, eps=shape.norm_eps)
        self.self_attn = MultiHeadLatentAttention(shape, layer=layer, attention=attention)
        self.post_attention_layernorm = RMSNorm(shape.model_width, eps=shape.norm_eps)
        self.mlp = (
            SwiGLU(shape.model_width, shape.dense_width)
            if layer < shape.num_dense_layers
            else MoELayer(shape, experts=experts)
        )

    def forward(
        self, x: Float[Tensor, "T D"], row: PackedRow
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
        """Return the residual stream after this layer and the layer's load-balance loss."""
        run = compiled_run() if self.compiled and self.training else DecoderLayer.run
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return run(self, x, row)
        rows = iter([row])  # the first run takes it; whoever comes after that is a repetition
        again = replace(row, recomputed=True)
        return checkpoint(
            lambda x: run(self, x, next(rows, again)),
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn at random
        )

    def run(
        self, x: Float[Tensor, "T D"], row: PackedRow
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
        """Compute the layer."""
        x = x + self.self_attn(self.input_layernorm(x), row)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            y, balance_loss = self.mlp(
                normed, row.modality, row.segments, count_load=not row.recomputed
            )
            return x + y, balance_loss
        return x + self.mlp(normed), x.new_zeros(())


@cache
def compiled_run() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile ``DecoderLayer.run`` once for all layers and for rows of any length.

    What looks at a row's documents, or at the rows of experts, runs as it is: it would be compiled
    anew for each row.
    """
    for owner, name in ((MultiHeadLatentAttention, "expanded_attention"), (MoELayer, "mixed")):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    return torch.compile(DecoderLayer.run, dynamic=True)


class Decoder(nn.Module):
    """Embedding, layers, final norm; ``layers`` are a layer's own arguments."""

    def __init__(self, shape: DecoderShape, **layers: Any) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.model_width)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, layer=layer, **layers) for layer in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.model_width, eps=shape.norm_eps)

    def forward(self, x: Float[Tensor, "T D"], row: PackedRow) -> DecoderOutput:
        """Run the stack over embedded tokens."""
        load_balance_loss = x.new_zeros(())
        for layer in self.layers:
            x, balance_loss = layer(x, row)
            load_balance_loss = load_balance_loss + balance_loss
        return DecoderOutput(self.norm(x), load_balance_loss)


class LanguageModel(nn.Module):
    """The decoder and its untied head, named as in the release."""

    def __init__(self, shape: DecoderShape, **layers: Any) -> None:
        super().__init__()
        self.model = Decoder(shape, **layers)
        self.lm_head = Linear(shape.model_width, shape.vocab_size, bias=False)
