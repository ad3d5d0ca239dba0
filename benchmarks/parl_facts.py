"""Does PARL learn? A swarm, the same model as a single agent, and ablations, several seeds.

All runs begin from a warm-up (SFT on serial and parallel traces) and have the same iterations; a
seed has tasks and samples of its own. Every run is what a ``moonlit`` command does, one after
another in this process. A result that is there already is not made again; ``moonlit report
experiment=parl_facts`` compares what there is.

    OMP_NUM_THREADS=1 python benchmarks/parl_facts.py --runs swarm-0 single-0

Source of the question: technical report (arXiv:2602.02276), Sec. 3, Figures 4 and 8.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from hydra import compose, initialize_config_dir

from moonlit import cli
from moonlit.report.parl_facts import FAULTS

QUESTION = "Does PARL learn? Trains the arms of experiment=parl_facts."
LAST = "checkpoints/last.ckpt"
RESULT = "held_out.json"
"""Of a run that is done."""
NUM_BASE_RANKS = 496
"""Of ``source=table_traces``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A checkpoint that runs begin from, or that plays sub-agents: SFT on traces.

    Args:
        steps: of the optimizer.
        source: of its traces.
        begin: stage that it begins from; None: random weights.
        traces: what they are made of.
        model: settings of its own.
    """

    steps: int
    source: str = "table_traces"
    begin: str | None = None
    traces: Sequence[str] = ()
    model: Sequence[str] = ()


SMALL = ("model.decoder.model_width=32", "model.decoder.dense_width=64")
STAGES = {
    "warmup_1": Stage(steps=500),
    # learns how many tasks to assign
    "warmup_2": Stage(
        steps=300, begin="warmup_1",
        traces=["source.parallel_fraction=0.3", "source.single_fraction=0.15", "seed=1"],
    ),
    # have seen tasks that are lost; many traces give them to the other agent
    "warmup_dead_1": Stage(
        steps=400, begin="warmup_2",
        traces=["source.parallel_fraction=0.6", "source.single_fraction=0.05", "seed=2",
                "source.script.dead_share=0.67", "source.reassign_fraction=0.4"],
    ),
    "warmup_dead_2": Stage(
        steps=400, begin="warmup_dead_1",
        traces=["source.parallel_fraction=0.9", "source.single_fraction=0.05", "seed=3",
                "source.script.dead_share=0.67", "source.reassign_fraction=0.45"],
    ),
    "warmup_dead_3": Stage(
        steps=500, begin="warmup_dead_2",
        traces=["source.parallel_fraction=0.9", "source.single_fraction=0.05", "seed=5",
                "source.script.dead_share=0.67", "source.reassign_fraction=0.5"],
    ),
    # give rows to agents at random
    "warmup_unlike": Stage(
        steps=300, begin="warmup_2",
        traces=["source.parallel_fraction=0.9", "source.single_fraction=0.05", "seed=4",
                "source.script.deals_at_random=true"],
    ),
    "rows_small": Stage(steps=120, source="row_traces", model=SMALL),
    "rows_small_longer": Stage(steps=400, source="row_traces", model=SMALL),
    "rows_large": Stage(steps=200, source="row_traces", begin="warmup_1"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to train the orchestrator.

    Args:
        overrides: of the experiment.
        experiment: in ``conf/``.
        begin: stage whose weights it begins from.
        ckpts: stages whose checkpoints a setting names.
    """

    overrides: Sequence[str] = ()
    experiment: str = "parl_facts"
    begin: str = "warmup_2"
    ckpts: dict[str, str] = field(default_factory=dict)


