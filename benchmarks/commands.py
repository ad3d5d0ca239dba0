"""``moonlit`` commands one after another: what benchmarks of several runs are made of."""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
"""Commands begin as copies of a process that has imported everything: a minute saved on each."""


def prepare_commands(phase: str) -> None:
    """Import what commands need once; they share the cores, so each has one thread.

    Args:
        phase: whose module is imported.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(["moonlit.cli", "moonlit.train", f"moonlit.phases.{phase}"])


def call(words: Sequence[str], *, makes: Path) -> None:
    """Run a command unless what it makes is there.

    Raises:
        SystemExit: if it fails, naming its log.
    """
    if makes.exists():
        return
    print("moonlit", *words, flush=True)
    log = makes.with_suffix(".log") if makes.parent.is_dir() else makes.parent.with_suffix(".log")
    process = CONTEXT.Process(target=run_command, args=(list(words), log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"moonlit {words[0]} ended with {process.exitcode}: see {log}")


def run_command(words: list[str], log: Path) -> None:
    """Be a command whose words go into a log."""
    from moonlit.cli import main as moonlit

    with log.open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    sys.argv = ["moonlit", *words]
    moonlit()


def checkpoint(run: Path) -> Path:
    """Return where a run ends."""
    return run / "checkpoints" / "last.ckpt"


def spread(values: Sequence[float], form: str) -> str:
    """Write a mean with the lowest and highest value behind it."""
    mean, low, high = map(form.format, (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"
