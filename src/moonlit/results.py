"""What a run says when it ends: the held-out table, and where to go from here."""

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from moonlit.phases.held_out import HeldOut
from moonlit.phases.held_out_rewards import HeldOutRewards

BLIND = "_blind"


def held_out_table(held_out: HeldOut | HeldOutRewards, chance: Mapping[str, float]) -> Table:
    """Lay out what a phase has scored; chance by set, where it is known."""
    if isinstance(held_out, HeldOutRewards):
        return reward_table(held_out, chance)
    return likelihood_table(held_out, chance)


def reward_table(held_out: HeldOutRewards, chance: Mapping[str, float]) -> Table:
    """Lay out the rewards of answers made by generation."""
    table = Table(title="held out, by generation", title_justify="left")
    table.add_column("set")
    told = [name.replace("_", " ") for name in held_out.watched]
    for column in ("answers", "reward", "by chance", "solved", "tokens", *told, "errors"):
        table.add_column(column, justify="right")
    for name, score in held_out.scores.items():
        table.add_row(
            name,
            f"{score.num_answers}",
            f"{score.mean(score.reward_sum):.3f}",
            f"{chance[name]:.3f}" if name in chance else "",
            f"{score.mean(score.num_solved):.1%}",
            f"{score.mean(score.num_tokens):.1f}",
            *(f"{score.mean(value):.2f}" for value in score.sums),
            f"{score.num_errors}",
        )
    return table


def likelihood_table(held_out: HeldOut, chance: Mapping[str, float]) -> Table:
    """Lay a set and its blind baseline (another item's picture) side by side.

    Args:
        held_out: scores by set; ``NAME_blind`` is the baseline of ``NAME``.
        chance: accuracy of guessing, by set, where it is known.
    """
    table = Table(title="held out", title_justify="left")
    table.add_column("set")
    for column in ("answers", "nll / token", "blind", "accuracy", "blind", "chance"):
        table.add_column(column, justify="right")
    for name, score in held_out.scores.items():
        if name.endswith(BLIND):
            continue
        blind = held_out.scores.get(name + BLIND)
        table.add_row(
            name,
            f"{score.num_answers}",
            f"{score.nll_per_token:.3f}",
            "" if blind is None else f"{blind.nll_per_token:.3f}",
            f"{score.accuracy:.1%}" if name in chance else "",
            f"{blind.accuracy:.1%}" if blind is not None and name in chance else "",
            f"{chance[name]:.1%}" if name in chance else "",
        )
    return table


NEXT_PHASE = {
    "JointPretraining": "phase=zero_vision_sft",
    "ZeroVisionSFT": "phase=visual_rl",
    "VisualRL": "phase=joint_rl",
}


def next_commands(run_dir: Path, phase: str) -> str:
    """Name commands that work on what the run has left.

    Args:
        run_dir: the run's folder.
        phase: name of its class.
    """
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    lines = [
        f"tensorboard --logdir {run_dir}",
        f"moonlit report run={run_dir}",
        f"moonlit export ckpt={checkpoint} out={run_dir / 'released'}",
    ]
    if phase == "JointPretraining":
        lines.append("moonlit prepare source=zero_vision")
    if phase in NEXT_PHASE:
        lines.append(f"moonlit train {NEXT_PHASE[phase]} init_from={checkpoint}")
    return "\n".join(["next:", *(f"  {escape(line)}" for line in lines)])
