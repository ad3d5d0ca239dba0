"""What does visual RL do to text? Tasks without pictures before and after it, several seeds.

The policy that all runs start from: a joint pre-trained one, after SFT on text alone (zero-vision
trajectories, and text tasks with their answers, so that there is something to gain and to lose).
Then visual RL on pictures only, a control that deals each group's rewards out at random, and visual
RL that keeps what SFT taught by a PTX loss; all are scored on the same held-out tasks, greedily.
Every run is a ``moonlit`` command. A result that is there already is not made again.

    python benchmarks/visual_rl_text.py --init runs/A/checkpoints/last.ckpt

Source of the question: technical report (arXiv:2602.02276), Sec. 2.3: +1.7 to +2.2 points on text.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from commands import call, checkpoint, prepare_commands

ARMS = {
    "visual_rl": ("visual RL", []),
    "shuffled": ("shuffled rewards", ["length_rule@phase.length_rule=shuffled"]),
    "ptx": (
        "visual RL with PTX",
        ["ptx@data.ptx=dialogues", "data.ptx.folder={dialogues}", "phase.ptx_coef=0.1"],
    ),
}
"""What an arm is called, and its words."""
BEFORE = "before"
TRAJECTORIES = {"trajectories": 600, "documentation": 100, "worked": 200, "searches": 0}
"""Of the zero-vision set, by kind."""


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", type=Path, required=True, help="a joint pre-trained checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/visual_rl_text"))
    parser.add_argument("--sft-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40, help="of RL")
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks of each set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_commands("visual_rl")
    start(args)
    runs = [(arm, seed) for seed in args.seeds for arm in (BEFORE, *ARMS)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: run_arm(args, *run), runs))
    print(table(args))


def start(args: argparse.Namespace) -> None:
    """Make the policy that all runs start from."""
    folder, run = args.out / "dialogues", args.out / "start"
    numbers = [f"source.num_{kind}={number}" for kind, number in TRAJECTORIES.items()]
    call(
        ["prepare", "source=zero_vision", f"source.folder={folder}", *numbers],
        makes=folder / "report.json",
    )
    call(
        ["prepare", "source=solved_tasks", f"source.folder={folder}"],
        makes=folder / "held_out_solved.jsonl",
    )
    call(
        ["train", "phase=zero_vision_sft", f"init_from={args.init}", f"run_dir={run}",
         f"data.folder={folder}", f"data.data_dir={args.out / 'data'}", "data.world=null",
         f"trainer.max_steps={args.sft_steps}", f"trainer.val_check_interval={args.sft_steps}"],
        makes=run / "finished.json",
    )  # fmt: skip


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed; what comes before training is scored on the seed's tasks too."""
    run, steps = args.out / f"{arm}-{seed}", 0 if arm == BEFORE else args.steps
    own = [] if arm == BEFORE else ARMS[arm][1]
    words = [word.format(dialogues=args.out / "dialogues") for word in own]
    call(
        ["train", "experiment=visual_rl_text", f"init_from={checkpoint(args.out / 'start')}",
         f"run_dir={run}", f"seed={seed}", f"data.num_held_out={args.tasks}",
         f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, steps)}", *words],
        makes=run / "held_out.json",
    )  # fmt: skip


def solved(args: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """Return the share of a run's held-out tasks that are solved, by set [%]."""
    metrics = json.loads((args.out / f"{arm}-{seed}" / "held_out.json").read_text())
    return {
        name.split("/")[1]: 100 * value
        for name, value in metrics.items()
        if name.endswith("/solved")
    }


def table(args: argparse.Namespace) -> str:
    """Lay out solved shares, and what each arm changed with its standard error over seeds."""
    head = ["held out", "before [%]", *(f"{words}, change" for words, _ in ARMS.values())]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    before = [solved(args, BEFORE, seed) for seed in args.seeds]
    after = {arm: [solved(args, arm, seed) for seed in args.seeds] for arm in ARMS}
    for name in before[0]:
        cells = [name, f"{statistics.mean(one[name] for one in before):.1f}"]
        cells += [
            change([b[name] - a[name] for a, b in zip(before, runs, strict=True)])
            for runs in after.values()
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def change(points: Sequence[float]) -> str:
    """Write a mean change [points] with its standard error over seeds."""
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else float("nan")
    return f"{statistics.mean(points):+.1f} +- {error:.1f}"


if __name__ == "__main__":
    main()
