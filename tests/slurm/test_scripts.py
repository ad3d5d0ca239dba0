"""The templates as text: clean shell, and every phase and preset composes in each."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moonlit.jobs.preflight import Partition, check_site, gpus_of, minutes
from moonlit.jobs.script import HETEROGENEOUS, TEMPLATES, Site, filled, with_option
from moonlit.submit import COMPOSED, composed_for

ROOT = Path(__file__).parents[2]
PHASES = sorted(path.stem for path in (ROOT / "conf/phase").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
SITE = Site(
    account="physics", partition="gpu", nodes=4, engine_nodes=2, gpus_per_node=8, ntasks_per_node=8,
    cpus_per_task=12, time="12:00:00", setup=["module load cuda", "source env/bin/activate"],
    srun_options=["--container-image=a b.sqsh"], scratch="/scratch/me", min_free_gb=50,
    extra={"constraint": "h100"},
)  # fmt: skip


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_the_scripts_are_shellcheck_clean(tmp_path: Path):
    scripts = [*(ROOT / "slurm").glob("*.sbatch"), ROOT / "slurm/environment.sh"]
    assert len(scripts) == 6
    for script in scripts[:]:
        if script.suffix == ".sbatch" and script.stem in TEMPLATES:
            made = tmp_path / script.name
            made.write_text(filled(script, SITE, {"job-name": "a"}))
            scripts.append(made)
    done = subprocess.run(
        ["shellcheck", "--exclude=SC1091", *map(str, scripts)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "slurm").glob("*.sbatch")))
def test_every_template_has_what_a_job_needs(name: str):
    text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
    for line in (
        "set -euo pipefail", "#SBATCH --requeue", "#SBATCH --signal=B:USR1@", "check_site",
        "# ---- EDIT: your site",
    ):  # fmt: skip
        assert line in text
    body = text.partition("set -euo pipefail")[0].splitlines()
    code = next(n for n, line in enumerate(body) if line and not line.startswith("#"))
    assert not [line for line in body[code:] if line.startswith("#SBATCH")]  # sbatch stops there


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("model", MODELS)
def test_a_job_composes_for_every_phase_and_preset(phase: str, model: str):
    words = [f"phase={phase}", f"model={model}", "trainer=gpu", "strategy=dep", "resume_from=auto"]
    words += ["trainer.num_nodes=2", "trainer.devices=8", "callbacks.progress.line_every_s=60"]
    remote = ["engine@phase.build_engine=remote"] if phase in ("visual_rl", "joint_rl") else []
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=[*words, *remote])
    assert (cfg.trainer.num_nodes, cfg.trainer.devices) == (2, 8)


@pytest.mark.parametrize("name", sorted(set(COMPOSED.values()) - {"train"}))
def test_the_other_templates_compose(name: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        compose(name)


def test_a_site_fills_the_edit_block():
    text = filled(ROOT / "slurm/train.sbatch", SITE, {"job-name": "mine", "array": None})
    for line in (
        "#SBATCH --account=physics", "#SBATCH --partition=gpu", "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=8", "#SBATCH --time=12:00:00",
        "#SBATCH --constraint=h100", "#SBATCH --job-name=mine", "SCRATCH=/scratch/me",
        "MIN_FREE_GB=50", "SRUN_OPTIONS=('--container-image=a b.sqsh')",
        "site_setup() {\n  module load cuda\n  source env/bin/activate\n}",
    ):  # fmt: skip
        assert line in text
    assert "EDIT\n" not in text.replace("END EDIT", "")
    assert text.count("#SBATCH --nodes=") == 1


def test_what_is_kept_beside_a_run_is_what_its_template_runs():
    """The words that ``train.sbatch`` adds: catches a configuration of one CPU beside 32 GPUs."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = composed_for("train", ["model=small"], SITE)
        assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.resume_from) == (4, 8, "auto")
        assert (cfg.trainer.accelerator, cfg.strategy.pp_size) == ("gpu", 1)
        own = ["trainer=cpu", "strategy=dep", "strategy.pp_size=2", "resume_from=a.ckpt"]
        cfg = composed_for("rl_disaggregated", ["phase=visual_rl", *own], SITE)
    assert (cfg.trainer.accelerator, cfg.strategy.pp_size, cfg.resume_from) == ("cpu", 2, "a.ckpt")
    assert cfg.phase.build_engine._target_.endswith("RemoteEngine.connect")


def test_trainers_and_engine_servers_have_nodes_of_their_own():
    text = filled(ROOT / "slurm/rl_disaggregated.sbatch", SITE, {"job-name": "mine"})
    trainers, engines = text.partition("set -euo")[0].split(HETEROGENEOUS)
    assert "#SBATCH --nodes=4\n" in trainers
    assert "#SBATCH --nodes=2\n" in engines
    for line in ("--account=physics", "--partition=gpu", "--gpus-per-node=8", "--time=12:00:00"):
        assert f"#SBATCH {line}\n" in trainers
        assert f"#SBATCH {line}\n" in engines
    assert "--job-name" not in engines
    with pytest.raises(ValueError, match=r"nodes=4 and slurm\.engine_nodes=2, but gpu has 5"):
        check_site(SITE, "rl_disaggregated", {"gpu": Partition(5, 8, 96, None)})


def test_a_job_on_cpus_asks_for_no_gpus():
    text = filled(ROOT / "slurm/prepare.sbatch", SITE, {})
    assert "gpus" not in text.partition("set -euo")[0].replace("CPUs", "")
    assert "#SBATCH --nodes=1" in text


def test_an_option_is_set_removed_or_added():
    text = "#!/bin/sh\n#SBATCH --a=1 # why\n#SBATCH --ab=2\n"
    assert with_option(text, "a", 3) == "#!/bin/sh\n#SBATCH --a=3\n#SBATCH --ab=2\n"
    assert with_option(text, "a", None) == "#!/bin/sh\n#SBATCH --ab=2\n"
    assert with_option(text, "c", 4).startswith("#!/bin/sh\n#SBATCH --c=4\n")
    assert with_option(text, "c", None) == text


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 30), ("1:30", 1), ("2:00:00", 120), ("1-02:03:04", 1563), ("infinite", None)],
)
def test_time_limits_are_read(limit: str, expected: int | None):
    assert minutes(limit) == expected


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:h100:8(S:0-1),nvme:2", 8), ("gpu:a:2,gpu:b:3", 5)],
)
def test_gpus_are_counted(gres: str, gpus: int):
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("partition", "named"),
    [
        (Partition(2, 8, 96, None), "slurm.nodes=4, but gpu has 2"),
        (Partition(4, 4, 96, None), "slurm.gpus_per_node=8, but a node of gpu has 4"),
        (Partition(4, 8, 64, None), "= 96 cores, but a node of gpu has 64"),
        (Partition(4, 8, 96, 60), "longer than gpu allows (60 minutes)"),
    ],
)
def test_what_a_partition_does_not_have_is_refused(partition: Partition, named: str):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_site(SITE, "train", {"gpu": partition})
    assert named in str(refused.value)
    check_site(SITE, "train", {"gpu": Partition(4, 8, 96, 720)})
