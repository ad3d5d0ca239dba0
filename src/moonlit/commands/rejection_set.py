"""``moonlit rejection_sampling``: a checkpoint's right answers to training tasks, as an SFT set."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from moonlit.batch import Task
from moonlit.rl.loading import conversation_of, sandboxes
from moonlit.rl.rejection_sampling import Counts, RejectionSampling
from moonlit.rl.rewards.rules import RuleJudge


@runtime_checkable
class TrainingTasks(Protocol):
    """A data module with tasks to learn from."""

    def tasks(self, name: str, num: int, *, held_out: bool, first: int) -> list[Task]:
        """Return tasks of one set, numbered from ``first``."""
        ...


def make_set(data: TrainingTasks, judge: RuleJudge, settings: Mapping[str, Any]) -> None:
    """Run the command: write the set and its report, print the counts."""
    first, out = settings["first_task"], Path(settings["out"])
    sets = {
        name: data.tasks(name, settings["num_tasks"], held_out=False, first=first)
        for name in settings["sets"]
    }
    conversation = conversation_of(settings)

    async def run() -> Counts:
        async with sandboxes(settings["tools"]) as pool, aclosing(judge):
            sampling = RejectionSampling(
                conversation=conversation,
                pool=pool,
                judge=judge,
                num_samples=settings["num_samples"],
                num_kept=settings["num_kept"],
                min_pass_rate=settings["min_pass_rate"],
                max_pass_rate=settings["max_pass_rate"],
                seed=settings["seed"],
                provenance={
                    "ckpt": settings["ckpt"],
                    "first_task": first,
                    "thinking": conversation.thinking,
                    "temperature": conversation.sampling.temperature,
                    "top_p": conversation.sampling.top_p,
                },
            )
            return await sampling.write(sets, out)

    counts = asyncio.run(run())
    report = {"settings": dict(settings), "sets": counts.rows}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(markup=False).print(counts.table())
    print(f"wrote {out}")
