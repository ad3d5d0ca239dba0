"""A template of ``slurm/`` with a site's own values in its EDIT block."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = "environment.sh"
TEMPLATES = ("train", "rl_disaggregated", "sweep", "prepare", "evaluate")
RUNS = ("train", "rl_disaggregated")
"""Those of one run of ``moonlit train``."""
HETEROGENEOUS = "#SBATCH hetjob\n"
"""Between the lines of trainers and those of engine servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What ``conf/slurm/site.yaml`` explains."""

    account: str | None
    partition: str
    nodes: int
    engine_nodes: int
    gpus_per_node: int
    ntasks_per_node: int
    cpus_per_task: int
    time: str
    setup: Sequence[str]
    srun_options: Sequence[str]
    scratch: str | None
    min_free_gb: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def options(self, template: str) -> dict[str, Any]:
        """Return the options of sbatch that fill a template; None removes the template's line."""
        on_cpus, alone = template == "prepare", template in ("prepare", "evaluate")
        gpus = None if on_cpus or not self.gpus_per_node else self.gpus_per_node
        tasks = {"ntasks": 1} if alone else {"ntasks-per-node": self.ntasks_per_node}
        return {
            "nodes": 1 if alone else self.nodes,
            "account": self.account,
            "partition": self.partition,
            "gpus-per-node": 1 if gpus and alone else gpus,
            **tasks,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            **self.extra,
        }


def filled(template: Path, site: Site, options: Mapping[str, Any]) -> str:
    """Return a template's text for one job.

    Args:
        template: a file of ``slurm/``.
        site: whose lines replace those of the EDIT block.
        options: further options of sbatch.
    """
    lines = site.options(template.stem)
    text, hetjob, engines = template.read_text().partition(HETEROGENEOUS)
    text = with_options(text, lines | dict(options))
    if hetjob:
        text += hetjob + with_options(engines, lines | {"nodes": site.engine_nodes})
    body = "".join(f"  {line}\n" for line in site.setup) or "  :\n"
    text = re.sub(
        r"(?ms)^site_setup\(\) \{.*?^\}", lambda _: f"site_setup() {{\n{body}}}", text, count=1
    )
    values = {"SRUN_OPTIONS": f"({shlex.join(site.srun_options)})"}
    if template.stem != "evaluate":
        values["MIN_FREE_GB"] = str(site.min_free_gb)
    if site.scratch is not None:
        values["SCRATCH"] = shlex.quote(site.scratch)
    for name, value in values.items():
        text = re.sub(rf"(?m)^{name}=.*$", lambda _, v=f"{name}={value}": v, text, count=1)
    return text


def with_options(text: str, options: Mapping[str, Any]) -> str:
    """Set options of sbatch in a script."""
    for key, value in options.items():
        text = with_option(text, key, value)
    return text


def with_option(text: str, key: str, value: Any) -> str:
    """Set one option of sbatch in a script; None takes its line out."""
    line = "" if value is None else f"#SBATCH --{key}={value}\n"
    pattern = re.compile(rf"(?m)^#SBATCH --{re.escape(key)}(=.*)?\n")
    if pattern.search(text):
        return pattern.sub(lambda _: line, text, count=1)
    if not line:
        return text
    shebang, _, rest = text.partition("\n")
    return f"{shebang}\n{line}{rest}"
