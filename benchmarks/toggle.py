"""Does Toggle save tokens and keep the use of more? Three arms from one policy, several seeds.

Sums along chains: no length rule, Toggle, and a hard cap on every answer; each evaluated on
held-out chains like those of training, and on longer ones, at the cap of training and at a larger
one. Every run is a ``moonlit`` command, so what is here is only their order, the table and the
plot. A result that is there already is not made again.

    moonlit prepare source=chain_traces
    python benchmarks/toggle.py --jobs 2

Source of the question: technical report (arXiv:2602.02276), Sec. 4.4.2: 25 to 30 % fewer tokens at
equal scores, where rigid budgets leave a model that cannot use more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MOONLIT = Path(sys.executable).with_name("moonlit")
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
    parser.add_argument("--traces", default="data/chain_traces")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks of each set")
    parser.add_argument(
        "--caps", type=int, nargs="+", default=[56, 112], help="tokens of an answer"
    )
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/toggle.svg"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train(args, "warm_up", seed), args.seeds))
        arms = [(arm, seed) for seed in args.seeds for arm in ARMS]
        list(pool.map(lambda arm: run_arm(args, *arm), arms))
    rows = [row_of(args, arm) for arm in ARMS]
    print(markdown(rows, args.caps))
    draw(rows, args.caps, args.plot)
    print(f"wrote {args.plot}")


def train(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Train one arm with one seed; return its checkpoint."""
    run = args.out / f"{arm}-{seed}"
    ckpt = run / "checkpoints" / "last.ckpt"
    if arm == "warm_up":
        words = [
            "experiment=toggle_warm_up",
            f"data.folder={args.traces}",
            f"data.data_dir={args.out / f'data-{seed}'}",
        ]
    else:
        start = args.out / f"warm_up-{seed}" / "checkpoints" / "last.ckpt"
        words = [f"experiment={arm}", f"init_from={start}"]
    words = ["train", *words, f"run_dir={run}", f"seed={seed}"]
    call(run.with_suffix(".log"), words, makes=run / "finished.json")
    return ckpt


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed, and evaluate it at every cap."""
    ckpt = train(args, arm, seed)
    for cap in args.caps:
        out = result(args, arm, seed, cap)
        words = ["eval", "data=chains", f"ckpt={ckpt}", f"out={out}", f"max_new_tokens={cap}",
                 f"sets=[{','.join(SETS)}]", f"num_tasks={args.tasks}", "thinking=true",
                 "temperature=1.0"]  # fmt: skip
        call(out.with_suffix(".log"), words, makes=out)


def call(log: Path, words: Sequence[str], *, makes: Path) -> None:
    """Run a command unless what it makes is there; one thread, so that commands share the cores."""
    if makes.exists():
        return
    print("moonlit", *words, flush=True)
    with log.open("w") as said:
        done = subprocess.run(
            [MOONLIT, *words], stdout=said, stderr=said, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"moonlit {words[0]} ended with {done.returncode}: see {log}")


def result(args: argparse.Namespace, arm: str, seed: int, cap: int) -> Path:
    """Return where an evaluation is written."""
    return args.out / f"eval-{arm}-{seed}-{cap}.json"


def row_of(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Gather an arm's numbers by set and cap, a value a seed."""
    row: dict[str, Any] = {"arm": arm}
    for name in SETS:
        for cap in args.caps:
            some = [
                json.loads(result(args, arm, seed, cap).read_text())["sets"][name]
                for seed in args.seeds
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
