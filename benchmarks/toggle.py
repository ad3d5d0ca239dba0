"""Does Toggle save tokens and keep the use of more? Three arms from one policy, several seeds.

Sums along chains: no length rule, Toggle, and a hard cap on every answer; each evaluated on
held-out chains like those of training, and on longer ones, at the cap of training and at a larger
one. Every run is a ``moonlit`` command, so what is here is only their order, the table and the
plot. A result that is there already is not made again.

    python benchmarks/toggle.py

The policy is warmed up twice: on sums modulo 5, from which it learns to go along a chain, then on
those modulo 3, which it learns to add. In one go, modulo 3, was not tried.

Source of the question: technical report (arXiv:2602.02276), Sec. 4.4.2: 25 to 30 % fewer tokens at
equal scores, where rigid budgets leave a model that cannot use more.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""Commands begin as copies of a process that has imported everything: a minute saved on each."""
WARM_UPS = {5: 300, 3: 120}
"""Steps of each warm-up, by the modulus of its sums."""
ARMS = {
    "warm_up": "before RL",
    "toggle_none": "no length rule",
    "toggle": "Toggle",
    "toggle_hard_cap": "hard cap",
}
SETS = {"chains": "2 to 8 steps, as trained", "long_chains": "14 to 20 steps"}


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toggle"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks of each set")
    parser.add_argument("--caps", type=int, nargs="+", default=[56, 112], help="of an answer")
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/toggle.svg"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # commands share the cores
    CONTEXT.set_forkserver_preload(["moonlit.cli", "moonlit.train", "moonlit.phases.joint_rl"])
    warm_up(args)
    arms = [(arm, seed) for seed in args.seeds for arm in ARMS if arm != "warm_up" or not seed]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda arm: run_arm(args, *arm), arms))
    rows = [row_of(args, arm) for arm in ARMS]
    print(markdown(rows, args.caps))
    draw(rows, args.caps, args.plot)
    print(f"wrote {args.plot}")


def checkpoint(run: Path) -> Path:
    """Return where a run ends."""
    return run / "checkpoints" / "last.ckpt"


def warm_up(args: argparse.Namespace) -> None:
    """Make traces and train on them, one modulus after the other."""
    before: list[str] = []
    for modulus, steps in WARM_UPS.items():
        run, traces = args.out / f"warm_up-{modulus}", args.out / f"traces-{modulus}"
        call(
            ["prepare", "source=chain_traces", f"source.source.modulus={modulus}",
             f"source.folder={traces}"],
            makes=traces / "held_out.jsonl",
        )  # fmt: skip
        call(
            ["train", "experiment=toggle_warm_up", f"data.folder={traces}", f"run_dir={run}",
             f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", *before],
            makes=run / "finished.json",
        )  # fmt: skip
        before = [f"init_from={checkpoint(run)}"]


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed, and evaluate it at every cap."""
    run = args.out / f"warm_up-{[*WARM_UPS][-1]}"
    if arm != "warm_up":
        start, run = checkpoint(run), args.out / f"{arm}-{seed}"
        words = ["train", f"experiment={arm}", f"init_from={start}", f"run_dir={run}"]
        call([*words, f"seed={seed}"], makes=run / "finished.json")
    for cap in args.caps:
        out = result(args, arm, seed, cap)
        words = ["eval", "data=chains", f"ckpt={checkpoint(run)}", f"out={out}",
                 f"max_new_tokens={cap}", f"sets=[{','.join(SETS)}]", f"num_tasks={args.tasks}",
                 "thinking=true", "temperature=1.0"]  # fmt: skip
        call(words, makes=out)


def call(words: Sequence[str], *, makes: Path) -> None:
    """Run a command unless what it makes is there."""
    if makes.exists():
        return
    print("moonlit", *words, flush=True)
    log = makes.with_suffix(".log") if makes.parent.is_dir() else makes.parent.with_suffix(".log")
    process = CONTEXT.Process(target=run_command, args=(list(words), log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"moonlit {words[0]} ended with {process.exitcode}: see {log}")


def run_command(words: list[str], log: Path) -> None:
    """Be a command whose words go into a log."""
    from moonlit.cli import main as moonlit

    with log.open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    sys.argv = ["moonlit", *words]
    moonlit()


def result(args: argparse.Namespace, arm: str, seed: int, cap: int) -> Path:
    """Return where an evaluation is written."""
    return args.out / f"eval-{arm}-{seed}-{cap}.json"


def row_of(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Gather an arm's numbers by set and cap, a value a seed."""
    row: dict[str, Any] = {"arm": arm}
    for name in SETS:
        for cap in args.caps:
            some = [
                json.loads(path.read_text())["sets"][name]
                for seed in args.seeds
                if (path := result(args, arm, seed, cap)).exists()
            ]
            for what in ("accuracy", "tokens_per_answer", "unfinished_fraction"):
                row[name, cap, what] = [values[what] for values in some]
    return row


def markdown(rows: Sequence[dict[str, Any]], caps: Sequence[int]) -> str:
    """Lay the table out: mean over seeds, lowest and highest behind it."""
    head = ["arm", f"tokens ({caps[0]})", f"accuracy ({caps[0]})"]
    head += [f"long chains ({cap})" for cap in caps]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        cells = [
            ARMS[row["arm"]],
            spread(row["chains", caps[0], "tokens_per_answer"], "{:.1f}", 1),
            spread(row["chains", caps[0], "accuracy"], "{:.1f}", 100),
            *(spread(row["long_chains", cap, "accuracy"], "{:.1f}", 100) for cap in caps),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: Sequence[float], form: str, scale: float) -> str:
    """Write a mean with the lowest and highest value behind it."""
    mean, low, high = (
        form.format(scale * value) for value in (statistics.mean(values), min(values), max(values))
    )
    return f"{mean} [{low}-{high}]"


def draw(rows: Sequence[dict[str, Any]], caps: Sequence[int], path: Path) -> None:
    """Draw accuracy against tokens, a line an arm through its caps, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moonlit"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SETS), figsize=(9, 3.4), sharey=True)
    for axis, (name, words) in zip(axes, SETS.items(), strict=True):
        for place, row in enumerate(rows):
            tokens = [row[name, cap, "tokens_per_answer"] for cap in caps]
            accuracy = [row[name, cap, "accuracy"] for cap in caps]
            for some, right in zip(tokens, accuracy, strict=True):
                axis.scatter(some, right, color=f"C{place}", s=22)
            means = [[statistics.mean(values) for values in one] for one in (tokens, accuracy)]
            axis.plot(*means, color=f"C{place}", label=ARMS[row["arm"]])
        axis.set_title(words)
        axis.set_xlabel(f"tokens an answer, caps {' and '.join(map(str, caps))}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy")
    axes[-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
