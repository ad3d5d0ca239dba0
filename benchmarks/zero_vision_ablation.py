"""Does zero-vision SFT hurt vision? Three arms from one pre-trained checkpoint, several seeds.

(a) nothing, (b) zero-vision SFT, (c) the same dialogues with their pictures shown, as many tokens;
each evaluated on held-out pictures, without tools and with the ipython tool, and blind (the same
question with another task's picture). Every run is a ``moonlit`` command, so what is here is only
their order, the table and the plot. A result that is there already is not made again.

    python benchmarks/zero_vision_ablation.py --init runs/A/checkpoints/last.ckpt --jobs 2

Source of the question: technical report (arXiv:2602.02276), Sec. 2.2, which gives no numbers.
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
    "none": "(a) no SFT",
    "zero_vision": "(b) zero-vision",
    "pictures": "(c) with pictures",
}
EXPERIMENTS = {
    "zero_vision": "zero_vision_ablation",
    "pictures": "zero_vision_ablation_pictures",
}
MODES = {
    "plain": ["tools=null", "thinking=false", "max_new_tokens=16"],
    "tools": ["tools=ipython", "thinking=true", "max_new_tokens=320", "max_turns=4"],
}


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", type=Path, required=True, help="a joint pre-trained checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/zero_vision_ablation"))
    parser.add_argument("--zero-vision", default="data/zero_vision")
    parser.add_argument("--pictures", default="data/zero_vision_pictures")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=64, help="held-out tasks of each set")
    parser.add_argument("--sets", nargs="+", default=["counting", "colours", "unseen_pairs"])
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/zero_vision_ablation.svg"))
    args = parser.parse_args()
    arms = [("none", 0), *((arm, seed) for arm in EXPERIMENTS for seed in args.seeds)]
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda arm: run_arm(args, *arm), arms))
    rows = table_rows(args, arms)
    print(markdown(rows, args.sets))
    draw(rows, args.sets, args.plot)
    print(f"wrote {args.plot}")


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed, and evaluate it."""
    ckpt = args.init
    if arm != "none":
        run = args.out / f"{arm}-{seed}"
        ckpt = run / "checkpoints" / "last.ckpt"
        folder = args.zero_vision if arm == "zero_vision" else args.pictures
        data = args.out / f"data-{arm}-{seed}"
        call(
            args.out / f"{arm}-{seed}.log",
            ["train", f"experiment={EXPERIMENTS[arm]}", f"init_from={args.init}",
             f"run_dir={run}", f"data.folder={folder}", f"data.data_dir={data}",
             f"seed={seed}", f"trainer.max_steps={args.steps}",
             f"trainer.val_check_interval={args.steps}"],
            makes=ckpt,
        )  # fmt: skip
    for mode, words in MODES.items():
        out = result(args, arm, seed, mode)
        call(
            out.with_suffix(".log"),
            ["eval", f"ckpt={ckpt}", f"out={out}", f"sets=[{','.join(args.sets)}]",
             f"num_tasks={args.tasks}", *words],
            makes=out,
        )  # fmt: skip


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


def result(args: argparse.Namespace, arm: str, seed: int, mode: str) -> Path:
    """Return where an evaluation is written."""
    return args.out / f"eval-{arm}-{seed}-{mode}.json"


def table_rows(args: argparse.Namespace, arms: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Gather accuracies by arm, mode and set, a value a seed."""
    rows = []
    for arm in ARMS:
        for mode in MODES:
            row: dict[str, Any] = {"arm": arm, "mode": mode}
            for name in args.sets:
                some = [
                    json.loads(result(args, arm, seed, mode).read_text())["sets"][name]
                    for one, seed in arms
                    if one == arm
                ]
                row[name] = [values["accuracy"] for values in some]
                row[f"{name}_blind"] = [values["blind_accuracy"] for values in some]
                row.setdefault("calls", []).extend(values["calls_per_answer"] for values in some)
                row.setdefault("cut", []).extend(values["unfinished_fraction"] for values in some)
            rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """Lay the table out: mean over seeds, their range, and blind."""
    head = ["arm", "tools", *(f"{name} (blind)" for name in sets), "calls", "unfinished"]
    lines = [" | ".join(head), " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in rows:
        cells = [ARMS[row["arm"]], "ipython" if row["mode"] == "tools" else "none"]
        cells += [f"{spread(row[name])} ({spread(row[f'{name}_blind'])})" for name in sets]
        cells += [f"{statistics.mean(row['calls']):.2f}", f"{statistics.mean(row['cut']):.0%}"]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Write a mean with the lowest and highest value behind it."""
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.0%}-{max(values):.0%}]"


def draw(rows: Sequence[dict[str, Any]], sets: Sequence[str], path: Path) -> None:
    """Draw accuracies by arm, a dot a seed, blind ones hollow."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moonlit"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODES), figsize=(9, 3.4), sharey=True)
    for axis, mode in zip(axes, MODES, strict=True):
        for place, name in enumerate(sets):
            for row in (row for row in rows if row["mode"] == mode):
                x = list(ARMS).index(row["arm"]) + 0.2 * (place - (len(sets) - 1) / 2)
                axis.scatter([x] * len(row[name]), row[name], color=f"C{place}", s=22)
                blind = row[f"{name}_blind"]
                axis.scatter([x] * len(blind), blind, edgecolor=f"C{place}", color="none", s=22)
            axis.scatter([], [], color=f"C{place}", label=name)
        axis.set_xticks(range(len(ARMS)), ARMS.values())
        axis.set_title("without tools" if mode == "plain" else "with ipython")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("held-out accuracy (hollow: blind)")
    axes[-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
