"""Jobs of a real SLURM that are stopped in the middle end as if they had not been.

Each scenario's losses, step by step, and its last checkpoint's weights are those of a job that ran
through.
"""

import json
import time
from pathlib import Path

import pytest
import torch

from moonlit.distributed.checkpoint import weights_of
from moonlit.report.curves import Curve, read_curves
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Submitter

pytestmark = pytest.mark.slurm
STEPS = 12
ONE_TASK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
LENGTH = f"trainer.max_steps={STEPS}"
FOUR_RANKS = [LENGTH, "strategy.ep_size=2", "callbacks.checkpoint.every_n_steps=3"]
PATIENCE_S = 900.0


def losses(run: Path) -> Curve:
    return read_curves(run)["train/nll_per_token"]


def step_of(run: Path) -> int:
    beats = run / "heartbeats" / "rank_00000.json"
    return json.loads(beats.read_text())["step"] if beats.exists() else 0


def await_step(run: Path, step: int) -> None:
    wait_for(lambda: step_of(run) >= step, PATIENCE_S, f"step {step} of {run}")


def assert_same_run(run: Path, reference: Path) -> None:
    assert [step for step, _ in losses(run)] == [step for step, _ in losses(reference)]
    assert losses(run) == losses(reference)
    ours, theirs = (weights_of(path / "checkpoints" / "last.ckpt") for path in (run, reference))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """One task, not disturbed."""
    jobs = Submitter(cluster, tmp_path_factory.mktemp("reference"), data_dir)
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    state = cluster.await_state(job, "COMPLETED", "FAILED", within_s=PATIENCE_S)
    assert state == "COMPLETED", jobs.log(job)
    return jobs.folder / "run"


def finish(cluster: Cluster, jobs: Submitter, job: str) -> str:
    state = cluster.await_state(job, "COMPLETED", "FAILED", "CANCELLED", within_s=PATIENCE_S)
    assert state == "COMPLETED", jobs.log(job)
    return jobs.log(job)


def test_a_signal_saves_queues_again_and_goes_on(
    cluster: Cluster, jobs: Submitter, reference: Path
):
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    await_step(jobs.folder / "run", 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    log = finish(cluster, jobs, job)

    assert f"queueing job {job} again (restart 1)" in log
    assert "going on from" in log
    assert cluster.job(job)["Restarts"] == "1"
    assert_same_run(jobs.folder / "run", reference)


@pytest.mark.slow
def test_an_urgent_job_preempts_and_the_run_goes_on_behind_it(
    cluster: Cluster, jobs: Submitter, reference: Path
):
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    await_step(jobs.folder / "run", 2)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
        f"--output={jobs.folder}/urgent.out", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    cluster.await_state(urgent, "COMPLETED", within_s=PATIENCE_S)
    finish(cluster, jobs, job)

    assert cluster.job(job)["Restarts"] == "1"
    assert_same_run(jobs.folder / "run", reference)


@pytest.mark.slow
def test_scontrol_requeue_loses_no_step(cluster: Cluster, jobs: Submitter, reference: Path):
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    await_step(jobs.folder / "run", 2)
    cluster.run("scontrol", "requeue", job)
    log = finish(cluster, jobs, job)

    assert "SIGTERM: finishing this step, then saving and stopping" in log
    assert cluster.job(job)["Restarts"] == "1"
    assert_same_run(jobs.folder / "run", reference)


@pytest.mark.slow
def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster: Cluster, jobs: Submitter):
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    run = jobs.folder / "run"
    await_step(run, 2)
    cluster.run("scancel", job)
    wait_for(lambda: "COMPLETING" not in cluster.state(job), 60, "the end of the job")
    wait_for(lambda: not (run / ".lock").exists(), 60, "the lock to go")

    assert cluster.state(job) == "CANCELLED"
    (saved,) = (run / "checkpoints").glob("step_*.ckpt")
    assert 2 <= int(saved.stem.removeprefix("step_")) < STEPS


