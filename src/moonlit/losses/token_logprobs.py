"""Log-probabilities of sampled tokens and the entropy where they were drawn, from hidden states.

Axes: T tokens of a packed row, V vocabulary, D width, C tokens of a chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moonlit.losses.chunks import CHUNK_TOKENS, accumulation_dtype, chunks_of


def token_logprobs(
    hidden_TD: Float[Tensor, "T D"],
    lm_head_weight_VD: Float[Tensor, "V D"],
    target_ids: Int[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    r"""Log-probability of every trained target, with its gradient, and the entropy there [nats].

    Logits exist for ``chunk_tokens`` tokens at a time: the backward pass makes them again, but for
    the last chunk. Outside the mask both are 0. The entropy has no gradient.

    Source: $\log \pi_\theta$ of the objective (arXiv:2602.02276, Sec. 2.3); the chunks are ours.

    Args:
        hidden_TD: decoder output after the final norm.
        lm_head_weight_VD: the untied head.
        target_ids: the token that follows each position.
        loss_mask: True where the target was sampled.
        temperature: what the sampler divided the logits by.
        banned_ids: what the sampler could not draw: without them both mean the same distribution.
        chunk_tokens: rows of logits that exist at once.

    Raises:
        ValueError: if ``temperature`` or ``chunk_tokens`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return _ChunkedLogprobs.apply(
        hidden_TD,
        lm_head_weight_VD,
        target_ids,
        chunks_of(loss_mask, chunk_tokens),
        temperature,
        list(banned_ids),
        torch.is_grad_enabled(),
    )  # pyright: ignore[reportReturnType]  # apply() is untyped


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps a normaliser for each token; backward makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_ids: Tensor,
        chunks: Sequence[Tensor],
        temperature: float,
        banned_ids: list[int],
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(hidden_TD)
        logprobs_T = torch.zeros(len(hidden_TD), dtype=dtype, device=hidden_TD.device)
        entropy_T, log_normalizer_T = torch.zeros_like(logprobs_T), torch.zeros_like(logprobs_T)
        probs_CV = None
        for rows_C in chunks:
            logits_CV = tempered(hidden_TD[rows_C], weight_VD, temperature, banned_ids)
            log_normalizer_C1 = logits_CV.logsumexp(-1, keepdim=True)
            chosen_C1 = logits_CV.gather(-1, target_ids[rows_C, None])
            probs_CV = (logits_CV - log_normalizer_C1).exp_()
            logits_CV[:, banned_ids] = 0  # their probability is zero: not 0 * inf
            mean_logit_C = torch.linalg.vecdot(probs_CV, logits_CV)
            logprobs_T[rows_C] = (chosen_C1 - log_normalizer_C1)[:, 0]
            entropy_T[rows_C] = (log_normalizer_C1[:, 0] - mean_logit_C).clamp_(min=0)
            log_normalizer_T[rows_C] = log_normalizer_C1[:, 0]
        if wants_grad:
            # The last chunk comes first in the backward pass: its probabilities are at hand.
            ctx.save_for_backward(hidden_TD, weight_VD, target_ids, log_normalizer_T, probs_CV)
            ctx.chunks, ctx.temperature, ctx.banned_ids = chunks, temperature, banned_ids
            device = hidden_TD.device.type
            ctx.autocast = {
                "device_type": device,
                "enabled": torch.is_autocast_enabled(device),
                "dtype": torch.get_autocast_dtype(device),
            }
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden_TD, weight_VD, target_ids, log_normalizer_T, probs_CV = ctx.saved_tensors
        grad_hidden_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = (
            torch.zeros_like(weight_VD, dtype=grad_T.dtype) if ctx.needs_input_grad[1] else None
        )
        with torch.autocast(**ctx.autocast):
            for rows_C in reversed(ctx.chunks):
                hidden_CD = hidden_TD[rows_C]
                if probs_CV is None:
                    logits_CV = tempered(hidden_CD, weight_VD, ctx.temperature, ctx.banned_ids)
                    probs_CV = logits_CV.sub_(log_normalizer_T[rows_C, None]).exp_()
                # d logprob / d logits = (onehot(target) - softmax(logits)) / temperature
                scale_C1 = grad_T[rows_C, None] / ctx.temperature
                grad_CV = probs_CV * -scale_C1
                grad_CV.scatter_add_(-1, target_ids[rows_C, None], scale_C1)
                grad_CV = grad_CV.to(hidden_TD.dtype)
                if grad_hidden_TD is not None:
                    grad_hidden_TD[rows_C] = (grad_CV @ weight_VD).to(hidden_TD.dtype)
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_CV.T @ hidden_CD
                probs_CV = None
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def tempered(
    hidden_CD: Tensor, weight_VD: Tensor, temperature: float, banned_ids: list[int]
) -> Tensor:
    """Return the logits that the sampler drew from, in fp32 (fp64 where given)."""
    logits_CV = hidden_CD @ weight_VD.T
    logits_CV = logits_CV.to(accumulation_dtype(hidden_CD))
    if temperature != 1:
        logits_CV = logits_CV.div_(temperature)
    logits_CV[:, banned_ids] = -torch.inf
    return logits_CV
