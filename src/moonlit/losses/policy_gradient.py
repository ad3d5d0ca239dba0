r"""Policy objectives over sampled tokens: pure functions that return sums.

The objective of K2.5 (arXiv:2602.02276, Sec. 2.3), with $\rho = \pi_\theta / \pi_{old}$:

$$L = E_x \frac{1}{N} \sum_j \sum_i \mathrm{Clip}(\rho_{ji}, \alpha, \beta)\,(r_j - \bar r)
      - \tau (\log \rho_{ji})^2$$

It is to be maximised (the text says "minimise"), so the loss is $-L$. $N$ is the number of all
sampled tokens of the step: the phase divides by it. Two passages of the report disagree; both
readings are switches, see ``clipped_ratio_loss``.

Axes: T tokens of a packed row, S documents (segments) in it.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BOUNDS = ("ratio", "log_ratio")


@runtime_checkable
class PolicyObjective(Protocol):
    """A loss of sampled tokens, summed over a row; what is fixed in ``conf/`` is bound before."""

    def __call__(
        self,
        policy_logprobs: Float[Tensor, " T"],
        behavior_logprobs: Float[Tensor, " T"],
        advantages: Float[Tensor, " T"],
        loss_mask: Bool[Tensor, " T"],
        cu_seqlens: Int[Tensor, " S_plus_1"],
    ) -> Float[Tensor, ""]:
        """Return the summed loss, to be minimised."""
        ...


def clipped_ratio_loss(
    policy_logprobs: Float[Tensor, " T"],
    behavior_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " S_plus_1"],
    *,
    low: float,
    high: float,
    regularisation: float,
    bounds_on: Literal["ratio", "log_ratio"] = "ratio",
    regularise_clipped: bool = True,
) -> Float[Tensor, ""]:
    r"""K2.5's objective: a clip that masks gradients on both sides, whatever the advantage's sign.

    A token whose ratio lies in [low, high] has the policy gradient
    $\rho A \nabla \log \pi$; outside it has none (unlike PPO's, which depends on the sign of A).

    Source: arXiv:2602.02276, Sec. 2.3. Its values of alpha, beta and tau are NOT STATED. Where it
    contradicts itself, the defaults are:

    - The formula clips the ratio, the text puts the interval on the log-ratio. With alpha and beta
      both positive only the first leaves room for a ratio below one: ``bounds_on="ratio"``.
    - In the formula the squared term stands outside the clip, in the text the gradient of clipped
      tokens is zero. We keep it for them (``regularise_clipped``): it pulls them back.

    Args:
        policy_logprobs: log pi of each target under the weights being trained [nats].
        behavior_logprobs: log of the probability with which the sampler drew it [nats].
        advantages: reward minus its group's mean; constant within a rollout.
        loss_mask: True where the policy wrote the target.
        cu_seqlens: not needed here; every objective has the same arguments.
        low: alpha.
        high: beta.
        regularisation: tau.
        bounds_on: what ``low`` and ``high`` bound.
        regularise_clipped: whether clipped tokens keep the squared term.

    Raises:
        ValueError: if the bounds are no interval around an unchanged policy, or tau is negative.
    """
    low, high = ratio_bounds(low, high, bounds_on)
    if regularisation < 0:
        raise ValueError(f"regularisation must be at least 0, got {regularisation}")
    log_ratio = (policy_logprobs - behavior_logprobs)[loss_mask]
    ratio = log_ratio.exp()
    penalty = log_ratio.square()
    if not regularise_clipped:
        penalty = penalty * ((ratio >= low) & (ratio <= high))
    return (regularisation * penalty - ratio.clamp(low, high) * advantages[loss_mask]).sum()


def ratio_bounds(low: float, high: float, bounds_on: str) -> tuple[float, float]:
    """Return the bounds of the ratio itself.

    Raises:
        ValueError: if they are no interval around an unchanged policy.
    """
    if bounds_on not in BOUNDS:
        raise ValueError(f"bounds_on={bounds_on!r}: want one of {BOUNDS}")
    unchanged = 1.0 if bounds_on == "ratio" else 0.0
    if not low <= unchanged <= high or (bounds_on == "ratio" and low <= 0):
        raise ValueError(
            f"low={low}, high={high} on the {bounds_on}: want"
            f" {'0 < ' if bounds_on == 'ratio' else ''}low <= {unchanged:g} <= high"
        )
    if bounds_on == "ratio":
        return low, high
    return tuple(torch.tensor([low, high], dtype=torch.float64).exp().tolist())


def sequence_loss(
    policy_logprobs: Float[Tensor, " T"],
    behavior_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " S_plus_1"],
    *,
    regularisation: float,
) -> Float[Tensor, ""]:
    r"""K1.5's objective, on whole answers: $-A \log \pi(y) + \frac{\tau}{2} (\log \rho(y))^2$.

    Its gradient is the published $-\nabla \log \pi\, (r - \bar r) + \frac{\tau}{2} \nabla (\log
    \rho)^2$ of each answer. K1.5 divides by K, the step here by the tokens: that is a matter of the
    learning rate.

    Source: Kimi k1.5 (arXiv:2501.12599), Sec. 2.3.2; K2 report (arXiv:2507.20534), Sec. 3.2.3.
    The arguments are those of ``clipped_ratio_loss``.
    """
    log_ratio_S = sum_by_document(policy_logprobs - behavior_logprobs, loss_mask, cu_seqlens)
    weighted = (policy_logprobs * advantages)[loss_mask].sum()
    return regularisation / 2 * log_ratio_S.square().sum() - weighted


def grpo_loss(
    policy_logprobs: Float[Tensor, " T"],
    behavior_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    loss_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " S_plus_1"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, ""]:
    r"""PPO's pessimistic clip, token level: $-\min(\rho A, \mathrm{clip}(\rho, 1-c_l, 1+c_h) A)$.

    Source: GRPO, arXiv:2402.03300, Sec. 4.1, with DAPO's two bounds (arXiv:2503.14476, Sec. 3.1).
    Differs: no KL term; the mean is over all tokens (as in DAPO), not over answers first.
    Advantages are the caller's; ``group_advantages(..., normalise=True)`` are GRPO's.
    """
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: want 0 <= clip_low < 1, clip_high >= 0"
        )
    ratio = (policy_logprobs - behavior_logprobs)[loss_mask].exp()
    advantage = advantages[loss_mask]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()


def sum_by_document(
    values: Float[Tensor, " T"],
    mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " S_plus_1"],
) -> Float[Tensor, " S"]:
    """Sum the masked values of every document."""
    lengths = cu_seqlens.diff().long()
    document_of_T = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    sums = values.new_zeros(len(lengths))
    return sums.index_add(0, document_of_T, torch.where(mask, values, 0))


def group_advantages(rewards: Sequence[float], *, normalise: bool = False) -> list[float]:
    """Rewards of a group minus their mean; K2.5 does not divide by the deviation, GRPO does.

    Raises:
        ValueError: if a reward is not finite.
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(f"rewards {list(rewards)}: want finite numbers")
    advantages = values - values.mean()
    if normalise and len(values) > 1:
        advantages = advantages / (values.std() + 1e-6)
    return advantages.tolist()
