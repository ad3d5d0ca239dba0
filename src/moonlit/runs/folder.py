"""A run's folder: what it was configured with, its newest whole checkpoint, how it ended."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moonlit.hub.disk import write_json

CONFIGURATION, FINISHED = "configuration.json", "finished.json"
STEP = re.compile(r"step_(\d{6,})\.ckpt")
NOT_THE_RUN = (  # keys that a run may change when it goes on: how it is run, not what it computes
    "resume_from", "run_dir", "callbacks", "strategy", "trainer.devices",
    "trainer.num_nodes", "trainer.logger", "trainer.log_every_n_steps", "trainer.accelerator",
)  # fmt: skip
MAX_NAMED = 5


class RunFolder:
    """The folder of one run.

    Args:
        path: it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def saved(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        if not self.checkpoints.is_dir():
            return []
        steps = {int(m[1]): p for p in self.checkpoints.iterdir() if (m := STEP.fullmatch(p.name))}
        return [steps[step] for step in sorted(steps, reverse=True)]

    def newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint that is whole; None if there is no checkpoint.

        Args:
            warn: is told of every damaged one.

        Raises:
            ValueError: if there are checkpoints and none is whole.
        """
        from moonlit.distributed.checkpoint import fault_of  # slow to import; submit has no need

        saved = self.saved()
        for path in saved:
            fault = fault_of(path)
            if fault is None:
                return path
            warn(f"WARNING: {path} is damaged ({fault}); falling back to the one before")
        if saved:
            raise ValueError(
                f"none of the {len(saved)} checkpoints in {self.checkpoints} is whole: restore "
                "one, or begin anew with another run_dir"
            )
        return None

    def require_unused(self) -> None:
        """Refuse to begin anew over another run's checkpoints.

        Raises:
            ValueError: naming them.
        """
        if saved := self.saved():
            raise ValueError(
                f"run_dir={self.path} holds a run already ({saved[0].name}): go on with it by "
                "resume_from=auto, or take another run_dir"
            )

    def require_same(self, configuration: Mapping[str, Any]) -> None:
        """Refuse to go on with a run of another configuration.

        Raises:
            ValueError: naming what differs.
        """
        if found := self.changes(configuration):
            more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            raise ValueError(
                f"run_dir={self.path} holds a run of another configuration: "
                f"{'; '.join(found[:MAX_NAMED])}{more}. Take another run_dir, or say "
                "resume_from=CHECKPOINT to go on with the change"
            )

    def changes(self, configuration: Mapping[str, Any]) -> list[str]:
        """Say in what a configuration differs from the run's; nothing where there is none."""
        path = self.path / CONFIGURATION
        if not path.is_file():
            return []
        return list(differences(json.loads(path.read_text()), plain(configuration)))

    def record(self, configuration: Mapping[str, Any]) -> None:
        """Write down what the run is configured with."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / CONFIGURATION, plain(configuration))
        (self.path / FINISHED).unlink(missing_ok=True)

    def finish(self, *, step: int, checkpoint: Path | None) -> None:
        """Write down that the run has come to its end."""
        name = None if checkpoint is None else str(checkpoint)
        write_json(self.path / FINISHED, {"step": step, "checkpoint": name})

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / FINISHED).is_file()


def plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of a configuration, so that it compares equal when read again."""
    return json.loads(json.dumps(configuration, default=str))


def differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """Say which values of two configurations differ, leaving out what is not the run itself."""
    if key in NOT_THE_RUN or there == here:
        return
    if key == "init_from" and None in (there, here):  # the command that goes on leaves it out
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            inner = f"{key}.{name}" if key else name
            yield from differences(there.get(name), here.get(name), inner)
    else:
        yield f"{key} is {there!r} there, {here!r} here"
