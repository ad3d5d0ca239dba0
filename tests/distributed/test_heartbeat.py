"""A monitor and the other ranks can tell who is alive, and who is stuck."""

import json
import threading
import time
from pathlib import Path

import pytest
from micro_run import fit

from callbacks.heartbeat import SignsOfLife
from moonlit.distributed import heartbeat
from moonlit.distributed.heartbeat import Heartbeat, signs_of_life, suspects
from moonlit.distributed.whereabouts import WHEREABOUTS, Whereabouts, at


def test_a_file_stays_young_while_a_step_takes_long(tmp_path: Path):
    heart = Heartbeat(tmp_path, rank=3, every_s=0.02)
    heart.start(7)
    (first,) = signs_of_life(tmp_path)
    deadline = time.monotonic() + 20
    while signs_of_life(tmp_path)[0]["written_at"] == first["written_at"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (later,) = signs_of_life(tmp_path)
    assert (later["rank"], later["step"], later["stepped_at"]) == (3, 7, first["stepped_at"])

    heart.at_step(8)
    heart.stop()
    assert signs_of_life(tmp_path)[0]["step"] == 8


def test_the_last_beat_waits_for_the_one_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writing, together = threading.Lock(), []

    def slowly(path: Path, value: object) -> None:
        together.append(not writing.acquire(blocking=False))
        time.sleep(0.05)
        if not together[-1]:
            writing.release()

    monkeypatch.setattr(heartbeat, "write_json", slowly)
    heart = Heartbeat(tmp_path, rank=0, every_s=0.001)
    heart.start(1)
    while len(together) < 2:  # the thread has begun to write
        time.sleep(0.001)
    heart.stop()
    assert not any(together)


def test_the_rank_in_no_collective_is_named(tmp_path: Path):
    with at("DEP stage 1, patches to their encoders"):
        Heartbeat(tmp_path, rank=0, every_s=1.0).write()
    stuck = Heartbeat(tmp_path, rank=1, every_s=1.0)
    stuck.at_step(17)
    stuck.write()

    said = suspects(tmp_path)
    assert said.startswith("moonlit: rank 1 (")
    assert "is in no collective: step 17 ended 0 s ago" in said
    assert "rank 0" not in said


def test_whereabouts_know_the_innermost_place():
    here = Whereabouts()
    assert here.now() == (None, 0.0)
    with here.at("a step"), here.at("a sum"):
        assert here.now()[0] == "a sum"


def test_a_run_leaves_its_last_step(tmp_path: Path):
    fit(max_steps=2, callbacks=[SignsOfLife(run_dir=str(tmp_path), every_s=60.0)])
    (path,) = (tmp_path / "heartbeats").iterdir()
    assert path.name == "rank_00000.json"
    assert json.loads(path.read_text())["step"] == 2
    assert WHEREABOUTS.now()[0] is None