@pytest.mark.slow
def test_the_time_limit_is_no_end(cluster: Cluster, jobs: Submitter):
    """SLURM warns by its own clock, which ticks twice a minute: 30 to 60 s before the limit."""
    length = "trainer.max_steps=120"
    whole = jobs.train("whole", length, options=ONE_TASK)
    finish(cluster, jobs, whole)
    job = jobs.train("run", length, options=[*ONE_TASK, "--time=2", "--signal=B:USR1@30"])
    finish(cluster, jobs, job)
    assert int(cluster.job(job)["Restarts"]) > 0
    assert_same_run(jobs.folder / "run", jobs.folder / "whole")


@pytest.mark.slow
def test_a_warning_that_comes_before_the_run_listens_queues_it_again(
    cluster: Cluster, jobs: Submitter, reference: Path
):
    job = jobs.train("run", LENGTH, options=ONE_TASK)
    wait_for(lambda: any(cluster.steps(job)), PATIENCE_S, "the step")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    log = finish(cluster, jobs, job)

    assert "User defined signal 1" in log
    assert cluster.job(job)["Restarts"] == "1"
    assert_same_run(jobs.folder / "run", reference)


@pytest.fixture(scope="module")
def two_nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """Two nodes of two ranks, experts dealt out, not disturbed."""
    jobs = Submitter(cluster, tmp_path_factory.mktemp("two_nodes"), data_dir)
    log = finish(cluster, jobs, jobs.train("run", *FOUR_RANKS, options=TWO_NODES))
    assert "MEMBER: 4/4" in log
    assert log.count(f"step {STEPS}/{STEPS}") == 1  # one rank speaks
    return jobs.folder / "run"


def test_two_nodes_of_two_ranks_train_as_one_task_does(two_nodes: Path, reference: Path):
    ours, theirs = losses(two_nodes), losses(reference)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [value for _, value in ours] == pytest.approx([v for _, v in theirs], rel=1e-4)


@pytest.mark.slow
def test_a_lost_node_costs_no_step(cluster: Cluster, jobs: Submitter, two_nodes: Path):
    job = jobs.train("run", *FOUR_RANKS, options=TWO_NODES)
    await_step(jobs.folder / "run", 5)
    wait_for(
        lambda: (jobs.folder / "run/checkpoints/step_000003.ckpt").exists(), 60, "a checkpoint"
    )
    cluster.kill_node("node2")
    lost = time.monotonic()
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", PATIENCE_S, "the requeue")
    print(f"queued again {time.monotonic() - lost:.0f} s after the node was lost")
    cluster.start_node("node2")
    # A cluster holds a job that it queues again for the life of its credentials, 120 s by default,
    # this one for 5 s: the end of the old step, which the lost node has missed, would meet the new.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+90")
    finish(cluster, jobs, job)
    assert_same_run(jobs.folder / "run", two_nodes)


@pytest.mark.slow
def test_two_jobs_never_write_one_folder(cluster: Cluster, jobs: Submitter):
    first = jobs.train("run", "trainer.max_steps=500", options=ONE_TASK)
    await_step(jobs.folder / "run", 1)
    second = jobs.train("run", "trainer.max_steps=500", options=ONE_TASK)
    cluster.await_state(second, "FAILED", within_s=PATIENCE_S)
    cluster.run("scancel", first)

    assert f"is written by SLURM job {first}, process" in jobs.log(second)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_said_aloud(
    cluster: Cluster, jobs: Submitter, reference: Path
):
    words = [LENGTH, "callbacks.checkpoint.every_n_steps=2"]
    job = jobs.train("run", *words, options=ONE_TASK)
    await_step(jobs.folder / "run", 5)
    cluster.run("scancel", job)
    wait_for(lambda: not (jobs.folder / "run/.lock").exists(), 60, "the lock to go")
    newest = max((jobs.folder / "run/checkpoints").glob("step_*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-1000])

    log = finish(cluster, jobs, again := jobs.train("run", *words, options=ONE_TASK))
    assert again != job
    assert f"{newest.name} is damaged" in log
    assert_same_run(jobs.folder / "run", reference)
