"""One job writes a run's folder; a job that is gone does not bar the next one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moonlit.runs import lock
from moonlit.runs.lock import STALE_AFTER_S, FolderTakenError, Owner, RunLock, born, is_at_work

HERE = Owner(host="node1", pid=os.getpid(), born=born(os.getpid()), job=None)

HOLD = """
import sys, time
from pathlib import Path
from moonlit.runs.lock import RunLock

RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path, capsys):
    holder = hold(tmp_path)
    with pytest.raises(FolderTakenError, match=f"process {holder.pid} on .*another run_dir"):
        RunLock(tmp_path).take()

    holder.kill()
    holder.wait()
    RunLock(tmp_path).take()
    assert f"process {holder.pid} on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_released_folder_is_free(tmp_path: Path):
    first = RunLock(tmp_path)
    first.take()
    first.release()
    assert not list(tmp_path.iterdir())
    hold(tmp_path).kill()


def test_the_next_life_of_a_requeued_job_takes_its_own_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    earlier = replace(Owner.this_process(), host="node9")
    (tmp_path / ".lock").write_text(json.dumps(asdict(earlier)))
    RunLock(tmp_path).take()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("state", "is_alive"),
    [("RUNNING", True), ("COMPLETING", True), ("PENDING", False), ("GONE", False)],
)
def test_another_job_is_judged_by_the_queue(monkeypatch, state: str, is_alive: bool):
    monkeypatch.setattr(lock, "job_state", lambda job: state)
    holder = replace(HERE, host="node2", job="8")
    assert is_at_work(holder, 0.0, HERE) is is_alive


def test_another_host_is_judged_by_its_last_sign_of_life(monkeypatch):
    monkeypatch.setattr(lock, "job_state", lambda job: None)  # SLURM does not answer
    for holder in (replace(HERE, host="node2"), replace(HERE, host="node2", job="8")):
        assert is_at_work(holder, STALE_AFTER_S - 1, HERE)
        assert not is_at_work(holder, STALE_AFTER_S + 1, HERE)


def test_a_reused_process_id_is_not_the_holder():
    assert not is_at_work(replace(HERE, born=HERE.born - 1), 0.0, HERE)
