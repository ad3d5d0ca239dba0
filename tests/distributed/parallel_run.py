"""The micro model on the embedded rows of a whole step, on one process or on a rank of many."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from micro_run import micro_model, micro_settings, noise_row
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonlit.batch import PackedBatch
from moonlit.distributed.dep import DEPStrategy
from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.optim.muon_clip import MuonClip
from moonlit.phases.joint_pretraining import JointPretraining

NUM_STEPS = 5
LARGE = (1, 8, 6)  # as many patches as all other items of its step together


def step_rows(step: int) -> list[PackedBatch]:
    """Four rows; pictures in some, in none (step 1), or in all; a clip; an item that outweighs."""
    noise = torch.Generator().manual_seed(100 + step)
    if step == 1:
        return [noise_row(noise, [n, 5], []) for n in (7, 12, 4, 9)]
    if step == 2:
        return [noise_row(noise, [9, 7], [(3, 2, 4), (1, 4, 2)]) for _ in range(4)]
    return [
        noise_row(noise, [9, 7, 5], [(1, 2, 4), (2, 4, 2)]),
        noise_row(noise, [11, 3], []),
        noise_row(noise, [15, 6], [LARGE, (1, 2, 2)]),
        noise_row(noise, [8], []),
    ]


class StepRows(LightningDataModule):
    """Rank r of R takes rows r, r + R, ... of each step."""

    def __init__(self, text_only: bool = False, num_rows: int = 4) -> None:
        super().__init__()
        self.text_only, self.num_rows, self.next_step = text_only, num_rows, 0

    def train_dataloader(self) -> Any:
        strategy: Any = self.trainer.strategy
        rank = getattr(strategy, "data_parallel_rank", 0)
        size = getattr(strategy, "data_parallel_size", 1)
        steps = range(self.next_step, NUM_STEPS)
        return Rows(steps, slice(rank, self.num_rows, size), self.text_only)

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]


class Rows:
    is_planned = True

    def __init__(self, steps: range, mine: slice, text_only: bool) -> None:
        self.steps, self.mine, self.text_only = steps, mine, text_only

    def __len__(self) -> int:
        return NUM_STEPS

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in self.steps:
            rows = step_rows(1 if self.text_only else step)
            yield (rows + rows[:1])[self.mine]


@dataclass
class Outcome:
    """The first gradients, every loss and norm, and the last weights, whole."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[tuple[float, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def merged(outcomes: list[Outcome]) -> Outcome:
    """Every rank has the weights of its own stages; what several have must agree."""
    union = Outcome(metrics=outcomes[0].metrics)
    for one in outcomes:
        assert one.metrics == union.metrics
        for ours, theirs in ((one.gradients, union.gradients), (one.weights, union.weights)):
            for name, tensor in ours.items():
                assert torch.equal(theirs.setdefault(name, tensor), tensor), name
    return union


class Record(Callback):
    def __init__(self) -> None:
        self.outcome = Outcome()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.outcome.gradients = {
                name: whole(p.grad)
                for name, p in pl_module.named_parameters()
                if p.grad is not None
            }

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen = trainer.callback_metrics
        self.outcome.metrics.append(
            (seen["train/nll_per_token"].item(), seen["train/grad_norm"].item())
        )

    def on_train_end(self, trainer, pl_module):
        self.outcome.weights = {name: whole(p) for name, p in pl_module.state_dict().items()}


class SaveAt(Callback):
    """Saves after a step, and begins to write while the next steps are trained."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def exact_model(dtype: torch.dtype) -> Kimi:
    """In float64, which the grouped kernel does not know."""
    micro = micro_model()
    seed_everything(0, verbose=False)
    model = Kimi(decoder=micro.decoder_shape, vision=micro.vision_shape, experts="reference")
    return model.to(dtype)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def strategy(**changes: Any) -> DEPStrategy:
    settings: dict[str, Any] = {
        "pp_size": 1, "stages_per_rank": 1, "dp_replicate_size": 1, "dp_shard_size": None,
        "ep_size": 1, "zero_stage": 3, "encoder": "decoupled", "recompute": "always",
        "patch_budget": 20, "overlap": True, "process_group_backend": None, "timeout_s": 150.0,
        "run_dir": "unused",
    }  # fmt: skip
    return DEPStrategy(**settings | changes)


def train(
    layout: dict[str, Any] | None,
    *,
    phase: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    num_ranks: int = 1,
    max_steps: int = NUM_STEPS,
    text_only: bool = False,
    num_rows: int = 4,
    muon: bool = False,
    precision: Any = None,
    callbacks: list[Callback] | None = None,
    resume_from: str | None = None,
) -> Outcome:
    """Train five steps; ``layout`` None is one process with plain autograd."""
    seed_everything(0, verbose=False)
    optimizer = partial(adamw, lr=0.01, weight_decay=0.1)
    if muon:
        optimizer = partial(MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=0.01)
    built = {"build_model": partial(exact_model, dtype), "build_optimizer": optimizer}
    module = JointPretraining(**micro_settings(**built | (phase or {})))
    record = Record()
    trainer = Trainer(
        accelerator="cpu", devices=1 if layout is None else num_ranks,
        strategy="auto" if layout is None else strategy(**layout), precision=precision,
        max_steps=max_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[record, *(callbacks or [])],
    )  # fmt: skip
    trainer.fit(module, datamodule=StepRows(text_only, num_rows), ckpt_path=resume_from)
    return record.outcome
