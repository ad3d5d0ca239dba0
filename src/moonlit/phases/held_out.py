"""Held-out scores: nll per token, and the share of answers the model would give exactly.

An answer is right when every one of its tokens is the model's first choice given the true tokens
before it. That is the same event as greedy decoding reproducing the answer, and needs one forward
pass instead of a decoding loop.

Axes: T tokens of a packed row, S documents in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(slots=True)
class Score:
    """Running sums of one held-out set."""

    nll_sum: float = 0.0
    num_tokens: int = 0
    num_right: int = 0
    num_answers: int = 0

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood [nats]; nan before anything was scored."""
        return self.nll_sum / self.num_tokens if self.num_tokens else float("nan")

    @property
    def accuracy(self) -> float:
        """Fraction of answers reproduced exactly; nan before anything was scored."""
        return self.num_right / self.num_answers if self.num_answers else float("nan")


@dataclass(slots=True)
class HeldOut:
    """Scores by the name of the held-out set."""

    scores: dict[str, Score] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything: a new pass begins."""
        self.scores.clear()

    def expect(self, name: str) -> None:
        """Take part in a set of which another rank of the pipeline scores the rows."""
        self.scores.setdefault(name, Score())

    def add(
        self,
        name: str,
        logprobs: Float[Tensor, " T"],
        is_top1: Bool[Tensor, " T"],
        loss_mask: Bool[Tensor, " T"],
        cu_seqlens: Int[Tensor, " S_plus_1"],
    ) -> None:
        """Count one packed row; each run of masked tokens inside a document is one answer."""
        score = self.scores.setdefault(name, Score())
        score.nll_sum -= float(logprobs[loss_mask].sum())
        score.num_tokens += int(loss_mask.sum())
        answer_of_token = answer_numbers(loss_mask, cu_seqlens)[loss_mask]
        if len(answer_of_token) == 0:
            return
        num_answers = int(answer_of_token.max()) + 1
        wrong = torch.bincount(answer_of_token[~is_top1[loss_mask]], minlength=num_answers)
        score.num_answers += num_answers
        score.num_right += int((wrong == 0).sum())

    def sum_over_ranks(self, global_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what every rank counted on its own rows; all ranks must have scored the same sets."""
        if not self.scores:
            return
        sums = [
            [score.nll_sum, score.num_tokens, score.num_right, score.num_answers]
            for score in self.scores.values()
        ]
        totals = global_sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        for score, (nll_sum, *counts) in zip(self.scores.values(), totals, strict=True):
            score.nll_sum = nll_sum
            score.num_tokens, score.num_right, score.num_answers = map(int, counts)

    def metrics(self) -> dict[str, float]:
        """Return ``held_out/NAME/nll_per_token`` and ``held_out/NAME/accuracy`` for each set."""
        return {
            f"held_out/{name}/{what}": getattr(score, what)
            for name, score in self.scores.items()
            for what in ("nll_per_token", "accuracy")
        }


def answer_numbers(
    loss_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " S_plus_1"]
) -> Int[Tensor, " T"]:
    """Number the runs of masked tokens from zero; a document boundary ends a run."""
    starts_document = torch.zeros_like(loss_mask)
    starts_document[cu_seqlens[:-1][cu_seqlens[:-1] < len(loss_mask)].long()] = True
    follows_masked = torch.cat([loss_mask.new_zeros(1), loss_mask[:-1]])
    starts_answer = loss_mask & (starts_document | ~follows_masked)
    return starts_answer.cumsum(0) - 1
