"""Compose the parts named in ``conf/`` and fit them: the composition root of every phase."""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from moonlit.chat.tokenizer import Tokenizer
from moonlit.distributed.checkpoint import account_of
from moonlit.distributed.dep import DEPStrategy
from moonlit.distributed.initial_model import InitialModel
from moonlit.distributed.launcher import STOPPED
from moonlit.distributed.sharded_checkpoint import is_sharded
from moonlit.parts import made
from moonlit.phases.base import PhaseModule
from moonlit.phases.joint_pretraining import JointPretraining
from moonlit.results import held_out_table, next_commands
from moonlit.runs.folder import RunFolder
from moonlit.runs.lock import RunLock

AUTO = "auto"


@dataclass(slots=True, kw_only=True)
class Run:
    """The three parts that Lightning fits together."""

    phase: PhaseModule
    data: Any
    trainer: lightning.Trainer
    callbacks: dict[str, lightning.Callback]

    @property
    def was_stopped(self) -> bool:
        """Whether a signal has ended the run."""
        interruption: Any = self.callbacks.get("interruption")
        return interruption is not None and interruption.stopped

    @property
    def saved_at(self) -> Path | None:
        """Where the state was saved last; None without ``callbacks.checkpoint``."""
        checkpoint: Any = self.callbacks.get("checkpoint")
        return None if checkpoint is None else checkpoint.latest


def train(cfg: DictConfig) -> None:
    """Fit the phase, score the held-out sets, and say what to try next.

    Raises:
        ValueError: where parts do not fit together, naming the keys.
        FileNotFoundError: for a missing ``init_from`` or ``resume_from``.
    """
    quieten()
    if cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed}: want at least 0")
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    folder = RunFolder(Path(cfg.run_dir))
    cfg.resume_from = where_to_go_on(cfg, folder)
    run = build(cfg)
    with writing(folder, cfg, run.trainer):
        fit(cfg, run, folder)


def fit(cfg: DictConfig, run: Run, folder: RunFolder) -> None:
    """Train to the end or to a signal, and say what to do next."""
    console = Console(quiet=not run.trainer.is_global_zero, markup=False)
    console.print(f"tensorboard --logdir {cfg.run_dir}", soft_wrap=True, highlight=False)
    if cfg.resume_from is not None:
        console.print(f"going on from {cfg.resume_from}", soft_wrap=True, highlight=False)
    elif cfg.init_from is None and not isinstance(run.phase, JointPretraining):
        warn_once("no init_from: this phase starts from random weights, not from an earlier phase")
    run.trainer.fit(run.phase, datamodule=run.data, ckpt_path=cfg.resume_from)
    if run.was_stopped:
        said = f"stopped at step {run.trainer.global_step}; {how_to_go_on(cfg, run)}"
        console.print(said, soft_wrap=True)
        raise SystemExit(STOPPED)
    if run.phase.held_out_step != run.trainer.global_step:
        run.trainer.validate(run.phase, datamodule=run.data, verbose=False)
    if run.trainer.is_global_zero:
        save_metrics(run.phase.held_out.metrics(), folder.path / "held_out.json")
        if run.data.held_out_names:
            console.print(held_out_table(run.phase.held_out, run.data.chance))
        console.print(next_commands(folder.path, type(run.phase).__name__), soft_wrap=True)
        folder.finish(step=run.trainer.global_step, checkpoint=run.saved_at)


def where_to_go_on(cfg: DictConfig, folder: RunFolder) -> str | None:
    """Return the checkpoint to resume from; ``auto`` is the newest whole one in the run's folder.

    Raises:
        ValueError: for ``auto`` in a folder of another configuration or without a whole
            checkpoint, and for a new run in a folder that holds checkpoints.
    """
    if cfg.resume_from is None:
        folder.require_unused()
    if cfg.resume_from is not None and cfg.resume_from != AUTO:
        say_what_changed(cfg)
    if cfg.resume_from != AUTO:
        return cfg.resume_from
    folder.require_same(configuration_of(cfg))
    newest = folder.newest_whole(warn_once)
    return None if newest is None else str(newest)


def say_what_changed(cfg: DictConfig) -> None:
    """Say in what a run that goes on from a checkpoint differs from the one that wrote it."""
    if cfg.init_from is not None:
        warn_once(f"init_from={cfg.init_from} is not read: all comes from {cfg.resume_from}")
    folder = RunFolder(Path(cfg.resume_from).parent.parent)
    for change in folder.changes(configuration_of(cfg)):
        warn_once(f"{cfg.resume_from}: {change}")


