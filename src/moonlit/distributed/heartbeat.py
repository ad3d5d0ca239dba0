"""Signs of life: every rank writes how far it is, where a monitor and the other ranks can read it.

``run_dir/heartbeats/rank_00000.json`` is replaced every few seconds by a thread of its own, so an
old file means a dead process, and a young file with an old ``stepped_at`` a stuck one.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from moonlit.distributed.whereabouts import WHEREABOUTS
from moonlit.hub.disk import write_json

FOLDER = "heartbeats"


class Heartbeat:
    """Writes one rank's file until it is stopped.

    Args:
        run_dir: the run's folder.
        rank: of this process.
        every_s: how often [s].
    """

    def __init__(self, run_dir: Path, *, rank: int, every_s: float) -> None:
        self.path = run_dir / FOLDER / f"rank_{rank:05d}.json"
        self.rank, self.every_s = rank, every_s
        self.step, self.stepped_at = 0, time.time()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def start(self, step: int) -> None:
        """Begin at a step."""
        self.at_step(step)
        self.write()
        self.thread.start()

    def at_step(self, step: int) -> None:
        """Note that an optimizer step has ended."""
        self.step, self.stepped_at = step, time.time()

    def stop(self) -> None:
        """Write once more, and no more."""
        self.stopped.set()
        self.thread.join()  # two writers would take each other's file away
        self.write()

    def _beat(self) -> None:
        while not self.stopped.wait(self.every_s):
            self.write()

    def write(self) -> None:
        """Write where this rank is."""
        place, waited_s = WHEREABOUTS.now()
        write_json(
            self.path,
            {
                "rank": self.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "step": self.step,
                "stepped_at": self.stepped_at,
                "written_at": time.time(),
                "place": place,
                "at_place_s": waited_s,
            },
        )


def signs_of_life(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the ranks have last written, by rank."""
    files = sorted((run_dir / FOLDER).glob("rank_*.json"))
    return [json.loads(path.read_text()) for path in files]


def suspects(run_dir: Path) -> str:
    """Name the ranks that are not waiting in a collective: those the others wait for."""
    now = time.time()
    return "\n".join(
        f"moonlit: rank {sign['rank']} ({sign['host']}, process {sign['pid']}) is in no "
        f"collective: step {sign['step']} ended {now - sign['stepped_at']:.0f} s ago, "
        f"its last sign of life is {now - sign['written_at']:.0f} s old"
        for sign in signs_of_life(run_dir)
        if sign["place"] is None
    )
