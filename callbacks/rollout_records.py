"""Watches rollouts: writes each one as JSON lines and as a trace, for ``moonlit report``."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from moonlit.batch import Group
from moonlit.rl.records import (
    PICTURES,
    ROLLOUTS,
    PictureStore,
    chrome_trace,
    group_records,
    write_escaped,
)


class RolloutRecords(Callback):
    """Writes ``rollouts/step_N.jsonl`` and ``rollouts/step_N.trace.json`` after an iteration.

    The phase keeps what it collected in ``last_groups``; a phase without is left alone.

    Args:
        run_dir: the run's folder.
        every_n_iterations: the first, and every so many after it; the last one, too.
        max_groups: of an iteration, the first so many (pictures and long dialogues add up).
    """

    def __init__(self, *, run_dir: str, every_n_iterations: int, max_groups: int) -> None:
        self.run = Path(run_dir)
        self.every_n_iterations, self.max_groups = every_n_iterations, max_groups
        self.store_picture = PictureStore(self.run / PICTURES)
        self.num_iterations = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the iteration's rollouts; each rank its own."""
        groups: list[Group] = getattr(pl_module, "last_groups", [])
        if not groups:
            return
        is_last = 0 < trainer.max_steps <= trainer.global_step
        due = is_last or self.num_iterations % self.every_n_iterations == 0
        self.num_iterations += 1
        if due:
            self.write(groups[: self.max_groups], trainer.global_step, trainer.global_rank)

    def write(self, groups: list[Group], step: int, rank: int) -> None:
        """Write the groups of one step."""
        records = [
            record
            for number, group in enumerate(groups)
            for record in group_records(
                group, step=step, number=f"{rank}-{number}", store_picture=self.store_picture
            )
        ]
        folder = self.run / ROLLOUTS
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:06d}" + (f"_rank_{rank}" if rank else "")
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_escaped(folder / f"{name}.jsonl", "".join(lines))
        trace = json.dumps(chrome_trace(records), ensure_ascii=False)
        write_escaped(folder / f"{name}.trace.json", trace)

    def state_dict(self) -> dict[str, Any]:
        """Return how many iterations were seen."""
        return {"num_iterations": self.num_iterations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_iterations = state_dict["num_iterations"]
