"""Does Toggle save tokens and keep the use of more? Three arms from one policy, several seeds.

Sums along chains: no length rule, Toggle, and a hard cap on every answer; each evaluated on
held-out chains like those of training, and on longer ones that the training's cap has no room for.
An answer that is right within n tokens is right under every cap from n on, so one evaluation at the
largest cap tells the accuracy under each. Every run is a ``moonlit`` command, so what is here is
only their order, the table and the plot. A result that is there already is not made again.

    python benchmarks/toggle.py

The policy is warmed up twice: on sums modulo 5, from which it learns to go along a chain, then on
those modulo 3, which it learns to add, most of them gone over two or three times: one pass is
enough, so what comes after it is redundant, and the training's cap has room for all of it.

Source of the question: technical report (arXiv:2602.02276), Sec. 4.4.2: 25 to 30 % fewer tokens at
equal scores, where rigid budgets leave a model that cannot use more.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from commands import call, checkpoint, prepare_commands, spread

REDUNDANT = "source.passes={0: 0.05, 1: 0.2, 2: 0.3, 3: 0.45}"
WARM_UPS: dict[int, tuple[int, list[str]]] = {5: (300, []), 3: (120, [REDUNDANT])}
"""Steps and traces of each warm-up, by the modulus of its sums."""
ARMS = {
    "warm_up": "before RL",
    "toggle_none": "no length rule",
    "toggle": "Toggle",
    "toggle_hard_cap": "hard cap",
}
SETS = {"chains": "4 to 8 steps, as trained", "long_chains": "20 to 24 steps"}
TRAINED_CAP = 128
"""Of an answer in training: ``conf/experiment/toggle_none.yaml``."""


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toggle"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks of each set")
    parser.add_argument("--caps", type=int, nargs="+", default=[64, TRAINED_CAP, 240])
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/toggle.svg"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_commands("joint_rl")
    warm_up(args)
    arms = [(arm, seed) for seed in args.seeds for arm in ARMS if seed in seeds_of(args, arm)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda arm: run_arm(args, *arm), arms))
    answers = {arm: [read(args, arm, seed) for seed in seeds_of(args, arm)] for arm in ARMS}
    print(markdown(answers, args.caps))
    draw(args, answers)
    print(f"wrote {args.plot}")


def warm_up(args: argparse.Namespace) -> None:
    """Make traces and train on them, one modulus after the other."""
    before: list[str] = []
    for modulus, (steps, words) in WARM_UPS.items():
        run, traces = args.out / f"warm_up-{modulus}", args.out / f"traces-{modulus}"
        call(
            ["prepare", "source=chain_traces", f"source.source.modulus={modulus}",
             f"source.folder={traces}", *words],
            makes=traces / "held_out.jsonl",
        )  # fmt: skip
        call(
            ["train", "experiment=toggle_warm_up", f"data.folder={traces}", f"run_dir={run}",
             f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", *before],
            makes=run / "finished.json",
        )  # fmt: skip
        before = [f"init_from={checkpoint(run)}"]


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train one arm with one seed, and evaluate it at the largest cap."""
    run = args.out / f"warm_up-{[*WARM_UPS][-1]}"
    if arm != "warm_up":
        start, run = checkpoint(run), args.out / f"{arm}-{seed}"
        words = ["train", f"experiment={arm}", f"init_from={start}", f"run_dir={run}"]
        call([*words, f"seed={seed}"], makes=run / "finished.json")
    out = result(args, arm, seed)
    words = ["eval", "data=chains", f"ckpt={checkpoint(run)}", f"out={out}",
             f"max_new_tokens={max(args.caps)}", f"sets=[{','.join(SETS)}]",
             f"num_tasks={args.tasks}", "thinking=true", "temperature=1.0"]  # fmt: skip
    call(words, makes=out)


def seeds_of(args: argparse.Namespace, arm: str) -> list[int]:
    """Return an arm's seeds; all arms share the policy that they start from."""
    return args.seeds[:1] if arm == "warm_up" else args.seeds


def result(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return where an evaluation is written."""
    return args.out / f"eval-{arm}-{seed}.json"


Answers = dict[str, list[tuple[int, bool]]]
"""Set -> tokens of each answer, and whether it was right at the end of them."""


def read(args: argparse.Namespace, arm: str, seed: int) -> Answers:
    """Read an evaluation."""
    answers: Answers = {name: [] for name in SETS}
    for one in json.loads(result(args, arm, seed).read_text())["answers"]:
        answers[one["set"]].append((one["num_tokens"], one["is_right"]))
    return answers


def accuracy(answers: Sequence[tuple[int, bool]], cap: int) -> float:
    """Return the share that is right under a cap."""
    return statistics.mean(right and length <= cap for length, right in answers)


def tokens(answers: Sequence[tuple[int, bool]], cap: int) -> float:
    """Return the mean length under a cap."""
    return statistics.mean(min(length, cap) for length, _ in answers)


def markdown(arms: Mapping[str, Sequence[Answers]], caps: Sequence[int]) -> str:
    """Lay the table out: mean over seeds, lowest and highest behind it."""
    head = ["arm", "tokens an answer", "accuracy", *(f"long chains, {cap}" for cap in caps)]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for arm, seeds in arms.items():
        cells = [
            ARMS[arm],
            spread([tokens(one["chains"], TRAINED_CAP) for one in seeds], "{:.1f}"),
            accuracies([one["chains"] for one in seeds], TRAINED_CAP),
            *(accuracies([one["long_chains"] for one in seeds], cap) for cap in caps),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def accuracies(seeds: Sequence[Sequence[tuple[int, bool]]], cap: int) -> str:
    """Write the accuracy under a cap."""
    return spread([accuracy(one, cap) for one in seeds], "{:.1%}")


def draw(args: argparse.Namespace, arms: Mapping[str, Sequence[Answers]]) -> None:
    """Draw the length of training's answers, and the use of a larger cap; a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moonlit"
    from matplotlib import pyplot as plt

    from moonlit.report.curves import read_curves

    figure, (length, use) = plt.subplots(1, 2, figsize=(9, 3.4))
    for place, (arm, seeds) in enumerate(arms.items()):
        colour = f"C{place}"
        caps = range(2, max(args.caps) + 1, 2)
        curves = [[accuracy(one["long_chains"], cap) for cap in caps] for one in seeds]
        draw_mean(use, caps, curves, colour, ARMS[arm])
        if arm != "warm_up":
            runs = [read_curves(args.out / f"{arm}-{seed}") for seed in args.seeds]
            curves = [run["rl/tokens_per_answer"] for run in runs]
            steps = [step for step, _ in curves[0]]
            lengths = [[value for _, value in one] for one in curves]
            draw_mean(length, steps, lengths, colour, ARMS[arm])
    length.set(title=SETS["chains"], xlabel="iteration", ylabel="tokens an answer, sampled")
    use.set(title=SETS["long_chains"], xlabel="cap on an answer [tokens]", ylabel="accuracy")
    use.axvline(TRAINED_CAP, color="0.6", linewidth=0.8, linestyle=":")
    for axis in (length, use):
        axis.grid(alpha=0.3)
    use.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.plot, metadata={"Date": None})


def draw_mean(
    axis: Any, x: Sequence[int], curves: Sequence[Sequence[float]], colour: str, label: str
) -> None:
    """Draw each seed's curve thin, and their mean."""
    for curve in curves:
        axis.plot(x, curve, color=colour, alpha=0.35, linewidth=0.7)
    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
    axis.plot(x, means, color=colour, label=label)


if __name__ == "__main__":
    main()
