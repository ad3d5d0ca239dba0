"""Which collective each rank is in, so that a hung one ends the run and says who waited where.

A collective that some rank never joins makes the others wait for ever, silently. Code that takes
part in collectives says so with ``at``; the watch ends a process that stays at one place too long.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 1.0


class Whereabouts:
    """The stack of places that this process is at, innermost last."""

    def __init__(self) -> None:
        self.places: list[tuple[str, float]] = []
        self.rank = 0
        self.suspects: Callable[[], str] | None = None

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Be at ``place`` for the duration of the block."""
        self.places.append((place, time.monotonic()))
        try:
            yield
        finally:
            self.places.pop()

    def move(self, place: str) -> None:
        """Be at another place for what is left of the innermost block."""
        self.places[-1] = (place, time.monotonic())

    def now(self) -> tuple[str | None, float]:
        """Return the innermost place and how long this process has been there [s]."""
        places = list(self.places)
        if not places:
            return None, 0.0
        name, since_s = places[-1]
        return name, time.monotonic() - since_s

    def watch(
        self, *, rank: int, timeout_s: float, suspects: Callable[[], str] | None = None
    ) -> None:
        """Start to watch this process from a thread of its own.

        Args:
            rank: of this process.
            timeout_s: a longer stay at one place ends the process [s].
            suspects: says what is known of the ranks that never came.
        """
        self.rank, self.suspects = rank, suspects
        threading.Thread(
            target=self._poll, args=(timeout_s,), daemon=True, name="whereabouts"
        ).start()

    def _poll(self, timeout_s: float) -> None:
        while True:
            time.sleep(min(POLL_S, timeout_s / 4))
            places = list(self.places)
            if places and time.monotonic() - places[-1][1] > timeout_s:
                self._give_up(timeout_s)

    def _give_up(self, timeout_s: float) -> None:
        print(self.report(timeout_s), file=sys.stderr, flush=True)
        if self.suspects is not None and self.rank < 2:  # the second, should the first be stuck
            print(self.suspects(), file=sys.stderr, flush=True)
        time.sleep(2 * POLL_S)  # the other ranks say where they are before the launcher ends them
        os._exit(1)

    def report(self, waited_s: float) -> str:
        """Say where this rank has been waiting, and for how long."""
        names = " > ".join(name for name, _ in list(self.places))
        frames = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frames, limit=-12)) if frames else ""
        return (
            f"moonlit: rank {self.rank} waited more than {waited_s:.0f} s at {names}; "
            f"some rank never came\n{stack}"
        )


WHEREABOUTS = Whereabouts()
at = WHEREABOUTS.at
