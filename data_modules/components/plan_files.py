"""A plan as three memory-mapped arrays: planned once, shared by every rank, worker and restart."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_modules.components.corpus import full_disk_named
from data_modules.components.plan import Plan

ARRAYS = ("pieces", "row_starts", "step_starts")


def planned_once(folder: Path, sources: list[str], make: Callable[[], Plan]) -> Plan:
    """Return the plan in ``folder``; make and keep it there if there is none.

    Processes that come at once may each make it: they make the same, and the first one stays.

    Args:
        folder: named by everything that the plan is a function of.
        sources: of the mixture, in order.
        make: plans the run.

    Raises:
        OSError: if the disk is full, naming the folder.
    """
    if not folder.is_dir():
        plan = make()
        with full_disk_named(folder):
            keep(plan, folder)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Plan(sources=sources, **arrays)


def keep(plan: Plan, folder: Path) -> None:
    """Write a plan beside its place and move it there when whole."""
    unfinished = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for name in ARRAYS:
            np.save(unfinished / f"{name}.npy", getattr(plan, name))
        if not folder.is_dir():
            unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was first: its plan is the same
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
