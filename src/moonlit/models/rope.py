"""Rotary positions: YaRN for the decoder, two axes for the encoder.

An angle is held as the unit complex number it rotates by; a head's width is a row of complex pairs
(GPT-J order: neighbours 2i and 2i+1 form a pair), as in the released weights.

Axes: T tokens (or patches), H heads, Dr rotating width, Dr/2 pairs.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from moonlit.models.shapes import DecoderShape


def rotate(
    x: Float[Tensor, "T H Dr"], rotation: Complex[Tensor, "T pairs"]
) -> Float[Tensor, "T H Dr"]:
    """Rotate each pair of ``x`` by its token's angle, in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def yarn_inverse_frequencies(shape: DecoderShape) -> Float[Tensor, " pairs"]:
    r"""Blend extrapolated and interpolated frequencies, pair by pair.

    A pair that turns more than ``beta_fast`` times within the original context keeps its frequency
    $\theta^{-2i/d}$; one that turns less than ``beta_slow`` times has it divided by the factor;
    between the two, a linear ramp. Factor 1 is plain RoPE.

    Source: YaRN, arXiv:2309.00071, Sec. 3.2, with DeepSeek's rounding of the ramp's ends.
    """
    width, theta = shape.qk_rope_width, shape.rope_theta
    pair = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    frequency = theta ** (-2 * pair / width)

    def pair_turning(times: float) -> float:
        wavelength = shape.yarn_original_positions / (2 * math.pi * times)
        return width * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(shape.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_turning(shape.yarn_beta_slow)), width - 1)
    interpolated = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - interpolated) + frequency / shape.yarn_factor * interpolated


@lru_cache(maxsize=16)  # every forward asks: a step of decoding takes about as long as this does
def frequencies_on(device: torch.device, shape: DecoderShape) -> Float[Tensor, " pairs"]:
    """Return the inverse frequencies on a device."""
    return yarn_inverse_frequencies(shape).to(device)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """Return ``0.1 * mscale * ln(factor) + 1``: how much longer contexts sharpen attention."""
    return 0.1 * mscale * math.log(factor) + 1.0


def decoder_rotation(
    position_ids: Int[Tensor, " T"], shape: DecoderShape
) -> Complex[Tensor, "T pairs"]:
    """Rotation of every token's query and key, once for all layers.

    DeepSeek moves YaRN's magnitude into the softmax scale (``softmax_scale``); what is left here is
    the ratio of the two magnitudes, one in every released config.
    """
    # fp32: in bf16 positions above 256 collide.
    angles = position_ids[:, None] * frequencies_on(position_ids.device, shape)
    magnitude = yarn_magnitude(shape.yarn_factor, shape.yarn_mscale) / yarn_magnitude(
        shape.yarn_factor, shape.yarn_mscale_all_dim
    )
    return torch.polar(torch.full_like(angles, magnitude), angles)


def softmax_scale(shape: DecoderShape) -> float:
    """Return ``1 / sqrt(width)`` times YaRN's squared magnitude (x2.005 at factor 64).

    Source: DeepSeek's YaRN: both query and key would carry the magnitude.
    """
    return shape.qk_width**-0.5 * yarn_magnitude(shape.yarn_factor, shape.yarn_mscale_all_dim) ** 2


def grid_rotation(
    height: int, width: int, *, head_width: int, theta: float, device: torch.device
) -> Complex[Tensor, "P pairs"]:
    """Rotation of every patch of one frame: column and row angles take turns (x, y, x, y, ...).

    Frequencies are ``theta ** (-4k / head_width)`` on both axes.
    Source: recipe 1.2; Kimi-VL report, arXiv:2504.07491, Sec. 2.1.
    """
    slot = torch.arange(head_width // 4, dtype=torch.float32, device=device)
    frequency = theta ** (-4 * slot / head_width)
    x_angles = torch.arange(width, device=device)[:, None] * frequency
    y_angles = torch.arange(height, device=device)[:, None] * frequency
    angles = torch.stack(
        [
            x_angles[None].expand(height, -1, -1),
            y_angles[:, None].expand(-1, width, -1),
        ],
        dim=-1,
    ).reshape(height * width, head_width // 2)
    return torch.polar(torch.ones_like(angles), angles)
