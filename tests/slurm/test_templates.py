"""Every template, really submitted; what is wrong is refused and says which line to change."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from moonlit.distributed.checkpoint import weights_of
from moonlit.report.curves import read_curves
from moonlit.runs.folder import RunFolder
from moonlit.submit import submit as moonlit_submit
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, SMALL, Submitter

pytestmark = pytest.mark.slurm
PATIENCE_S = 500.0
FEW_ROLLOUTS = [
    "phase.rollouts.groups_per_iteration=2", "phase.rollouts.group_size=2",
    "phase.rollouts.max_new_tokens=4", "data.num_held_out=2",
]  # fmt: skip
ONE_CPU = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]


def finished(cluster: Cluster, jobs: Submitter, job: str) -> str:
    state = cluster.await_state(job, "COMPLETED", "FAILED", "CANCELLED", within_s=PATIENCE_S)
    assert state == "COMPLETED", jobs.log(job)
    return jobs.log(job)


def test_a_template_that_nobody_has_edited_names_its_line(cluster: Cluster, jobs: Submitter):
    script = str(ROOT / "slurm/train.sbatch")
    by_sbatch = subprocess.run(
        ["sbatch", script, "model=tiny"], env=cluster.env, capture_output=True, text=True
    )
    assert "invalid partition specified: EDIT" in by_sbatch.stderr

    job = jobs.sbatch("train", options=[*ONE_CPU, "--account=EDIT"])
    cluster.await_state(job, "FAILED", within_s=60)
    line = next(
        n for n, text in enumerate(Path(script).read_text().splitlines(), 1) if "--account=" in text
    )
    assert f"the EDIT block of the template is untouched: line {line}:" in jobs.log(job)


def test_a_full_disk_is_refused_within_the_first_minute(cluster: Cluster, jobs: Submitter):
    options = [*ONE_CPU, "--export=ALL,MIN_FREE_GB=1000000"]
    job = jobs.train("run", options=options)
    cluster.await_state(job, "FAILED", within_s=60)
    assert "GB free, MIN_FREE_GB asks for 1000000: make room, or set SCRATCH" in jobs.log(job)


def test_more_gpus_than_a_node_has_are_refused_before_the_queue(jobs: Submitter):
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        jobs.train("run", options=["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=3"])


@pytest.mark.slow
def test_a_sweep_runs_each_line_of_its_file(cluster: Cluster, jobs: Submitter):
    lines = ["seed=1", "seed=2 'optim.optimizer.lr=1e-3'"]
    (jobs.folder / "sweep.txt").write_text("\n".join(lines) + "\n")
    common = [*SMALL, f"data.data_dir={jobs.data_dir}", "trainer.max_steps=1"]
    job = jobs.sbatch(
        "sweep", str(jobs.folder / "sweep.txt"), *common,
        options=[*ONE_CPU, "--array=1-3", f"--export=ALL,SCRATCH={jobs.folder}",
                 f"--output={jobs.folder}/%x_%A_%a.out"],
    )  # fmt: skip
    for task in ("1", "2"):
        cluster.await_state(f"{job}_{task}", "COMPLETED", within_s=PATIENCE_S)
        run = jobs.folder / f"runs/moonlit_{job}_{task}"
        run = run if run.exists() else jobs.folder / f"runs/sweep_{job}_{task}"
        configuration = json.loads((run / "configuration.json").read_text())
        assert configuration["seed"] == int(task)
        assert RunFolder(run).is_finished
    assert configuration["optim"]["optimizer"]["lr"] == 1e-3
    cluster.await_state(f"{job}_3", "FAILED", within_s=60)
    assert "has no line 3" in (jobs.folder / f"sweep_{job}_3.out").read_text()


@pytest.mark.slow
def test_a_set_is_made_in_parts_and_joined(cluster: Cluster, jobs: Submitter):
    few = [
        f"source.folder={jobs.folder}/set", "source.num_trajectories=2", "source.num_searches=1",
        "source.num_documentation=1", "source.num_worked=1", "source.num_held_out=4",
        "source.num_workers=1",
    ]  # fmt: skip
    options = ["--array=1-2", f"--output={jobs.folder}/%x_%A_%a.out"]
    parts = jobs.sbatch("prepare", "source=zero_vision", *few, options=options)
    job = jobs.sbatch(
        "prepare", "source=zero_vision", *few, options=[f"--dependency=afterok:{parts}"]
    )
    finished(cluster, jobs, job)
    assert len((jobs.folder / "set/train.jsonl").read_text().splitlines()) == 5
    for part in (1, 2):
        assert f"made part {part}/2" in (jobs.folder / f"prepare_{parts}_{part}.out").read_text()


def test_trainers_and_engine_servers_of_one_job_find_each_other(cluster: Cluster, jobs: Submitter):
    """Two trainer ranks on one node, two engine servers on the other; weights pushed every step."""
    words = [
        word for word in SMALL if word.startswith(("trainer", "model", "callbacks"))
    ]  # fmt: skip
    site = [
        "--partition=debug", "--account=test", "--nodes=1", "--ntasks-per-node=2",
        "--gpus-per-node=2", "--cpus-per-task=1",
    ]  # fmt: skip
    job = cluster.run(
        "sbatch", "--parsable", *site, f"--chdir={ROOT}", f"--output={jobs.folder}/%x_%j.out",
        ":", *site, str(ROOT / "slurm/rl_disaggregated.sbatch"), "phase=visual_rl", *words,
        *FEW_ROLLOUTS, "trainer.max_steps=2", f"run_dir={jobs.folder}/run",
    ).strip()  # fmt: skip
    log = finished(cluster, jobs, job)

    assert log.count('{"serving": "0.0.0.0:') == 2
    assert "Unclosed" not in log
    assert "srun: error" not in log  # the servers end well too
    curves = read_curves(jobs.folder / "run")
    assert len(curves["rl/reward_mean"]) == 2
    # Sampler and trainer are the same policy: the weights did arrive.
    assert max(value for _, value in curves["rl/log_ratio_abs_mean"]) < 1e-4


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path):
    """Run ``moonlit submit`` from a folder of its own, against the cluster."""
    site = [
        "slurm.partition=debug", "slurm.gpus_per_node=0", "slurm.ntasks_per_node=1",
        "slurm.cpus_per_task=1", "slurm.min_free_gb=1",
        f"slurm.setup=[source {ROOT}/.venv/bin/activate]",
    ]  # fmt: skip
    moonlit = Path(sys.executable).with_name("moonlit")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(moonlit), "submit", *site, *words],
            cwd=tmp_path, env=cluster.env, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_submit_trains_and_evaluates_with_the_script_beside_the_run(
    cluster: Cluster, submit, tmp_path: Path
):
    dry = submit("phase=joint_pretraining", *SMALL, "run_dir=run", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "#SBATCH --partition=debug" in dry.stdout
    assert not (tmp_path / "run").exists()

    done = submit("phase=joint_pretraining", *SMALL, "run_dir=run", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[2].rstrip(";")
    assert f"squeue --jobs={job}" in done.stdout
    second = submit("phase=joint_pretraining", *SMALL, "run_dir=run", "trainer.max_steps=1")
    assert f"job {job} is queued for it or runs there" in " ".join(second.stderr.split())
    papers = {path.name for path in (tmp_path / "run/slurm").iterdir()}
    assert papers >= {"train.sbatch", "environment.sh", "configuration.yaml", "job.json"}
    cluster.await_state(job, "COMPLETED", within_s=PATIENCE_S)
    assert RunFolder(tmp_path / "run").is_finished

    # It knows the run by what the template made of the words: the two must not drift apart.
    done = submit("phase=joint_pretraining", *SMALL, "run_dir=run", "trainer.max_steps=1")
    assert "this run has finished" in " ".join(done.stderr.split())

    ckpt = tmp_path / "run/checkpoints/last.ckpt"
    words = [f"ckpt={ckpt}", "sets=[counting]", "num_tasks=2", "max_new_tokens=4"]
    answered = submit("template=evaluate", *words, f"out={tmp_path}/answers.json")
    assert answered.returncode == 0, answered.stderr
    job = answered.stdout.split()[2].rstrip(";")
    cluster.await_state(job, "COMPLETED", within_s=PATIENCE_S)
    assert len(json.loads((tmp_path / "answers.json").read_text())["answers"]) == 4  # blind too

    other = submit(*SMALL, "run_dir=run", "trainer.max_steps=1", "seed=5")
    assert other.returncode == 1
    assert "holds a run of another configuration: seed is 0 there, 5 here" in " ".join(
        other.stderr.split()
    ) or "data.seed is 0 there, 5 here" in " ".join(other.stderr.split())


def test_submit_refuses_in_one_line(submit):
    refused = submit("slurm.partition=nope")
    assert refused.returncode == 1
    assert "slurm.partition=nope: no such partition; there are debug" in refused.stderr


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("slurm.gpus_per_node=3", "slurm.gpus_per_node=3, but a node of debug has 2"),
        ("slurm.nodes=3", "slurm.nodes=3, but debug has 2"),
        ("slurm.min_free_gb=1000000", "slurm.min_free_gb asks for 1000000"),
        ("slurm.time=soon", "slurm.time=soon: want MINUTES"),
        ("init_from=nope.ckpt", "nope.ckpt: no such checkpoint"),
        ("template=nope", "template=nope: want one of train"),
        ("template=evaluate ckpt=nope.ckpt", "nope.ckpt: no such checkpoint"),
        ("template=sweep nope.txt", "the first word is the file of overrides, got nope.txt"),
        ("template=sweep pyproject.toml", "say array=1-"),
        ("phase=nope", "phase/nope"),
    ],
)
def test_what_is_refused_before_the_queue(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, word: str, named: str
):
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.chdir(ROOT)
    site = ["slurm.partition=debug", "slurm.gpus_per_node=0", "slurm.ntasks_per_node=1"]
    site += ["slurm.cpus_per_task=1", "slurm.min_free_gb=1"]
    with pytest.raises((ValueError, FileNotFoundError, MissingConfigException)) as refused:
        moonlit_submit([*site, *word.split()], conf=ROOT / "conf", slurm=ROOT / "slurm")
    assert named in str(refused.value)


@pytest.mark.slow
def test_a_pipeline_walks_all_five_phases_and_does_not_walk_them_twice(
    cluster: Cluster, submit, tmp_path: Path
):
    model = [word for word in SMALL if word.startswith(("trainer", "model", "callbacks.h"))]
    pretraining = [f"joint_pretraining:{w}" for w in SMALL if w.startswith("data.")]
    trajectories = [
        f"zero_vision_set:source.{name}={number}"
        for name, number in {
            "num_trajectories": 8, "num_documentation": 1, "num_worked": 8, "num_searches": 1,
            "num_held_out": 4, "num_workers": 1,
        }.items()
    ]  # fmt: skip
    sft = ["zero_vision_sft:data.world=null", "zero_vision_sft:data.num_workers=0"]
    rl = [f"{name}:{word}" for name in ("visual_rl", "joint_rl") for word in FEW_ROLLOUTS]
    swarm = [f"parl:{word}" for word in (*FEW_ROLLOUTS, "phase.rollouts.max_turns=1")]
    words = ["pipeline=k2_5", "run_dir=chain", "trainer.max_steps=2", *model]
    words += [*pretraining, *trajectories, *sft, *rl, *swarm]

    first = submit(*words)
    assert first.returncode == 0, first.stderr
    names = [line.split(":")[0] for line in first.stdout.splitlines() if ": submitted" in line]
    assert names == [
        "zero_vision_set", "joint_pretraining", "zero_vision_sft", "visual_rl", "joint_rl", "parl",
    ]  # fmt: skip
    ids = {
        line.split(":")[0]: line.split()[-1]
        for line in first.stdout.splitlines()
        if ": submitted" in line
    }
    again = submit(*words)
    assert again.stdout.count(": submitted") == 0, again.stdout

    state = cluster.await_state(
        ids["parl"], "COMPLETED", "FAILED", "CANCELLED", within_s=2 * PATIENCE_S
    )
    logs = "\n".join(path.read_text()[-1500:] for path in tmp_path.rglob("slurm/*.out"))
    assert state == "COMPLETED", logs
    runs = sorted(path for path in (tmp_path / "chain").iterdir() if path.name != "slurm")
    assert all(RunFolder(run).is_finished for run in runs if "set" not in run.name)
    for before, after in pairwise(runs[1:]):
        configuration = json.loads((after / "configuration.json").read_text())
        assert Path(configuration["init_from"]).is_relative_to(before)
        assert weights_of(after / "checkpoints/last.ckpt").keys()

    shutil.rmtree(runs[-1])
    last = submit(*words)
    assert last.stdout.count(": finished") == 5, last.stdout
    assert last.stdout.count("parl: submitted") == 1
    cluster.run("scancel", "--user=root")
