"""Watches evaluations of an RL phase: what every held-out answer was worth, a line each."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from moonlit.rl.records import HELD_OUT_ANSWERS


class HeldOutAnswers(Callback):
    """Appends the answers of every evaluation to ``held_out_answers.jsonl``.

    A line has the step, the set, the task's number in it and tags, and the answer's reward, parts
    and metrics. Each rank writes a file of its own. A resumed run writes the evaluations it makes
    again once more: of one step and task the last line counts.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, *, run_dir: str) -> None:
        self.run = Path(run_dir)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this rank's answers."""
        answers: list[Any] = getattr(pl_module, "last_answers", [])
        if not answers:
            return
        rank = trainer.global_rank
        self.run.mkdir(parents=True, exist_ok=True)
        name = HELD_OUT_ANSWERS.format(rank=f"_rank_{rank}" if rank else "")
        with (self.run / name).open("a", encoding="utf-8") as file:
            for one in answers:
                record = {
                    "step": trainer.global_step,
                    "set": one.name,
                    "task": one.number,
                    "tags": one.task.tags,
                    "reward": one.trajectory.reward,
                    "rewards": one.trajectory.rewards,
                    "stop_reason": one.trajectory.stop_reason,
                    "error": one.trajectory.error,
                    "num_tokens": one.trajectory.num_tokens,
                    "metrics": one.trajectory.metrics,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
