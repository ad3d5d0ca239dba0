"""Compose a SLURM job, or the chain of a pipeline, check it, and queue it."""

import shlex
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from moonlit.jobs.job import Job
from moonlit.jobs.pipeline import Stage, is_finished, submit_chain, words_of
from moonlit.jobs.preflight import check_disk, check_site, partitions
from moonlit.jobs.script import ENVIRONMENT, RUNS, TEMPLATES, Site
from moonlit.runs.folder import RunFolder

OWN = ("slurm", "pipeline", "template", "name", "dry_run", "array")
COMPOSED = {
    "train": "train", "rl_disaggregated": "train", "sweep": "train", "prepare": "prepare",
    "evaluate": "eval",
}  # fmt: skip
"""Template -> the configuration that its words override."""


def submit(words: Sequence[str], *, conf: Path, slurm: Path) -> None:
    """Submit what the words ask for, or print it with ``dry_run``.

    Args:
        words: of the command line; those of ``conf/submit.yaml`` are the submission's, all others
            the job's.
        conf: folder of the configuration.
        slurm: folder of the templates.

    Raises:
        ValueError: for what the cluster or the model cannot do, naming the key to change.
        FileNotFoundError: for a missing ``init_from``.
    """
    own = [word for word in words if word.partition("=")[0].split(".")[0].lstrip("+~") in OWN]
    said = [word for word in words if word not in own]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        cfg = compose("submit", overrides=own)
        site = site_of(cfg)
        if cfg.template not in TEMPLATES or not (slurm / ENVIRONMENT).is_file():
            raise ValueError(f"template={cfg.template}: want one of {', '.join(TEMPLATES)}")
        if cfg.get("pipeline") is None:
            submit_one(cfg, site, said, slurm)
        else:
            submit_pipeline(cfg, site, said, slurm)


def site_of(cfg: DictConfig) -> Site:
    """Return the cluster's part of the configuration.

    Raises:
        ValueError: if nobody has said what cluster this is.
    """
    if OmegaConf.missing_keys(cfg):
        raise ValueError(
            "say slurm.partition=NAME, or copy conf/slurm/site.yaml, edit it, and say slurm=FILE"
        )
    values: Any = OmegaConf.to_container(cfg.slurm, resolve=True)
    return Site(**values)


def submit_one(cfg: DictConfig, site: Site, said: Sequence[str], slurm: Path) -> None:
    """Submit one job, or one job array."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(said_for("run_dir", said) or Path(site.scratch or ".") / f"runs/{cfg.name}_{now}")
    job = job_for(cfg, site, cfg.template, folder, said, slurm)
    check(job, pending=())
    if cfg.dry_run:
        print_job(job, ())
        return
    print_following(job, job.submit())


def submit_pipeline(cfg: DictConfig, site: Site, said: Sequence[str], slurm: Path) -> None:
    """Submit the stages that have not finished, each behind those that it needs."""
    stages = [Stage.read(value) for value in OmegaConf.to_container(cfg.pipeline.stages)]  # pyright: ignore
    root = Path(said_for("run_dir", said) or Path(site.scratch or ".") / f"runs/{cfg.name}")
    root = root.absolute()
    said = [word for word in said if not word.startswith("run_dir=")]
    names = [stage.name for stage in stages]

    def folder_of(name: str) -> Path:
        return root / f"{names.index(name) + 1}_{name}"

    def job_of(stage: Stage) -> Job:
        words = words_of(stage, said, names)
        if stage.source is not None:
            words.append(f"init_from={folder_of(stage.source) / 'checkpoints' / 'last.ckpt'}")
        return job_for(
            cfg, site, stage.template, folder_of(stage.name), words, slurm, name=stage.name
        )

    for stage in stages:  # all are looked at before the first is queued
        job = job_of(stage)
        if not is_finished(stage, job) and job.queued() is None:
            check(job, pending=[folder_of(name) for name in names])
    dry: list[Job] = []

    def queue(job: Job, after: list[str]) -> str:
        if not cfg.dry_run:
            return job.submit(after)
        print_job(job, after)
        dry.append(job)
        return f"<{job.name}>"

    write = partial(Console(markup=False).print, highlight=False, soft_wrap=True)
    for queued in submit_chain(stages, job_of, submit=queue):
        number = "" if queued.job is None else f" as job {queued.job}"
        state = f"would be {queued.state}" if cfg.dry_run else queued.state
        write(f"{queued.stage}: {state}{number}")
    if not cfg.dry_run:
        lines = [f"tensorboard --logdir {root}", "squeue --me", f"tail -F {root}/*/slurm/*.out"]
        write("\n".join(f"  {line}" for line in lines))


def job_for(
    cfg: DictConfig,
    site: Site,
    template: str,
    folder: Path,
    said: Sequence[str],
    slurm: Path,
    name: str | None = None,
) -> Job:
    """Put a job together from the words for it."""
    words = list(said)
    overrides = words[1:] if template == "sweep" else words
    if template in (*RUNS, "sweep"):
        if not site.gpus_per_node and said_for("trainer", overrides) is None:
            words.append("trainer=cpu")
        if template in RUNS and said_for("run_dir", overrides) is None:
            words.append(f"run_dir={folder.absolute()}")
    if template == "evaluate" and not site.gpus_per_node:
        words.append("device=cpu")
    composed = composed_for(template, words, site)
    return Job(
        name=name or cfg.name,
        template=slurm / f"{template}.sbatch",
        folder=folder,
        words=words,
        site=site,
        configuration=OmegaConf.to_yaml(composed),
        array=None if cfg.get("pipeline") is not None else cfg.array,
    )


def composed_for(template: str, words: Sequence[str], site: Site) -> DictConfig:
    """Return what a job's words mean, with what its template adds to them."""
    said = [word for word in words if "=" in word and not word.startswith("hydra")]
    return compose(COMPOSED[template], overrides=[*said, *added(template, said, site)])


