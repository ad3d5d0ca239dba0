"""Partial rollouts against waiting for the longest: iterations under long-tailed answers.

One policy phase twice, each in a process of its own, taking turns a block of iterations at a
time: one waits for all the groups it asked for, the other keeps more in flight, trains on what is
finished and lets the rest go on with the new weights. The engine is the native one, iterations are
whole: rollout, training, sync. How long an answer is was drawn beforehand: most are short, a few
are sixteen times as long; it is cut there, so the weights do not matter.

A side's first iterations are in no number: those of partial rollouts bring short answers only. What
counts is seconds a trained token, since both must train on answers of the same lengths in the end.

Not yet run to its end: both sides take their turns, the table has not been seen.

    python benchmarks/partial_rollouts.py

Source: Kimi-Researcher tells of at least 1.5x from turn-level partial rollouts; lengths are ours.
"""

import argparse
import os
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_step import Gate, Side, tell

SEED = 0
GROUPS, GROUP_SIZE = 8, 4
SHORT, LONG, LONG_ONE_IN = 24, 384, 8
"""Tokens of an answer, and how many groups hold long ones."""
SIDES = {
    "waits for the longest": {},
    "partial rollouts": {"groups_ahead": 8, "max_staleness": 4},
}


def length_of(number: int, seed: int) -> int:
    """How long an answer is: about SHORT tokens, or LONG in a few groups."""
    import numpy as np

    is_long = np.random.default_rng([SEED, number]).random() < 1 / LONG_ONE_IN
    spread = np.random.default_rng([SEED, number, seed % 2**31]).uniform(0.5, 1.5)
    return max(1, round((LONG if is_long else SHORT) * spread))


def run_side(args: argparse.Namespace) -> None:
    """Train as the gate allows."""
    import warnings
    from functools import partial

    import lightning
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader

    from data_modules.rl_tasks import Iterations
    from moonlit.batch import Task, Trajectory
    from moonlit.chat.messages import Message
    from moonlit.chat.tokenizer import Tokenizer
    from moonlit.losses.policy_gradient import clipped_ratio_loss
    from moonlit.models.kimi import Kimi
    from moonlit.optim.baselines import adamw
    from moonlit.phases.guard import StepGuard
    from moonlit.phases.visual_rl import VisualRL
    from moonlit.rl.dialogue_environment import trajectory_of
    from moonlit.rl.engines.native import NativeEngine
    from moonlit.rl.length_rules import NoRule
    from moonlit.rl.rollout_settings import RolloutSettings

    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    gate = Gate()

    class CutWhereDrawn:
        async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
            cut = replace(policy, max_reply_tokens=length_of(task.answer, seed))
            trajectory = trajectory_of(await cut.reply(task.prompt, seed=seed))
            trajectory.reward = float(seed % 2)
            return trajectory

        async def aclose(self) -> None:
            pass

    class Tasks(lightning.LightningDataModule):
        seed, tokenizer, held_out_names = SEED, Tokenizer.embedded(), ()

        def task(self, number: int) -> Task:
            prompt = [Message(role="user", content=f"{number}")]
            return Task(prompt=prompt, domain="d", environment="lengths", answer=number)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Iterations(), batch_size=None)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gate.begin_step()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            answers = [one for group in pl_module.last_groups for one in group.trajectories]
            gate.end_step(
                tokens=sum(one.num_tokens for one in answers),
                longest=max(one.num_tokens for one in answers),
                rollout_s=logged["perf/rollout_s"],
                staleness=logged["rl/staleness"],
            )

    def build_model() -> Kimi:
        torch.manual_seed(SEED)
        path = Path(__file__).parents[1] / "conf" / "model" / "tiny.yaml"
        return Kimi(decoder=instantiate(OmegaConf.load(path)["decoder"]), vision=None)

    phase = VisualRL(
        objective=partial(clipped_ratio_loss, low=0.5, high=5.0, regularisation=0.03),
        environment=CutWhereDrawn(),
        build_engine=NativeEngine.copy_of,
        rollouts=RolloutSettings(
            group_size=GROUP_SIZE, groups_per_iteration=GROUPS, max_new_tokens=2 * LONG,
            **SIDES[args.side],
        ),
        length_rule=NoRule(), normalise_advantages=False, reset_optimizer=False,
        build_model=build_model,
        build_optimizer=partial(adamw, lr=1e-4, weight_decay=0.0, encoder_lr_scale=1.0),
        schedule=lambda step, total_steps: 1.0, trains=["language_model"], max_grad_norm=1.0,
        selection_bias_rate=0.0,
        guard=StepGuard(spike_sigmas=float("inf"), window=50, max_skips_in_a_row=3),
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=args.iterations, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[Watch()],
    )  # fmt: skip
    tell({"torch": torch.__version__})
    trainer.fit(phase, datamodule=Tasks())


def row(side: Side, skip: int) -> str:
    """Write a side's line of the table."""
    steps = side.steps[skip:]
    seconds = [step["seconds"] for step in steps]
    tokens = sum(step["tokens"] for step in steps)
    cells = [
        side.name,
        f"{statistics.mean(seconds):.2f}",
        f"{min(seconds):.2f} - {max(seconds):.2f}",
        f"{statistics.mean(step['rollout_s'] for step in steps):.2f}",
        f"{tokens / len(steps) / GROUPS / GROUP_SIZE:.0f}",
        f"{max(step['longest'] for step in steps):.0f}",
        f"{statistics.mean(step['staleness'] for step in steps):.2f}",
        f"{tokens / sum(seconds):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Let both sides take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=28, help="of each side")
    parser.add_argument("--skip", type=int, default=8, help="first ones that do not count")
    parser.add_argument(
        "--block", type=int, default=4, help="iterations that a side takes in a row"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/partial_rollouts"))
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    words = [f"--iterations={args.iterations}", f"--threads={args.threads}"]
    sides = [
        Side(name, sys.executable, __file__, words, args.out / f"{name.replace(' ', '_')}.log")
        for name in SIDES
    ]
    loads = []
    for _ in range(args.iterations // args.block):
        for side in sides:
            side.block(args.block)
        loads.append(os.getloadavg()[0])
    print(f"torch {sides[0].versions['torch']}, {platform.machine()}, {args.threads} threads, load"
          f" {min(loads):.1f} to {max(loads):.1f}; {GROUPS} groups of {GROUP_SIZE} an iteration,"
          f" {args.iterations - args.skip} iterations of each side count\n")  # fmt: skip
    print("| side | mean s an iteration | min - max s | rollout s | tokens an answer | longest"
          " | staleness | trained tokens/s |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rates = []
    for side in sides:
        print(row(side, args.skip))
        steps = side.steps[args.skip :]
        rates.append(sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps))
    print(f"\npartial rollouts train {rates[1] / rates[0]:.2f} times as many tokens a second")


if __name__ == "__main__":
    main()