WORKER, REWARD = "phase.environment.workers.worker", "phase.environment.reward"
FAULT_RATES = "phase.environment.faults"
NO_SWARM = f"~{WORKER}"
NO_PARALLEL, NO_FINISH = f"{REWARD}.parallel_weight=0", f"{REWARD}.finish_weight=0"
REWARDS = {
    "swarm": [],
    "no_parallel": [NO_PARALLEL],
    "no_finish": [NO_FINISH],
    "no_both": [NO_PARALLEL, NO_FINISH],
}
LOOSE = ["phase.environment.limits.max_critical_steps=17"]
"""A single agent needs 15 steps for seven rows."""
ARMS = {
    **{arm: Arm(overrides=rewards) for arm, rewards in REWARDS.items()},
    "single": Arm(overrides=[NO_SWARM, *LOOSE]),
    "single_tight": Arm(overrides=[NO_SWARM]),
    **{f"{arm}_loose": Arm(overrides=[*rewards, *LOOSE]) for arm, rewards in REWARDS.items()},
    "faults": Arm(experiment="parl_faults"),
    **{
        f"faults_{fault}": Arm(
            experiment="parl_faults",
            overrides=[f"{FAULT_RATES}.{other}=0" for other in FAULTS if other != fault],
        )
        for fault in FAULTS
    },
    "dead_agents": Arm(experiment="parl_dead_agents", begin="warmup_dead_3"),
    "dead_agents_tight": Arm(
        experiment="parl_dead_agents", begin="warmup_dead_2",
        overrides=["phase.environment.limits.max_critical_steps=9", "trainer.max_steps=10"],
    ),
    "unlike_agents": Arm(experiment="parl_unlike_agents", begin="warmup_unlike"),
    "policy_agents": Arm(
        overrides=[f"subagent@{WORKER}=row_policy"],
        ckpts={f"{WORKER}.policy.ckpt": "rows_large"},
    ),
    **{
        f"policy_agents_{small}_then_large": Arm(
            overrides=[f"subagent@{WORKER}=row_policy_small_then_large"],
            ckpts={
                f"{WORKER}.stages.small.worker.policy.ckpt": f"rows_{small}",
                f"{WORKER}.stages.large.worker.policy.ckpt": "rows_large",
            },
        )
        for small in ("small", "small_longer")
    },
}  # fmt: skip


def main() -> None:
    """Run what is missing, seed by seed, whatever it begins from first."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--out", type=Path, default=Path("runs/parl_facts"))
    every = [f"{arm}-{seed}" for seed in range(3) for arm in ARMS]
    parser.add_argument(
        "--runs", nargs="*", type=run_name, default=every, help="ARM-SEED or a stage, in order"
    )
    args = parser.parse_args()
    if all((args.out / name / RESULT).exists() for name in args.runs):
        print(f"nothing to do: {args.out} has the results of {', '.join(args.runs) or 'no run'}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_folder())):
        for name in args.runs:
            if name in STAGES:
                prepared(args.out, name)
            else:
                arm, _, seed = name.rpartition("-")
                train(args.out, arm, int(seed))


def run_name(word: str) -> str:
    """Read ``ARM-SEED`` or a stage's name."""
    arm, _, seed = word.rpartition("-")
    if word in STAGES or (arm in ARMS and seed.isdecimal()):
        return word
    raise argparse.ArgumentTypeError(
        f"{word!r}: want ARM-SEED or a stage; arms: {', '.join(ARMS)}; stages: {', '.join(STAGES)}"
    )


def prepared(out: Path, name: str) -> Path:
    """Return a stage's last checkpoint, made if it is not there."""
    stage = STAGES[name]
    begin = [] if stage.begin is None else [f"init_from={prepared(out, stage.begin)}"]
    call(
        ["train", "experiment=parl_facts_warmup", f"run_dir={out / name}", *vocabulary(out), *begin,
         *stage.model, f"data.folder={traces(out, name)}", f"data.data_dir={out / f'data_{name}'}",
         f"trainer.max_steps={stage.steps}", f"trainer.val_check_interval={stage.steps}"],
        makes=out / name / RESULT,
    )  # fmt: skip
    return out / name / LAST


def train(out: Path, name: str, seed: int) -> None:
    """Train one arm with one seed."""
    run, arm = out / f"{name}-{seed}", ARMS[name]
    begin = prepared(out, arm.begin)
    ckpts = [f"{key}={prepared(out, stage)}" for key, stage in arm.ckpts.items()]
    call(
        ["train", f"experiment={arm.experiment}", f"init_from={begin}", f"seed={seed}",
         f"run_dir={run}", *vocabulary(out), *arm.overrides, *ckpts],
        makes=run / RESULT,
    )  # fmt: skip


def traces(out: Path, name: str) -> Path:
    """Return the folder of a stage's traces, made if they are not there."""
    stage, folder = STAGES[name], out / f"traces_{name}"
    call(
        ["prepare", f"source={stage.source}", f"source.folder={folder}", *stage.traces],
        makes=folder / "held_out.jsonl",
    )
    return folder


def vocabulary(out: Path) -> list[str]:
    """Name the tokenizer that is learnt from the first stage's traces, and its size."""
    return [
        f"tokenizer={traces(out, 'warmup_1') / 'tokenizer'}",
        f"model.decoder.vocab_size={NUM_BASE_RANKS + 256}",
        f"model.decoder.media_pad_id={NUM_BASE_RANKS + 21}",
    ]


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
