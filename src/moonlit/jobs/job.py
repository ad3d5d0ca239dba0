"""One job: the folder it writes, the exact script beside it, and its number once it is queued."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonlit.hub.disk import write_json
from moonlit.jobs.script import ENVIRONMENT, Site, filled
from moonlit.runs.lock import ALIVE_IN_QUEUE, job_state

WAITING = (*ALIVE_IN_QUEUE, "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be submitted.

    Attributes:
        name: of the job.
        template: a file of ``slurm/``.
        folder: of the run; ``slurm/`` below it holds script, configuration and logs.
        words: the script's arguments.
        site: the cluster.
        configuration: what the words mean, resolved; for people.
        array: indices of a job array.
    """

    name: str
    template: Path
    folder: Path
    words: Sequence[str]
    site: Site
    configuration: str
    array: str | None = None

    @property
    def papers(self) -> Path:
        """Where script, configuration and logs lie."""
        return self.folder.absolute() / "slurm"

    @property
    def script(self) -> str:
        """The exact script."""
        number = "%j" if self.array is None else "%A_%a"
        options: dict[str, Any] = {
            "job-name": self.name,
            "output": self.papers / f"%x_{number}.out",
            "array": self.array,
        }
        text = filled(self.template, self.site, options)
        return text.replace(
            "set -euo pipefail\n",
            f"set -euo pipefail\nMOONLIT_SLURM={shlex.quote(str(self.papers))}\n",
            1,
        )

    def write(self) -> Path:
        """Write script and configuration beside the run; return the script."""
        self.papers.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.template.with_name(ENVIRONMENT), self.papers / ENVIRONMENT)
        (self.papers / "configuration.yaml").write_text(self.configuration)
        script = self.papers / self.template.name
        script.write_text(self.script)
        return script

    def command(self, after: Sequence[str] = ()) -> list[str]:
        """Return the command that submits it.

        Args:
            after: ids of jobs that must have ended well before it starts.
        """
        waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        script = self.papers / self.template.name
        return ["sbatch", "--parsable", *(waits if after else []), str(script), *self.words]

    def submit(self, after: Sequence[str] = ()) -> str:
        """Write its papers and queue it; return its id.

        Raises:
            RuntimeError: what sbatch says.
        """
        self.write()
        done = subprocess.run(self.command(after), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(self.command(after))}: {done.stderr.strip()}")
        number = done.stdout.strip().split(";")[0]
        write_json(self.papers / "job.json", {"job": number, "words": list(self.words)})
        return number

    def queued(self) -> str | None:
        """Return the id of the job that was submitted for this folder and has not ended."""
        record = self.papers / "job.json"
        if not record.is_file():
            return None
        known: Mapping[str, Any] = json.loads(record.read_text())
        return known["job"] if job_state(known["job"]) in WAITING else None
