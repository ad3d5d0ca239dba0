"""A chain of jobs: who waits for whom, whose words are whose, what is not submitted again."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from moonlit.jobs.job import Job
from moonlit.jobs.pipeline import Queued, Stage, submit_chain, words_of
from moonlit.runs.folder import FINISHED
from tests.slurm.test_scripts import ROOT, SITE

STAGES = [
    Stage(name="data", words=["source=zero_vision"], template="prepare"),
    Stage(name="pretraining", words=["phase=joint_pretraining"]),
    Stage(name="sft", words=["phase=zero_vision_sft"], source="pretraining", after=["data"]),
    Stage(name="rl", words=["phase=visual_rl"], source="sft", template="rl_disaggregated"),
]
NAMES = [stage.name for stage in STAGES]


class Known(Job):
    """A job of which SLURM is not asked."""

    in_queue: ClassVar[dict[str, str]] = {}

    def queued(self) -> str | None:
        return self.in_queue.get(self.name)


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[[Stage], Job]:
    def make(stage: Stage) -> Job:
        return Known(
            name=stage.name, template=ROOT / f"slurm/{stage.template}.sbatch", words=stage.words,
            folder=tmp_path / stage.name, site=SITE, configuration="",
        )  # fmt: skip

    return make


def submitted(job_of: Callable[[Stage], Job]) -> tuple[list[Queued], dict[str, list[str]]]:
    waits: dict[str, list[str]] = {}

    def submit(job: Job, after: list[str]) -> str:
        waits[job.name] = after
        return f"{100 + len(waits)}"

    return submit_chain(STAGES, job_of, submit=submit), waits


def test_each_job_waits_for_the_checkpoint_and_the_data_it_needs(job_of):
    queued, waits = submitted(job_of)
    assert [(one.stage, one.state, one.job) for one in queued] == [
        ("data", "submitted", "101"), ("pretraining", "submitted", "102"),
        ("sft", "submitted", "103"), ("rl", "submitted", "104"),
    ]  # fmt: skip
    assert waits == {"data": [], "pretraining": [], "sft": ["102", "101"], "rl": ["103"]}


def test_what_has_finished_or_is_queued_is_not_submitted_again(job_of, tmp_path, monkeypatch):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / FINISHED).write_text("{}")
    monkeypatch.setattr(Known, "in_queue", {"data": "7"})
    queued, waits = submitted(job_of)
    assert [one.state for one in queued] == ["queued", "finished", "submitted", "submitted"]
    assert waits == {"sft": ["7"], "rl": ["101"]}


def test_words_go_to_every_phase_or_to_the_one_that_is_named():
    said = ["model=tiny", "sft:trainer.max_steps=3", "data:source.part=1/2", "a={b:1}"]
    words = {stage.name: words_of(stage, said, NAMES) for stage in STAGES}
    assert words["data"] == ["source=zero_vision", "source.part=1/2"]
    assert words["sft"] == ["phase=zero_vision_sft", "model=tiny", "trainer.max_steps=3", "a={b:1}"]
    assert words["rl"] == ["phase=visual_rl", "model=tiny", "a={b:1}"]
    with pytest.raises(ValueError, match="stfu:x=1: no stage 'stfu'; there are data, pretraining"):
        words_of(STAGES[0], ["stfu:x=1"], NAMES)


def test_the_command_names_the_jobs_it_waits_for(job_of, tmp_path):
    command = job_of(STAGES[2]).command(["5", "6"])
    assert command[:4] == [
        "sbatch", "--parsable", "--dependency=afterok:5:6", "--kill-on-invalid-dep=yes",
    ]  # fmt: skip
    assert command[4:] == [str(tmp_path / "sft/slurm/train.sbatch"), "phase=zero_vision_sft"]
    assert "--dependency" not in " ".join(job_of(STAGES[2]).command())
