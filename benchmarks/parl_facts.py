"""Does PARL learn? A swarm, the same model as a single agent, and ablations, several seeds.

All runs begin from one warm-up (SFT on serial and parallel traces) and have the same iterations; a
seed has tasks and samples of its own. ``single`` and the loose arms may take as many critical steps
as a single agent needs. Every run is what a ``moonlit`` command does, one after another in this
process. A result that is there already is not made again; ``moonlit report experiment=parl_facts``
compares what there is.

    OMP_NUM_THREADS=1 python benchmarks/parl_facts.py --runs swarm-0 single-0

Source of the question: technical report (arXiv:2602.02276), Sec. 3, Figures 4 and 8.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from hydra import compose, initialize_config_dir

from moonlit import cli

QUESTION = "Does PARL learn? Trains the arms of experiment=parl_facts."
REWARD, ENVIRONMENT = "phase.environment.reward", "phase.environment"
NO_SWARM = f"~{ENVIRONMENT}.workers.worker"
OUTCOME_ALONE = [f"{REWARD}.parallel_weight=0", f"{REWARD}.finish_weight=0"]
ALL_IT_NEEDS = f"{ENVIRONMENT}.limits.max_critical_steps=17"
"""A single agent needs 15 steps for seven rows."""
ARMS: dict[str, list[str]] = {
    "swarm": [],
    "single": [NO_SWARM, ALL_IT_NEEDS],
    "single_tight": [NO_SWARM],
    "no_both": OUTCOME_ALONE,
    "no_parallel": OUTCOME_ALONE[:1],
    "no_finish": OUTCOME_ALONE[1:],
    "swarm_loose": [ALL_IT_NEEDS],
    "no_both_loose": [*OUTCOME_ALONE, ALL_IT_NEEDS],
}
LAST = "checkpoints/last.ckpt"
NUM_BASE_RANKS = 496
"""Of ``source=table_traces``."""
WARM_UP: dict[int, tuple[int, list[str]]] = {
    1: (500, []),
    2: (300, ["source.parallel_fraction=0.4", "source.single_fraction=0.15", "seed=1"]),
}
"""Optimizer steps of each stage, and its traces: the second learns how many tasks to assign."""
EXPERIMENTS = {"faults": "parl_faults"}
"""Arms that are experiments of their own."""


def main() -> None:
    """Run what is missing, the warm-up first, then seed by seed."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--out", type=Path, default=Path("runs/parl_facts"))
    every = [f"{arm}-{seed}" for seed in range(3) for arm in (*ARMS, *EXPERIMENTS)]
    parser.add_argument("--runs", nargs="*", default=every, help="ARM-SEED, in this order")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_folder())):
        warm_up(args.out)
        for name in args.runs:
            arm, _, seed = name.rpartition("-")
            train(args.out, arm, int(seed))


def warm_up(out: Path) -> None:
    """Make the traces, and train on them stage by stage."""
    begin: list[str] = []
    for stage, (steps, mixture) in WARM_UP.items():
        folder = out / f"traces_{stage}"
        call(
            ["prepare", "source=table_traces", f"source.folder={folder}", *mixture],
            makes=folder / "held_out.jsonl",
        )
        run = out / f"warmup_{stage}"
        call(
            ["train", "experiment=parl_facts_warmup", f"run_dir={run}", *vocabulary(out), *begin,
             f"data.folder={folder}", f"data.data_dir={out / f'data_{stage}'}",
             f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"],
            makes=run / "held_out.json",
        )  # fmt: skip
        begin = [f"init_from={run / LAST}"]


def train(out: Path, arm: str, seed: int) -> None:
    """Train one arm with one seed."""
    run = out / f"{arm}-{seed}"
    experiment = EXPERIMENTS.get(arm, "parl_facts")
    call(
        ["train", f"experiment={experiment}", f"init_from={warmed_up(out)}", f"seed={seed}",
         f"run_dir={run}", *vocabulary(out), *ARMS.get(arm, [])],
        makes=run / "held_out.json",
    )  # fmt: skip


def vocabulary(out: Path) -> list[str]:
    """Name the tokenizer that was learnt from the first stage's traces, and its size."""
    return [
        f"tokenizer={out / 'traces_1' / 'tokenizer'}",
        f"model.decoder.vocab_size={NUM_BASE_RANKS + 256}",
        f"model.decoder.media_pad_id={NUM_BASE_RANKS + 21}",
    ]


def warmed_up(out: Path) -> Path:
    """Return the warm-up's last checkpoint."""
    return out / f"warmup_{list(WARM_UP)[-1]}" / LAST


def call(words: Sequence[str], *, makes: Path) -> None:
    """Do what a command does, unless what it makes is there."""
    if makes.exists():
        return
    print("moonlit", *words, flush=True)
    began_s = monotonic()
    name, *overrides = words
    cfg = compose(name, overrides=overrides)
    getattr(cli, name)(cfg)
    print(f"took {monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
