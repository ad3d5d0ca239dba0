"""What can be refused before a job waits in the queue."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moonlit.jobs.script import RUNS, Site

GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Partition:
    """What a cluster offers under one name.

    Attributes:
        nodes: how many.
        gpus: of its largest node.
        cpus: of its largest node.
        max_minutes: longest job; None: no limit.
    """

    nodes: int
    gpus: int
    cpus: int
    max_minutes: int | None


def partitions() -> dict[str, Partition]:
    """Ask SLURM what there is.

    Raises:
        RuntimeError: if there is no SLURM here.
    """
    if shutil.which("sinfo") is None:
        raise RuntimeError("there is no SLURM here (no sinfo): submit from a login node")
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%R|%D|%G|%c|%l"], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"SLURM does not answer: {done.stderr.strip()}")
    found: dict[str, Partition] = {}
    for row in done.stdout.split():
        name, nodes, gres, cpus, limit = row.split("|")
        kind = Partition(int(nodes), gpus_of(gres), int(cpus.rstrip("+")), minutes(limit))
        known = found.get(name, Partition(0, 0, 0, kind.max_minutes))
        found[name] = Partition(
            known.nodes + kind.nodes,
            max(known.gpus, kind.gpus),
            max(known.cpus, kind.cpus),
            kind.max_minutes,
        )
    return found


def gpus_of(gres: str) -> int:
    """Count the GPUs in ``gpu:h100:8(S:0-1),nvme:1``."""
    return sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))


def minutes(limit: str) -> int | None:
    """Read ``D-HH:MM:SS``, ``HH:MM:SS``, ``MM:SS`` or ``MM``; None: no limit.

    Raises:
        ValueError: if it is none of them.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", limit)
    if match is None:
        raise ValueError(f"slurm.time={limit}: want MINUTES, HH:MM:SS or D-HH:MM:SS")
    days, hours, middle, last = (int(part or 0) for part in match.groups())
    if match[1] is not None:  # days: the rest is hours[:minutes[:seconds]]
        parts = [int(part) for part in limit.split("-")[1].split(":")]
        return days * 1440 + parts[0] * 60 + (parts[1] if len(parts) > 1 else 0)
    return hours * 60 + middle if ":" in limit else last


def check_site(site: Site, template: str, offered: Mapping[str, Partition]) -> None:
    """Refuse what the cluster does not have.

    Raises:
        ValueError: naming the key to change.
    """
    partition = offered.get(site.partition)
    if partition is None:
        raise ValueError(
            f"slurm.partition={site.partition}: no such partition; there are {', '.join(offered)}"
        )
    wanted = site.options(template)
    where = f"a node of {site.partition}"
    gpus = wanted["gpus-per-node"] or 0
    if gpus > partition.gpus:
        raise ValueError(f"slurm.gpus_per_node={gpus}, but {where} has {partition.gpus}")
    tasks = wanted.get("ntasks-per-node", 1)
    if tasks * site.cpus_per_task > partition.cpus:
        raise ValueError(
            f"slurm.ntasks_per_node={tasks} x slurm.cpus_per_task={site.cpus_per_task} = "
            f"{tasks * site.cpus_per_task} cores, but {where} has {partition.cpus}"
        )
    if template in (*RUNS, "sweep") and site.gpus_per_node not in (0, site.ntasks_per_node):
        raise ValueError(
            f"slurm.ntasks_per_node={site.ntasks_per_node} must be slurm.gpus_per_node="
            f"{site.gpus_per_node}: one task a GPU"
        )
    engines = site.engine_nodes if template == "rl_disaggregated" else 0
    if wanted["nodes"] + engines > partition.nodes:
        more = f" and slurm.engine_nodes={engines}" if engines else ""
        raise ValueError(
            f"slurm.nodes={wanted['nodes']}{more}, but {site.partition} has {partition.nodes}"
        )
    asked, limit = minutes(str(site.time)), partition.max_minutes
    if limit is not None and (asked is None or asked > limit):
        raise ValueError(
            f"slurm.time={site.time} is longer than {site.partition} allows ({limit} minutes)"
        )


def check_disk(folder: Path, min_free_gb: int) -> None:
    """Refuse a disk too full for a checkpoint.

    Raises:
        ValueError: naming the folder and the keys.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / GB
    if free_gb < min_free_gb:
        raise ValueError(
            f"{folder.absolute()} has {free_gb:.0f} GB free, slurm.min_free_gb asks for "
            f"{min_free_gb}: make room, lower it, or set slurm.scratch"
        )
