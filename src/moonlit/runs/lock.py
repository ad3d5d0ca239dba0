"""One job writes a run's folder: a lock that says who holds it, on any shared file system.

The lock is a file made in one step (a hard link, which NFS too makes for one of two rivals only).
Whether its holder is still at work is asked of SLURM where the holder is a job, of the process
table where it is a process of this host, and else told by the file's age: the holder touches it.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

TOUCH_EVERY_S = 10.0
STALE_AFTER_S = 120.0
ALIVE_IN_QUEUE = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING")
QUEUE_TIMEOUT_S = 20.0


class FolderTakenError(RuntimeError):
    """Another job writes this run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who writes a folder.

    Attributes:
        host: name of its machine.
        pid: process id there.
        born: when that process started [clock ticks since the host's boot].
        job: SLURM job id; None outside SLURM.
    """

    host: str
    pid: int
    born: int
    job: str | None

    @classmethod
    def this_process(cls) -> "Owner":
        """Describe this process."""
        job = os.environ.get("SLURM_JOB_ID")
        return cls(host=socket.gethostname(), pid=os.getpid(), born=born(os.getpid()), job=job)

    def __str__(self) -> str:
        """Name it for messages."""
        job = "" if self.job is None else f"SLURM job {self.job}, "
        return f"{job}process {self.pid} on {self.host}"


class RunLock:
    """Held from ``take`` to ``release``; a thread touches it meanwhile.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.owner = Owner.this_process()
        self.given_back = threading.Event()
        self.is_held = False

    def take(self) -> None:
        """Take the folder, if need be from a job that is gone.

        Raises:
            FolderTakenError: naming the job that writes there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".lock.{self.owner.host}.{self.owner.pid}")
        draft.write_text(json.dumps(asdict(self.owner)))
        try:
            while not self.link(draft):
                self.evict()
        finally:
            draft.unlink()
        self.is_held = True
        threading.Thread(target=self._touch, daemon=True, name="run-lock").start()

    def link(self, draft: Path) -> bool:
        """Make the lock unless there is one."""
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        return True

    def evict(self) -> None:
        """Remove the lock of a job that is gone.

        Raises:
            FolderTakenError: if it is at work.
        """
        try:
            written = self.path.read_text()
            holder = Owner(**json.loads(written))
            age_s = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:  # released this moment
            return
        if is_at_work(holder, age_s, self.owner):
            raise FolderTakenError(
                f"{self.path.parent} is written by {holder} (last sign of life {age_s:.0f} s ago): "
                "end that job first, or take another run_dir"
            )
        print(f"moonlit: {holder} is gone; taking {self.path.parent} over", file=sys.stderr)
        aside = self.path.with_name(f".lock.old.{self.owner.host}.{self.owner.pid}")
        with contextlib.suppress(FileNotFoundError):  # a rival has moved it
            os.rename(self.path, aside)
            if aside.read_text() != written:  # a rival's, taken since: give it back
                self.link(aside)
            aside.unlink()

    def _touch(self) -> None:
        while not self.given_back.wait(TOUCH_EVERY_S):
            with contextlib.suppress(FileNotFoundError):  # never make it anew
                os.utime(self.path)

    def release(self) -> None:
        """Leave the folder to others."""
        self.given_back.set()
        if self.is_held:
            self.is_held = False
            self.path.unlink(missing_ok=True)


def is_at_work(holder: Owner, age_s: float, asking: Owner) -> bool:
    """Say whether the holder of a lock still writes.

    Args:
        holder: who took it.
        age_s: how long ago it was touched [s].
        asking: who wants it now.
    """
    if holder.host == asking.host and holder.job == asking.job:
        return born(holder.pid) == holder.born
    if holder.job is not None:
        if holder.job == asking.job:  # requeued: the job's earlier life has ended
            return False
        state = job_state(holder.job)
        if state is not None:
            return state in ALIVE_IN_QUEUE
    return age_s < STALE_AFTER_S


def born(pid: int) -> int:
    """Return when a process of this host started [clock ticks since boot]; -1: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(stat.rpartition(")")[2].split()[19])


def job_state(job: str) -> str | None:
    """Ask SLURM for a job's state: ``GONE`` if it knows none; None if SLURM does not answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={job}"],
            capture_output=True,
            text=True,
            timeout=QUEUE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return done.stdout.strip() or "GONE"
    return "GONE" if "Invalid job id" in done.stderr else None
