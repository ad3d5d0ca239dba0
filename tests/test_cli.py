"""The commands as a person types them: what they print, what they refuse, how they exit."""

import subprocess
import sys
from pathlib import Path

import pytest

MOONLIT = Path(sys.executable).with_name("moonlit")
ROOT = Path(__file__).parents[1]


def moonlit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MOONLIT, *words], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_without_a_command_the_commands_are_listed(tmp_path: Path):
    done = moonlit(cwd=tmp_path)
    assert done.returncode == 0
    assert {"train", "prepare", "info", "export"} <= set(done.stdout.split())


def test_an_unknown_command_is_refused(tmp_path: Path):
    done = moonlit("trian", cwd=tmp_path)
    assert done.returncode == 1
    assert "no command 'trian'" in done.stderr


def test_help_explains_keys_and_names_every_choice_in_a_line(tmp_path: Path):
    done = moonlit("prepare", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "report: false # true: plan a run" in done.stdout
    for kind in (ROOT / "conf/source").glob("*.yaml"):
        lines = done.stdout.partition("\nsource=\n")[2].splitlines()
        (line,) = [row for row in lines if row.startswith(f"  {kind.stem} ")]
        assert len(line.split()) > 3
    assert "hydra:" not in done.stdout


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.max_stepz=3", "trainer.max_stepz: no such key; did you mean trainer.max_steps"),
        ("model=tinny", "model=tinny: conf/model has no such file; did you mean tiny?"),
        ("seed", "seed: want KEY=VALUE"),
        ("init_from=missing.ckpt", "init_from=missing.ckpt"),
        ("phase.trains=[decoder]", "phase.trains"),
        ("data.mine=1", "data.mine: no such key; there are"),
        ("data.mine=1", "(+data.mine=... adds one)"),
        ("seed=-1", "seed=-1: want at least 0"),
    ],
)
def test_a_bad_override_is_named_and_exits_non_zero(override: str, named: str, tmp_path: Path):
    done = moonlit("train", override, "debug=one_step", f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()  # a run that never began leaves nothing


def test_a_count_that_is_none_is_named(tmp_path: Path):
    words = ["phase=visual_rl", "phase.rollouts.group_size=eight", f"run_dir={tmp_path}/run"]
    done = moonlit("train", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "phase.rollouts.group_size='eight': want a whole number of at least 2" in done.stderr


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path: Path):
    done = moonlit("train", "debug=one_step", "run_dir=/proc/mine", cwd=tmp_path)
    assert done.returncode == 1
    assert "the run's folder cannot be made: " in done.stderr
    assert "Traceback" not in done.stderr


def test_info_counts_the_largest_model(tmp_path: Path):
    done = moonlit("info", "model=kimi_k2_5", cwd=tmp_path)
    assert done.returncode == 0
    assert "416,866,032" in done.stdout
    assert "54,277,888" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["chat"], "say ckpt=..."),
        (["eval", "ckpt="], "say ckpt=..."),
        (["chat", "ckpt=.", "image=[gone.png]"], "image=gone.png: there is nothing at this path"),
        (["report", "run=gone"], "run=gone: there is nothing at this path"),
    ],
)
def test_a_path_with_nothing_there_is_refused_at_once(words: list[str], named: str, tmp_path: Path):
    done = moonlit(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert named in done.stderr
