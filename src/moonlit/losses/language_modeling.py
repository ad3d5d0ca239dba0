"""Next-token loss and log-probabilities without the logits of a whole microbatch.

Axes: T tokens of a packed microbatch, C trained tokens of one chunk, D width, V vocabulary.
The logits [T, V] are by far the largest tensor of a training step (V = 163,840 in the release).
Here they exist for ``chunk_tokens`` tokens at a time, and only for tokens that count.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moonlit.losses.chunks import CHUNK_TOKENS, accumulation_dtype, chunks_of


def next_token_loss(
    hidden_TD: Float[Tensor, "T D"],
    lm_head_weight_VD: Float[Tensor, "V D"],
    target_ids: Int[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the next token, summed over ``loss_mask`` [nats, fp32].

    Implements $-\sum_{t \in mask} \log \mathrm{softmax}(W h_t)_{y_t}$. The gradients of hidden
    states and head are made in the forward pass, chunk by chunk, while a chunk's logits are there;
    the backward pass only scales them. So it costs what the plain loss costs, recomputes nothing,
    and cannot be differentiated twice. The caller divides by the global trained-token count.

    Source: the arithmetic is the textbook's. ``next_token_loss_reference`` is the same in four
    lines.

    Args:
        hidden_TD: decoder output after the final norm.
        lm_head_weight_VD: the untied head.
        target_ids: the token that follows each position, already shifted.
        loss_mask: True where the prediction is trained; targets elsewhere are never read.
        chunk_tokens: rows of logits that exist at once.

    Raises:
        ValueError: if ``chunk_tokens`` is not positive.
    """
    wants_grad = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden_TD,
        lm_head_weight_VD,
        target_ids,
        loss_mask,
        chunk_tokens,
        wants_grad and hidden_TD.requires_grad,
        wants_grad and lm_head_weight_VD.requires_grad,
    )  # pyright: ignore[reportReturnType]  # apply() is untyped


def next_token_loss_reference(
    hidden_TD: Float[Tensor, "T D"],
    lm_head_weight_VD: Float[Tensor, "V D"],
    target_ids: Int[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
) -> Float[Tensor, ""]:
    """``next_token_loss`` by definition, with all logits at once."""
    logits_TV = (hidden_TD @ lm_head_weight_VD.T).to(accumulation_dtype(hidden_TD))
    return F.cross_entropy(logits_TV[loss_mask], target_ids[loss_mask], reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward makes loss and gradients; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_ids: Tensor,
        loss_mask: Tensor,
        chunk_tokens: int,
        wants_hidden_grad: bool,
        wants_weight_grad: bool,
    ) -> Tensor:
        # fp32: a sum over thousands of tokens, and over every chunk's part of the head's gradient
        loss_sum = torch.zeros((), dtype=accumulation_dtype(hidden_TD), device=hidden_TD.device)
        grad_hidden_TD = torch.zeros_like(hidden_TD) if wants_hidden_grad else None
        grad_weight_VD = (
            torch.zeros_like(weight_VD, dtype=loss_sum.dtype) if wants_weight_grad else None
        )
        for rows_C in chunks_of(loss_mask, chunk_tokens):
            hidden_CD, targets_C1 = hidden_TD[rows_C], target_ids[rows_C, None]
            logits_CV = (hidden_CD @ weight_VD.T).to(loss_sum.dtype)
            log_normalizer_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss_sum += (log_normalizer_C1 - logits_CV.gather(-1, targets_C1)).sum()
            # d loss / d logits = softmax(logits) - onehot(target), written over the logits
            grad_CV = logits_CV.sub_(log_normalizer_C1).exp_()
            grad_CV.scatter_add_(-1, targets_C1, grad_CV.new_full((), -1.0).expand_as(targets_C1))
            grad_CV = grad_CV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows_C] = (grad_CV @ weight_VD).to(hidden_TD.dtype)  # autocast's
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        scaled = [
            None if g is None else (g.to(scale.dtype) * scale).to(g.dtype)
            for g in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None, None)


@torch.no_grad()
def token_scores(
    hidden_TD: Float[Tensor, "T D"],
    lm_head_weight_VD: Float[Tensor, "V D"],
    target_ids: Int[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """Log-probability of every target [nats, fp32], and whether it is the likeliest token.

    For evaluation: no gradient. Positions outside the mask get 0 and False. The arguments are those
    of ``next_token_loss``, whose value is ``-logprobs.sum()``.
    """
    logprobs_T = torch.zeros(
        len(hidden_TD), dtype=accumulation_dtype(hidden_TD), device=hidden_TD.device
    )
    is_top1_T = torch.zeros_like(loss_mask)
    for rows_C in chunks_of(loss_mask, chunk_tokens):
        logits_CV = (hidden_TD[rows_C] @ lm_head_weight_VD.T).to(logprobs_T.dtype)
        target_logits_C = logits_CV.gather(-1, target_ids[rows_C, None]).squeeze(-1)
        logprobs_T[rows_C] = target_logits_C - logits_CV.logsumexp(-1)
        is_top1_T[rows_C] = logits_CV.argmax(-1) == target_ids[rows_C]
    return logprobs_T, is_top1_T
