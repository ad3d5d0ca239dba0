"""A process that is killed in the middle of its rollouts, and the one that goes on."""

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

FOLDER = str(Path(__file__).parent)


def train(folder: Path, die_after: int | None, max_steps: int) -> None:
    """Note what every iteration delivers and save after it; die once so many answers were judged.

    More groups are in flight than an iteration asks for, so some have begun, and some are finished
    and wait, whenever a checkpoint is written.
    """
    sys.path += [FOLDER, str(Path(FOLDER).parent)]
    from lightning import Callback
    from policy_run import make_phase, run

    class NoteAndSave(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            tasks = [group.task.answer for group in pl_module.last_groups]
            with (folder / "delivered.jsonl").open("a") as notes:
                notes.write(json.dumps(tasks) + "\n")
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    phase = make_phase(groups_ahead=5, max_staleness=2)
    judge: Any = phase.environment.judge  # pyright: ignore[reportAttributeAccessIssue]
    measure = judge.judge

    async def deadly(task: Any, trajectory: Any) -> dict[str, float]:
        rewards = await measure(task, trajectory)
        if die_after is not None and sum(judge.seen.values()) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return rewards

    judge.judge = deadly
    saved = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem))
    run(phase, max_steps=max_steps, callbacks=[NoteAndSave()],
        ckpt_path=saved[-1] if saved else None)  # fmt: skip


def test_prompts_are_neither_skipped_nor_repeated(tmp_path: Path):
    """Catches: numbers that go on behind the groups in flight, and groups delivered once more.

    8 groups of 4 an iteration, 5 ahead: at 110 answers two iterations were delivered and a third is
    on its way.
    """
    spawn = multiprocessing.get_context("spawn")
    for deadly, max_steps in ((110, 99), (None, 6)):
        process = spawn.Process(target=train, args=(tmp_path, deadly, max_steps))
        process.start()
        process.join(120)
        assert process.exitcode == (0 if deadly is None else -signal.SIGKILL)

    notes = (tmp_path / "delivered.jsonl").read_text().splitlines()
    iterations = [json.loads(line) for line in notes]
    delivered = Counter(number for tasks in iterations for number in tasks)
    (state,) = torch.load(tmp_path / "6.ckpt", weights_only=False)["rollouts"]

    assert len(iterations) == 6
    assert set(delivered.values()) == {1}
    assert sorted([*delivered, *state["unfinished"]]) == list(range(state["next_number"]))