def added(template: str, said: Sequence[str], site: Site) -> list[str]:
    """Return the words that a template adds to those of its job."""
    if COMPOSED[template] != "train":
        return []
    own = {"trainer": "gpu", "resume_from": "auto"}
    if site.nodes * site.ntasks_per_node > 1:
        own["strategy"] = "dep"
    words = [f"{key}={value}" for key, value in own.items() if said_for(key, said) is None]
    words += [f"trainer.num_nodes={site.nodes}", f"trainer.devices={site.ntasks_per_node}"]
    words.append("callbacks.progress.line_every_s=60")
    if template == "rl_disaggregated":
        words.append("engine@phase.build_engine=remote")
    return words


def said_for(key: str, words: Sequence[str]) -> str | None:
    """Return the last value that the words give a key."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return values[-1] if values else None


def check(job: Job, pending: Sequence[Path]) -> None:
    """Refuse what can be seen to fail.

    Args:
        job: what is to be submitted.
        pending: folders that jobs before it will fill.

    Raises:
        ValueError: naming the key to change.
        FileNotFoundError: for a missing ``init_from``.
    """
    template = job.template.stem
    check_site(job.site, template, partitions())
    check_disk(Path(job.site.scratch or "."), job.site.min_free_gb)
    if (number := job.queued()) is not None:
        raise ValueError(
            f"run_dir={job.folder}: job {number} is queued for it or runs there; scancel it first, "
            "or take another run_dir"
        )
    if template == "evaluate":
        require_checkpoints([said_for("ckpt", job.words)], pending)
    if template == "sweep":
        check_sweep(job)
    if COMPOSED[template] != "train":
        return
    cfg = composed_for(template, job.words, job.site)
    require_checkpoints([cfg.init_from], pending)
    check_layout(cfg, job.site)
    folder = RunFolder(job.folder)
    if template in RUNS and folder.saved() and said_for("resume_from", job.words) is None:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
        folder.require_same(values | {"resume_from": None})
        if folder.is_finished:
            raise ValueError(f"run_dir={job.folder}: this run has finished; take another run_dir")


def require_checkpoints(paths: Sequence[str | None], pending: Sequence[Path]) -> None:
    """Refuse a checkpoint that is not there and that no job before this one will write.

    Raises:
        FileNotFoundError: naming it.
    """
    for path in (Path(path) for path in paths if path is not None):
        comes = any(path.is_relative_to(folder) for folder in pending)
        if not comes and not path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint")


def check_sweep(job: Job) -> None:
    """Refuse a sweep that is no array, or whose file is not there.

    Raises:
        ValueError: with the words to say.
    """
    file = Path(job.words[0]) if job.words else None
    if file is None or not file.is_file():
        raise ValueError(f"template=sweep: the first word is the file of overrides, got {file}")
    if job.array is None:
        num_lines = len(file.read_text().splitlines())
        raise ValueError(f"template=sweep: say array=1-{num_lines}, a task for each line of {file}")


def check_layout(cfg: DictConfig, site: Site) -> None:
    """Refuse a layout that does not fit the processes or the model, before any is started.

    Raises:
        ValueError: with the sum that does not work.
    """
    world = site.nodes * site.ntasks_per_node
    sizes = cfg.strategy if "pp_size" in cfg.strategy else None
    if sizes is None:
        return
    from moonlit.distributed.mesh import MeshSizes  # torch: only where it is needed
    from moonlit.parts import made

    MeshSizes.for_world(
        world,
        pp=sizes.pp_size,
        dp_replicate=sizes.dp_replicate_size,
        dp_shard=sizes.dp_shard_size,
        ep=sizes.ep_size,
    ).check_model(made(cfg.model.decoder))


def print_job(job: Job, after: Sequence[str]) -> None:
    """Print what would be submitted."""
    write = partial(Console(markup=False).print, highlight=False, soft_wrap=True)
    write(f"# {job.papers / 'configuration.yaml'}\n{job.configuration}")
    write(f"# {job.papers / job.template.name}\n{job.script}")
    write(f"# would be submitted by\n{shlex.join(job.command(after))}\n")


def print_following(job: Job, number: str) -> None:
    """Print the job's id and how to follow it."""
    write = partial(Console(markup=False).print, highlight=False, soft_wrap=True)
    write(f"submitted job {number}; its script lies in {job.papers}")
    lines = [
        f"squeue --jobs={number}",
        f"tail -F {job.papers}/{job.name}_{number}.out",
        f"tensorboard --logdir {job.folder}",
        f"scancel --signal=USR1 --batch {number}   # save, and queue again",
        f"scancel {number}   # save, and end",
    ]
    write("\n".join(f"  {line}" for line in lines))
