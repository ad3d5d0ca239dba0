"""A rank that dies or never comes ends the run, and is named."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from moonlit.distributed.launcher import RankLauncher

WAIT_FOR_EVER = """
import time
from moonlit.distributed.whereabouts import WHEREABOUTS, at

WHEREABOUTS.watch(rank=3, timeout_s=0.4)
with at("the step"), at("DEP stage 1, patches to their encoders"):
    time.sleep(60)
"""

SMALL = [
    "strategy=dep",
    "trainer.devices=2",
    "trainer.max_steps=2000",
    "trainer.val_check_interval=2000",
    "callbacks.progress.line_every_s=0.1",
    "data.num_workers=0",
    "data.max_text_files=3",
    "data.num_held_out=16",
    "data.row_tokens=256",
    "data.vision_mixture.pages=0.0",  # its documents are longer
    "data.text_mixture.code=0",
    "data.text_mixture.prose=1.0",
]
PICTURES = {
    "counting": 60, "attributes": 40, "captions": 20, "grounding": 20, "digits": 20,
    "puzzles": 20, "clips": 10, "pages": 4,
}  # fmt: skip


def test_a_rank_that_waits_too_long_says_where_and_ends():
    command = [sys.executable, "-c", WAIT_FOR_EVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    place = "the step > DEP stage 1, patches to their encoders"
    assert f"rank 3 waited more than 0 s at {place}" in done.stderr
    assert "time.sleep(60)" in done.stderr or 'File "<string>", line 7' in done.stderr


def launcher_of_two_nodes() -> None:
    """On the second of two nodes of two ranks each, the started one is killed."""
    os.environ["NODE_RANK"] = "1"
    launcher = RankLauncher(LightningEnvironment(), 2, 2, overrides=())
    launcher.procs = [subprocess.Popen(["sh", "-c", "kill -KILL $$"])]
    launcher._watch()


def test_a_killed_rank_is_named_as_the_whole_run_counts(capfd: pytest.CaptureFixture[str]):
    """Catches: a rank counted on its own node, and a signal taken for a good end."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=launcher_of_two_nodes, daemon=True)
    process.start()
    process.join(timeout=50)
    assert process.exitcode == 1
    assert re.search(r"rank 3 \(process \d+\) was killed by SIGKILL", capfd.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a started rank", "the first rank"])
def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(tmp_path: Path, victim: str):
    moonlit = Path(sys.executable).with_name("moonlit")
    pictures = [f"data.num_pictures.{name}={number}" for name, number in PICTURES.items()]
    log = tmp_path / "log"
    with log.open("w") as out:
        first = subprocess.Popen(
            [sys.executable, moonlit, "train", *SMALL, *pictures, "run_dir=run"],
            cwd=tmp_path, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    wait_for(lambda: "step 2/" in log.read_text() or first.poll() is not None, seconds=200)
    assert first.poll() is None, log.read_text()
    (started,) = children_of(first.pid)
    number = first.pid if victim == "the first rank" else started

    os.kill(number, signal.SIGKILL)
    began = time.monotonic()
    assert first.wait(timeout=60) != 0
    wait_for(lambda: not Path(f"/proc/{started}").exists(), seconds=60)

    assert time.monotonic() - began < 60
    if victim == "the first rank":
        assert "rank 0" in log.read_text()
    else:
        assert f"moonlit: rank 1 (process {started}) was killed by SIGKILL" in log.read_text()


def wait_for(condition, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def children_of(pid: int) -> list[int]:
    """Processes that run the same program, started by ``pid``."""
    ids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(n) for n in ids if b"moonlit" in Path(f"/proc/{n}/cmdline").read_bytes()]
