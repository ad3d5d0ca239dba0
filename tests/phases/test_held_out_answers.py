"""What an evaluation writes down: every answer, one line; and one before training begins."""

import json
from pathlib import Path

from policy_run import Numbered, make_phase, run
from torch.utils.data import DataLoader

from callbacks.held_out_answers import HeldOutAnswers


class HeldOutToo(Numbered):
    """Three tasks are held out."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader([[self.task(number) for number in range(3)]], batch_size=None)


def test_every_evaluation_writes_a_line_for_each_answer(tmp_path: Path):
    watch = HeldOutAnswers(run_dir=str(tmp_path))
    phase = make_phase()
    run(
        phase, max_steps=2, callbacks=[watch], data=HeldOutToo(),
        trainer={"num_sanity_val_steps": -1, "val_check_interval": 2},
    )  # fmt: skip

    lines = (tmp_path / "held_out_answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [(one["step"], one["task"]) for one in answers] == [
        (step, task) for step in (0, 2) for task in range(3)
    ]
    assert {one["set"] for one in answers} == {"even"}
    last = answers[3:]
    mean = sum(one["reward"] for one in last) / 3
    assert phase.held_out.scores["even"].reward_sum / 3 == mean
    assert all(0 <= one["rewards"]["even"] <= 1 for one in answers)


def test_without_an_evaluation_nothing_is_written(tmp_path: Path):
    run(make_phase(), max_steps=1, callbacks=[HeldOutAnswers(run_dir=str(tmp_path / "run"))])
    assert not (tmp_path / "run").exists()