def warn_once(text: str) -> None:
    """Say it on the first rank."""
    if not getattr(rank_zero_only, "rank", 0):
        print(f"moonlit: {text}", file=sys.stderr, flush=True)


def configuration_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration with every value resolved."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return values | {"resume_from": None}


@contextmanager
def writing(folder: RunFolder, cfg: DictConfig, trainer: lightning.Trainer) -> Iterator[None]:
    """Be the one job that writes the run's folder.

    Raises:
        FolderTakenError: naming the job that writes there already.
    """
    if not trainer.is_global_zero:
        yield
        return
    lock = RunLock(folder.path)
    lock.take()
    try:
        folder.record(configuration_of(cfg))
        yield
    finally:
        lock.release()


def how_to_go_on(cfg: DictConfig, run: Run) -> str:
    """Say how to go on after a signal."""
    if "SLURM_JOB_ID" in os.environ and run.saved_at is not None:
        return f"saved {run.saved_at}, from where this job goes on when it runs again"
    if run.saved_at is None:
        return "nothing was saved: there is no callbacks.checkpoint"
    return f"go on with:\n  {resume_command(cfg.run_dir, run.saved_at)}"


def resume_command(run_dir: str, saved_at: Path) -> str:
    """Return the command that goes on with this run: its own words, its folder, its state."""
    said = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = [
        word for word in said if not word.startswith(("run_dir=", "init_from=", "resume_from="))
    ]
    return shlex.join(["moonlit", "train", *kept, f"run_dir={run_dir}", f"resume_from={saved_at}"])


def save_metrics(metrics: dict[str, float], path: Path) -> None:
    """Write the held-out scores beside the checkpoints, for programs to read."""
    path.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")


def quieten() -> None:
    """Leave Lightning's warnings, drop its tips and a deprecation it has yet to mend itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # What a phase logs is summed over ranks before it is logged.
    warnings.filterwarnings("ignore", message="It is recommended to use .*sync_dist=True")
    # A corpus without held-out sets is no oversight: data.held_out names what is scored.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # A machine with SLURM is no reason to use it; and a short run shows its last step anyway.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than")


def build(cfg: DictConfig) -> Run:
    """Build every part of the run; nothing is trained yet."""
    for key in ("init_from", "resume_from"):
        if cfg[key] is not None and not Path(cfg[key]).exists():
            raise FileNotFoundError(f"{key}={cfg[key]}: no such checkpoint")
    callbacks = made(cfg.callbacks)
    build_model = made(cfg.model)
    check_vocabulary(cfg.tokenizer, build_model.keywords["decoder"])
    if cfg.init_from is not None and (Path(cfg.init_from).is_file() or is_sharded(cfg.init_from)):
        check_same_tokenizer(cfg.tokenizer, cfg.init_from)
    with torch.device("meta"):  # what cannot be built is refused before the corpus is made
        build_model()
    optim = made(cfg.optim)
    trainer = made(
        cfg.trainer,
        strategy=made(cfg.strategy),
        callbacks=list(callbacks.values()),
    )
    phase = made(
        cfg.phase,
        build_model=InitialModel(build_model, cfg.init_from),
        build_optimizer=optim["optimizer"],
        schedule=optim["schedule"],
    )
    if isinstance(trainer.strategy, DEPStrategy):
        trainer.strategy.check_layout(
            build_model.keywords["decoder"], samples=phase.samples_from_whole_model
        )
    return Run(
        phase=phase,
        data=made(cfg.data),
        trainer=trainer,
        callbacks=dict(callbacks),
    )


def check_same_tokenizer(tokenizer: str, init_from: str) -> None:
    """Refuse weights that were trained with another tokenizer of the same size."""
    wrote = account_of(init_from).get("made_by", {}).get("tokenizer")
    if wrote not in (None, Tokenizer.named(tokenizer).digest):
        raise ValueError(
            f"init_from={init_from} was trained with another tokenizer than tokenizer={tokenizer}: "
            "name the one that it was trained with"
        )


def check_vocabulary(tokenizer: str, decoder: Any) -> None:
    """Refuse a tokenizer whose ids do not fit the model's embedding or its media placeholder."""
    ids = Tokenizer.named(tokenizer)
    if ids.vocab_size != decoder.vocab_size:
        raise ValueError(
            f"tokenizer={tokenizer} has {ids.vocab_size} ids, but the model's vocab_size is "
            f"{decoder.vocab_size}: pick a model of that vocabulary, or the model's own tokenizer"
        )
    if ids.special.media_pad_id != decoder.media_pad_id:
        raise ValueError(
            f"tokenizer={tokenizer} marks vision tokens with id {ids.special.media_pad_id}, the "
            f"model with media_pad_id={decoder.media_pad_id}"
        )
