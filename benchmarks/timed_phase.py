"""A phase of reinforcement learning on one side of a benchmark: each step waits for the word."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from turns import Gate, tell

from data_modules.rl_tasks import Iterations
from moonlit.agents.environment import Environment
from moonlit.batch import Task
from moonlit.chat.tokenizer import Tokenizer
from moonlit.losses.policy_gradient import PolicyObjective
from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.phases.guard import StepGuard
from moonlit.phases.visual_rl import VisualRL
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.length_rules import NoRule
from moonlit.rl.rollout_settings import RolloutSettings


class Tasks(lightning.LightningDataModule):
    """Tasks by number, without an end."""

    tokenizer, held_out_names = Tokenizer.embedded(), ()

    def __init__(self, task_of: Callable[[int], Task], seed: int) -> None:
        super().__init__()
        self.task, self.seed = task_of, seed

    def train_dataloader(self) -> DataLoader:
        """Return the numbers of iterations."""
        return DataLoader(Iterations(), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave them where they are."""
        return batch


class Turns(lightning.Callback):
    """Waits before a step, and tells how it went."""

    def __init__(self, told: Callable[[VisualRL, dict[str, float]], dict[str, float]]) -> None:
        self.gate, self.told = Gate(), told

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Wait for the word."""
        self.gate.begin_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Tell of the step."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.gate.end_step(**self.told(pl_module, logged))


def train(
    *,
    build_model: Callable[[], Kimi],
    task_of: Callable[[int], Task],
    environment: Environment,
    objective: PolicyObjective,
    normalise_advantages: bool,
    learning_rate: float,
    rollouts: RolloutSettings,
    told: Callable[[VisualRL, dict[str, float]], dict[str, float]],
    num_steps: int,
    num_threads: int,
    seed: int,
) -> None:
    """Train the decoder by AdamW at one rate, as the turns allow.

    A step is told of by what ``told`` makes of the phase and of what it logged.
    """
    torch.set_num_threads(num_threads)
    warnings.filterwarnings("ignore")
    phase = VisualRL(
        objective=objective,
        environment=environment,
        build_engine=NativeEngine.copy_of,
        rollouts=rollouts,
        length_rule=NoRule(),
        normalise_advantages=normalise_advantages,
        reset_optimizer=False,
        build_model=build_model,
        build_optimizer=partial(adamw, lr=learning_rate, weight_decay=0.0, encoder_lr_scale=1.0),
        schedule=lambda step, total_steps: 1.0,
        trains=["language_model"],
        max_grad_norm=1.0,
        selection_bias_rate=0.0,
        guard=StepGuard(spike_sigmas=float("inf"), window=50, max_skips_in_a_row=3),
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=num_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[Turns(told)],
    )  # fmt: skip
    tell({"torch": torch.__version__, "lightning": lightning.__version__})
    trainer.fit(phase, datamodule=Tasks(task_of, seed))
