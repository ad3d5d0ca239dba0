"""MuonClip: Muon on the matrices, AdamW on the rest, QK-Clip after both.

Axes: L attention layers, H heads.
Source: Moonlight, arXiv:2502.16982, Sec. 2 (Muon, RMS matching, weight decay on norm gains);
Kimi K2, arXiv:2507.20534, Algorithm 1 (QK-Clip); Kimi-VL, arXiv:2504.07491, Sec. 2.2 (Muon on
encoder, projector and decoder alike).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moonlit.optim.matrix_shards import Piece, batches, on_this_rank, orthogonalized, piece
from moonlit.optim.parameter_groups import parameter_groups
from moonlit.optim.qk_clip import QKClip

UPDATE_RMS = 0.2
"""Root mean square of a Muon update in units of the learning rate: the size of AdamW's, so that
learning rate and weight decay carry over from AdamW."""

LOOKED_UP = {"embed_tokens", "lm_head", "pos_emb"}
"""Tables whose rows are looked up one by one (and the head, by the report): AdamW's."""


class MuonClip(torch.optim.Optimizer):
    r"""One optimizer for the whole model; each parameter belongs to Muon or to AdamW by its name.

    Muon, for a matrix $W \in R^{n \times m}$ with gradient $G$:
    $M \leftarrow \mu M + G$, $O = \mathrm{NewtonSchulz}(\mu M + G)$,
    $W \leftarrow W - \eta\,(0.2 \sqrt{\max(n, m)}\, O + \lambda W)$.
    AdamW, with the same $\eta$ and $\lambda$, for embeddings, the head, the position table, biases
    and norm gains. Then QK-Clip, which does not touch the step that measured the logits.

    A parameter without a gradient is left untouched, its state included; a frozen one has none.

    Parameters may be sharded (``DTensor``, FSDP2); their state is sharded as they are. AdamW works
    on shards as they lie; for Muon see ``matrix_shards``. Where ranks hold copies (a replicated
    encoder, HSDP), each computes the same update.

    Args:
        model: the model to train; parameter names decide the algorithm (``matrix_shape``).
        lr: peak learning rate of both algorithms.
        weight_decay: decoupled, on every parameter, norm gains too (crucial, says Moonlight).
        qk_clip_threshold: largest attention logit allowed; None trains without QK-Clip.
        encoder_lr_scale: the vision tower's learning rate over that of the rest; ours, 1 published.
        momentum: mu of Muon.
        betas: decay of AdamW's two averages.
        eps: AdamW's.
        process_group: ranks over which the largest logits are taken where weights are not sharded;
            None means all of them.

    Raises:
        ValueError: if a value is out of its range or nothing in the model is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        qk_clip_threshold: float | None,
        encoder_lr_scale: float = 1.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        groups = [
            {**group, "params": params, "algorithm": algorithm}
            for group in parameter_groups(
                model, lr=lr, weight_decay=weight_decay, encoder_lr_scale=encoder_lr_scale
            )
            for algorithm, params in by_algorithm(group["params"]).items()
        ]
        # fused: load_state_dict reads it, to leave the step counts in fp32 on their device
        defaults = {"momentum": momentum, "betas": tuple(betas), "eps": eps, "fused": True}
        super().__init__(groups, defaults)
        self.awaited: frozenset[Tensor] = frozenset()
        self.when_they_are_updated: Callable[[], None] | None = None
        self.qk_clip: QKClip | None = None
        if qk_clip_threshold is not None:
            self.qk_clip = QKClip(model, threshold=qk_clip_threshold, process_group=process_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then clip the heads that were measured."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        call, missing = self.when_they_are_updated, set(self.awaited)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
            else:
                self._adamw_step(group)
            missing.difference_update(group["params"])
            if call is not None and not missing:
                call()
                call = None
        if self.qk_clip:
            self.qk_clip.apply()
        return loss

    def when_updated(self, parameters: Iterable[Tensor], call: Callable[[], None]) -> None:
        """Call something in every step as soon as these have their new values.

        Tower and projector come first. Not for the parameters of clipped attentions, which change
        once more at the end.
        """
        self.awaited, self.when_they_are_updated = frozenset(parameters), call

    @property
    def clipped_heads(self) -> Bool[Tensor, "L H"] | None:
        """The heads, by layer, that the last step clipped; None before it or without QK-Clip."""
        return self.qk_clip.clipped_heads_LH if self.qk_clip else None

    def _muon_step(self, group: dict[str, Any]) -> None:
        mu, lr = group["momentum"], group["lr"]
        for pieces in batches(self._pieces(group)):
            grads = [one.grad for one in pieces]
            momenta = [one.momentum for one in pieces]
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, grads)
            nesterov = list(torch._foreach_add(grads, momenta, alpha=mu))
            updates = orthogonalized(pieces, nesterov)
            torch._foreach_mul_([one.param for one in pieces], 1 - lr * group["weight_decay"])
            for one, update in zip(pieces, updates, strict=True):
                rms_matching = UPDATE_RMS * max(one.shape[1:]) ** 0.5
                one.param.add_(update, alpha=-lr * rms_matching)

    def _pieces(self, group: dict[str, Any]) -> Iterator[Piece]:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            shape = matrix_shape(name, param.shape)
            if param.grad is not None and shape is not None:
                momentum = self._state(param, "momentum")
                yield piece(
                    param, param.grad, momentum, shape, stacked="experts" in name.split(".")
                )

    def _adamw_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        beta1, beta2 = group["betas"]
        adamw(
            [on_this_rank(p) for p in params],
            [on_this_rank(p.grad) for p in params],
            [on_this_rank(self._state(p, "exp_avg")) for p in params],
            [on_this_rank(self._state(p, "exp_avg_sq")) for p in params],
            [],
            [self._adamw_step_count(p) for p in params],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, param: Tensor, key: str) -> Tensor:
        state = self.state[param]
        if key not in state:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state[key]

    def _adamw_step_count(self, param: Tensor) -> Tensor:
        # fp32 on the parameter's device: what the fused kernel counts in
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state["step"]


def matrix_shape(name: str, shape: torch.Size) -> tuple[int, int, int] | None:
    """How Muon reads a parameter: (matrices, rows, columns); None where AdamW updates it.

    Published: embedding, head and whatever is no matrix go to AdamW. Ours, where no report says:
    each expert of a stack is a matrix; the fused ``wqkv`` is three, because queries, keys and
    values are three maps that only share storage; the patch convolution is the one matrix that it
    multiplies with each flattened patch; the position table is an embedding; the router's weight
    is a matrix like any other.
    """
    path = name.split(".")
    if len(shape) < 2 or not LOOKED_UP.isdisjoint(path):
        return None
    if "experts" in path:
        num_experts, rows, columns = shape
        return num_experts, rows, columns
    if "wqkv" in path:
        return 3, shape[0] // 3, shape[1]
    return 1, shape[0], prod(shape[1:])


def by_algorithm(
    named: list[tuple[str, nn.Parameter]],
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Split named parameters between ``muon`` and ``adamw``."""
    split = defaultdict(list)
    for name, param in named:
        split["adamw" if matrix_shape(name, param.shape) is None else "muon"].append((name, param))
    return split
