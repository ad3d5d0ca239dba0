"""What an evaluation writes down: every answer, one line; and one before training begins."""

import json
from pathlib import Path

from lightning import Callback
from policy_run import Numbered, make_phase, run
from torch.utils.data import DataLoader

from callbacks.held_out_answers import HeldOutAnswers
from moonlit.rl.engines.base import Sampling


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


class TwoSets(Numbered):
    """The second of two ranks answers tasks 1, 3 and 5 of either set."""

    held_out_names = ("even", "again")

    def val_dataloader(self) -> list[DataLoader]:
        mine = [self.task(number) for number in (1, 3, 5)]
        return [DataLoader([mine], batch_size=None) for _ in self.held_out_names]


class WhoAnswers(Callback):
    """Keeps how the policy is sampled that answers held-out tasks."""

    def __init__(self) -> None:
        self.sampling: list[Sampling] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        manager = pl_module.require_manager()
        evaluate = type(manager).evaluate

        def watched(tasks, policy):
            self.sampling.append(policy.sampling)
            return evaluate(manager, tasks, policy)

        manager.evaluate = watched


def test_a_task_has_its_number_in_its_set_and_a_greedy_answer(tmp_path: Path):
    phase, who = make_phase(), WhoAnswers()
    phase.data_parallel_place = lambda: (1, 2)
    run(
        phase, max_steps=1, callbacks=[HeldOutAnswers(run_dir=str(tmp_path)), who], data=TwoSets(),
        trainer={"num_sanity_val_steps": -1, "limit_val_batches": 1},
    )  # fmt: skip

    lines = (tmp_path / "held_out_answers.jsonl").read_text().splitlines()
    first = [json.loads(line) for line in lines][:6]
    assert [(one["set"], one["task"]) for one in first] == [
        (name, number) for name in ("even", "again") for number in (1, 3, 5)
    ]
    assert {(one.temperature, one.top_p) for one in who.sampling} == {(0.0, 1.0)}


def test_without_an_evaluation_nothing_is_written(tmp_path: Path):
    run(make_phase(), max_steps=1, callbacks=[HeldOutAnswers(run_dir=str(tmp_path / "run"))])
    assert not (tmp_path / "run").exists()
