"""Multi-head latent attention (MLA).

Axes: T tokens, D model width, H heads, Dk = Dn + Dr query and key width (without and with rotary
position), Dv value width, R key-value latent.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from moonlit.models.absorbed import CachedRow, absorbed_attention
from moonlit.models.attention_logits import logit_bounds, max_logits
from moonlit.models.layers import Linear, RMSNorm
from moonlit.models.rope import rotate, softmax_scale
from moonlit.models.segment_attention import SegmentAttention
from moonlit.models.segments import Segments
from moonlit.models.shapes import DecoderShape


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """What every decoder layer needs to know about the row it works on."""

    segments: Segments
    rotation: Complex[Tensor, "T pairs"]
    modality: Int[Tensor, " T"]
    """0 text, 1 vision."""
    cached: CachedRow | None = None
    recomputed: bool = False
    """A layer has run over it before: what it measures has been counted."""


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values are expanded from one narrow latent per token.

    Queries come through a latent of their own where ``q_lora_rank`` is set. Positions rotate only
    the last ``qk_rope_width`` of each query head and one key shared by all heads.

    Source: DeepSeek-V2, arXiv:2405.04434, Sec. 2.1.
    """

    def __init__(self, shape: DecoderShape, *, layer: int, attention: SegmentAttention) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.attention = attention
        self.scale = softmax_scale(shape)
        self.num_heads = shape.num_heads
        self.qk_nope_head_dim = shape.qk_nope_width
        self.v_head_dim = shape.v_width
        self.measure_logits: Literal["off", "bounded", "exact"] = "off"
        self.logit_threshold = 100.0  # tau of K2; QK-Clip sets its own
        self.max_logits_H = nn.Buffer(
            torch.zeros(shape.num_heads, dtype=torch.float32), persistent=False
        )
        width, heads = shape.model_width, shape.num_heads
        if shape.q_lora_rank is None:
            self.q_proj = Linear(width, heads * shape.qk_width, bias=False)
        else:
            self.q_a_proj = Linear(width, shape.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(shape.q_lora_rank, eps=shape.latent_norm_eps)
            self.q_b_proj = Linear(shape.q_lora_rank, heads * shape.qk_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(
            width, shape.kv_lora_rank + shape.qk_rope_width, bias=False
        )
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, eps=shape.latent_norm_eps)
        self.kv_b_proj = Linear(
            shape.kv_lora_rank, heads * (shape.qk_nope_width + shape.v_width), bias=False
        )
        self.o_proj = Linear(heads * shape.v_width, width, bias=False)

    def reset_parameters(self) -> None:
        """Begin a new measurement; the weights belong to the linear maps."""
        self.reset_max_logits()

    def forward(self, x: Float[Tensor, "T D"], row: PackedRow) -> Float[Tensor, "T D"]:
        """Attend inside each document, over its cached past where there is one."""
        q_nope, q_rope = self.queries(x, row)
        latent, k_rope = self.latents(x, row)
        if row.cached is not None:
            row.cached.cache.write(
                self.layer, row.cached.slot_of_token, torch.cat([latent, k_rope[:, 0]], dim=-1)
            )
        if row.cached is None or row.cached.is_fresh:
            out_THDv = self.expanded_attention(q_nope, q_rope, latent, k_rope, row)
        else:
            out_THDv = absorbed_attention(
                q_nope,
                q_rope,
                self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)),
                row.cached,
                self.layer,
                row.segments,
                scale=self.scale,
            )
        return self.o_proj(out_THDv.flatten(1))

    def queries(
        self, x: Float[Tensor, "T D"], row: PackedRow
    ) -> tuple[Float[Tensor, "T H Dn"], Float[Tensor, "T H Dr"]]:
        """Queries without position, and their rotated part."""
        shape = self.shape
        if shape.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(1, (shape.num_heads, -1)).split(
            [shape.qk_nope_width, shape.qk_rope_width], dim=-1
        )
        return q_nope, rotate(q_rope, row.rotation)

    def latents(
        self, x: Float[Tensor, "T D"], row: PackedRow
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "T 1 Dr"]]:
        """What a cache holds for each token: the normalised latent and the rotated shared key."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.shape.kv_lora_rank, self.shape.qk_rope_width], dim=-1
        )
        return self.kv_a_layernorm(latent), rotate(k_rope[:, None], row.rotation)

    def expanded_attention(
        self,
        q_nope: Float[Tensor, "T H Dn"],
        q_rope: Float[Tensor, "T H Dr"],
        latent: Float[Tensor, "T R"],
        k_rope: Float[Tensor, "T 1 Dr"],
        row: PackedRow,
    ) -> Float[Tensor, "T H Dv"]:
        """Expand latents into every head's keys and values, and attend to those."""
        shape = self.shape
        kv = self.kv_b_proj(latent).unflatten(1, (shape.num_heads, -1))
        k_nope, v_THDv = kv.split([shape.qk_nope_width, shape.v_width], dim=-1)
        q_THDk = torch.cat([q_nope, q_rope], dim=-1)
        k_THDk = torch.cat([k_nope, k_rope.expand(-1, shape.num_heads, -1)], dim=-1)
        if self.training and not row.recomputed:
            self.measure(q_THDk, k_THDk, row.segments)
        return self.attention(q_THDk, k_THDk, v_THDv, row.segments, causal=True, scale=self.scale)

    def reset_max_logits(self) -> None:
        """Begin a new measurement, from zero: QK-Clip acts on large maxima only."""
        # A new tensor: in fp32, whatever dtype the model was moved to meanwhile.
        self.max_logits_H = self.max_logits_H.new_zeros(self.num_heads, dtype=torch.float32)

    @torch.no_grad()
    def measure(
        self, q: Float[Tensor, "T H Dk"], k: Float[Tensor, "T H Dk"], segments: Segments
    ) -> None:
        """Raise ``max_logits_H`` to this row's maxima.

        ``exact`` computes every head. ``bounded`` computes only the heads whose norm bound exceeds
        ``logit_threshold`` and records the bound of the others: below the threshold it is an upper
        limit. Finding those heads costs one synchronisation on CUDA.
        """
        if self.measure_logits == "off":
            return
        if self.measure_logits == "exact":
            largest_H = max_logits(q, k, segments, scale=self.scale)
        else:
            largest_H = logit_bounds(q, k, scale=self.scale)
            heads = torch.where(largest_H > self.logit_threshold)[0]
            if len(heads):
                largest_H[heads] = max_logits(q[:, heads], k[:, heads], segments, scale=self.scale)
        self.max_logits_H.copy_(torch.maximum(self.max_logits_H, largest_H))
