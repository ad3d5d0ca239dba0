"""MoonViT-3D: images and short clips at their native resolution, packed end to end.

Axes: P patches of all items, M merged tokens, Q sub-patches per merged token (4), Dv encoder
width, H heads, Dh head width, F MLP width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int, UInt8
from torch import Tensor, nn

from moonlit.models.layers import INIT_STD, Linear
from moonlit.models.rope import grid_rotation, rotate
from moonlit.models.segment_attention import SegmentAttention
from moonlit.models.segments import Segments
from moonlit.models.shapes import EncoderShape
from moonlit.models.vision.positions import Grid, PositionTable


class PatchProjection(nn.Module):
    """The patch embedding: a convolution whose patches arrive already cut."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def forward(self, patches: Float[Tensor, "P 3 h w"]) -> Float[Tensor, "P Dv"]:
        """Embed every patch: one matrix product."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class PatchEmbedding(nn.Module):
    """Patches and their positions."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.proj = PatchProjection(shape.width, shape.patch_size)
        self.pos_emb = PositionTable(shape)

    def forward(
        self, pixel_values: UInt8[Tensor, "P 3 h w"], grids: list[Grid]
    ) -> Float[Tensor, "P Dv"]:
        """Normalise to [-1, 1] (mean = std = 0.5), embed, add positions."""
        patches = (pixel_values.float() / 127.5 - 1).to(self.proj.weight.dtype)
        return self.proj(patches) + self.pos_emb(grids)


class EncoderMLP(nn.Module):
    """Two layers with tanh-GELU."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.fc0 = Linear(shape.width, shape.mlp_width)
        self.fc1 = Linear(shape.mlp_width, shape.width)

    def forward(self, x: Float[Tensor, "P Dv"]) -> Float[Tensor, "P Dv"]:
        """Return the MLP's output, without the residual."""
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))


class EncoderBlock(nn.Module):
    """Pre-norm attention over the whole item (all frames together), then a pre-norm MLP."""

    def __init__(self, shape: EncoderShape, *, attention: SegmentAttention) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.scale = shape.head_width**-0.5
        self.attention = attention
        self.norm0 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.wqkv = Linear(shape.width, 3 * shape.width)
        self.wo = Linear(shape.width, shape.width)
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = EncoderMLP(shape)

    def forward(
        self, x: Float[Tensor, "P Dv"], rotation: Complex[Tensor, "P pairs"], items: Segments
    ) -> Float[Tensor, "P Dv"]:
        """Return the residual stream after this block."""
        q, k, v = self.wqkv(self.norm0(x)).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = self.attention(q, k, v, items, causal=False, scale=self.scale)
        x = x + self.wo(out.flatten(1))
        return x + self.mlp(self.norm1(x))


class Encoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, shape: EncoderShape, *, attention: SegmentAttention) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(shape, attention=attention) for _ in range(shape.num_layers)
        )
        self.final_layernorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    def forward(
        self, x: Float[Tensor, "P Dv"], rotation: Complex[Tensor, "P pairs"], items: Segments
    ) -> Float[Tensor, "P Dv"]:
        """Run the stack over embedded patches."""
        for block in self.blocks:
            x = block(x, rotation, items)
        return self.final_layernorm(x)


class MoonViT3D(nn.Module):
    """Packed patches in, merged patches out: (h/2) * (w/2) tokens an item, clips too.

    Source: K2.5 report, Sec. 4.2 (joint space-time attention, temporal mean); Kimi-VL report,
    Sec. 2.1 (native resolution, resized table with 2-D rotary positions).
    """

    def __init__(self, shape: EncoderShape, *, attention: SegmentAttention) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbedding(shape)
        self.encoder = Encoder(shape, attention=attention)

    def forward(
        self, pixel_values: UInt8[Tensor, "P 3 h w"], grid_thw: Int[Tensor, "N 3"]
    ) -> Float[Tensor, "M Q Dv"]:
        """Encode every item on its own; frames are averaged after the final norm."""
        grids = self._checked_grids(grid_thw, len(pixel_values))
        items = Segments(tuple(t * h * w for t, h, w in grids))
        rotation = self._rotation(grids, pixel_values.device)
        x = self.encoder(self.patch_embed(pixel_values, grids), rotation, items)
        return merge_patches(x, grids, merge=self.shape.merge)

    def _rotation(self, grids: list[Grid], device: torch.device) -> Complex[Tensor, "P pairs"]:
        """Rotary angles of every patch: the same in every frame of a clip."""
        shape = self.shape
        frames = {
            (h, w): grid_rotation(
                h, w, head_width=shape.head_width, theta=shape.rope_theta, device=device
            )
            for _, h, w in set(grids)
        }
        return torch.cat([frames[h, w].repeat(t, 1) for t, h, w in grids])

    def _checked_grids(self, grid_thw: Int[Tensor, "N 3"], num_patches: int) -> list[Grid]:
        shape = self.shape
        grids: list[Grid] = [(t, h, w) for t, h, w in grid_thw.tolist()]
        for t, h, w in grids:
            if (
                not 1 <= t <= shape.max_frames
                or min(h, w) < 1
                or h % shape.merge
                or w % shape.merge
            ):
                raise ValueError(
                    f"grid_thw rows must have 1 to {shape.max_frames} frames and sides that are"
                    f" positive multiples of {shape.merge}, got {(t, h, w)}"
                )
        if sum(t * h * w for t, h, w in grids) != num_patches:
            raise ValueError(f"grid_thw {grids} does not add up to {num_patches} patches")
        return grids


def merge_patches(
    x: Float[Tensor, "P Dv"], grids: list[Grid], *, merge: int
) -> Float[Tensor, "M Q Dv"]:
    """Average each item over its frames and gather every ``merge`` x ``merge`` square."""
    merged = []
    for (t, h, w), patches in zip(grids, x.split([t * h * w for t, h, w in grids]), strict=True):
        rows, columns = h // merge, w // merge
        squares = patches.view(t, rows, merge, columns, merge, -1).mean(dim=0)
        merged.append(squares.transpose(1, 2).reshape(rows * columns, merge**2, -1))
    return torch.cat(merged)
