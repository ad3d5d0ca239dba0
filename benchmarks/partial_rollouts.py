"""Partial rollouts against waiting for the longest: iterations under long-tailed answers.

One policy phase twice, each in a process of its own, taking turns a block of iterations at a
time: one waits for all the groups it asked for, the other keeps more in flight, trains on what is
finished and lets the rest go on with the new weights. The engine is the native one, iterations are
whole: rollout, training, sync. How long an answer is was drawn beforehand: most are short, a few
are sixteen times as long; it is cut there, so the weights do not matter.

A side's first iterations are in no number: those of partial rollouts bring short answers only. What
counts is seconds a trained token, since both must train on answers of the same lengths in the end.

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

from turns import Side

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


def tiny_decoder() -> Any:
    """The same weights at every call."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from moonlit.models.kimi import Kimi

    torch.manual_seed(SEED)
    path = Path(__file__).parents[1] / "conf" / "model" / "tiny.yaml"
    return Kimi(decoder=instantiate(OmegaConf.load(path)["decoder"]), vision=None)


def run_side(args: argparse.Namespace) -> None:
    """Train as the turns allow."""
    from functools import partial

    from timed_phase import train

    from moonlit.batch import Task, Trajectory
    from moonlit.chat.messages import Message
    from moonlit.losses.policy_gradient import clipped_ratio_loss
    from moonlit.rl.dialogue_environment import trajectory_of
    from moonlit.rl.rollout_settings import RolloutSettings

    class CutWhereDrawn:
        async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
            cut = replace(policy, max_reply_tokens=length_of(task.answer, seed))
            trajectory = trajectory_of(await cut.reply(task.prompt, seed=seed))
            trajectory.reward = float(seed % 2)
            return trajectory

        async def aclose(self) -> None:
            pass

    def task_of(number: int) -> Task:
        prompt = [Message(role="user", content=f"{number}")]
        return Task(prompt=prompt, domain="d", environment="lengths", answer=number)

    def told(phase: Any, logged: dict[str, float]) -> dict[str, float]:
        lengths = [one.num_tokens for group in phase.last_groups for one in group.trajectories]
        return {
            "tokens": sum(lengths),
            "longest": max(lengths),
            "rollout_s": logged["perf/rollout_s"],
            "staleness": logged["rl/staleness"],
        }

    train(
        build_model=tiny_decoder,
        task_of=task_of,
        environment=CutWhereDrawn(),
        objective=partial(clipped_ratio_loss, low=0.5, high=5.0, regularisation=0.03),
        normalise_advantages=False,
        learning_rate=1e-4,
        rollouts=RolloutSettings(
            group_size=GROUP_SIZE,
            groups_per_iteration=GROUPS,
            max_new_tokens=2 * LONG,
            **SIDES[args.side],
        ),
        told=told,
        num_steps=args.iterations,
        num_threads=args.threads,
        seed=SEED,
    )


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
