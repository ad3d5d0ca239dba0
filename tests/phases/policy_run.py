"""A policy of a few thousand weights that is paid for tokens with even ids."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, Trainer, seed_everything
from micro_run import micro_model, micro_settings
from torch.utils.data import DataLoader, IterableDataset

from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.chat.tokenizer import Tokenizer
from moonlit.losses.policy_gradient import clipped_ratio_loss
from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.phases.visual_rl import VisualRL
from moonlit.rl.dialogue_environment import DialogueEnvironment
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.length_rules import LengthRule, NoRule
from moonlit.rl.rollout_settings import RolloutSettings

TOKENIZER = Tokenizer.embedded()


class EvenIds:
    """Pays the share of sampled ids that are even; counts the tasks it saw."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        self.seen[task.answer] += 1
        (row,) = trajectory.segments
        ids = [i for i, s in zip(row.input_ids, row.is_sampled, strict=True) if s]
        return {"even": sum(i % 2 == 0 for i in ids) / len(ids)}


class Numbered(LightningDataModule):
    """Task n is the word n."""

    seed, tokenizer, held_out_names = 0, TOKENIZER, ["even"]

    def task(self, number: int) -> Task:
        prompt = [Message(role="user", content=f"{number}")]
        return Task(prompt=prompt, domain="reasoning", environment="even", answer=number)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def build_model() -> Kimi:
    shape = micro_model().decoder_shape
    special = TOKENIZER.special
    decoder = {
        name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "vocab_size"
    } | {"media_pad_id": special.media_pad_id, "max_positions": 256}
    seed_everything(0, verbose=False)
    model = Kimi(decoder=type(shape)(vocab_size=TOKENIZER.vocab_size, **decoder), vision=None)
    with torch.no_grad():  # even ids lie on one side: there is a direction to find
        side = torch.randn(shape.model_width) / 4
        model.language_model.lm_head.weight[::2] += side
        model.language_model.lm_head.weight[1::2] -= side
    return model


def make_phase(length_rule: LengthRule | None = None, **rollouts: Any) -> VisualRL:
    settings = {"group_size": 4, "groups_per_iteration": 8, "max_new_tokens": 4, "row_tokens": 128}
    return VisualRL(
        objective=partial(clipped_ratio_loss, low=0.5, high=5.0, regularisation=0.01),
        environment=DialogueEnvironment(judge=EvenIds()),
        build_engine=NativeEngine.copy_of,
        rollouts=RolloutSettings(**settings | rollouts),
        length_rule=length_rule or NoRule(),
        normalise_advantages=False,
        reset_optimizer=False,
        **micro_settings(
            build_model=build_model,
            build_optimizer=partial(adamw, lr=0.003, weight_decay=0.0),
            schedule=lambda step, total_steps: 1.0,
            trains=["language_model"],
        ),
    )


def run(
    phase: VisualRL, *, max_steps: int, strategy: Any = "auto", devices: int = 1, **more: Any
) -> list[dict[str, float]]:
    """Train; return what was logged after each iteration."""
    from lightning import Callback

    logged: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[Watch(), *more.pop("callbacks", [])],
        **more.pop("trainer", {}),
    )  # fmt: skip
    trainer.fit(phase, datamodule=more.pop("data", None) or Numbered(), **more)
    return logged


def weights_of(phase: VisualRL) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in phase.model.parameters()])
