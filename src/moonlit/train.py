"""Compose the parts named in ``conf/`` and fit them: the composition root of every phase."""

import json
import logging
import shlex
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from moonlit.chat.tokenizer import Tokenizer
from moonlit.distributed.checkpoint import load_weights
from moonlit.distributed.dep import DEPStrategy
from moonlit.distributed.sharded_checkpoint import is_sharded
from moonlit.hub.reader import load_released
from moonlit.models.kimi import Kimi
from moonlit.phases.base import PhaseModule
from moonlit.results import held_out_table, next_commands


@dataclass(slots=True, kw_only=True)
class Run:
    """The three parts that Lightning fits together."""

    phase: PhaseModule
    data: Any
    trainer: lightning.Trainer
    callbacks: dict[str, lightning.Callback]

    @property
    def saved_at(self) -> Path | None:
        """Where the state was saved if a signal has ended the run."""
        interruption: Any = self.callbacks.get("interruption")
        return interruption.path if interruption is not None and interruption.saved else None


def train(cfg: DictConfig) -> None:
    """Fit the phase, score the held-out sets, and say what to try next.

    Raises:
        ValueError: where parts do not fit together, naming the keys.
        FileNotFoundError: for a missing ``init_from`` or ``resume_from``.
    """
    quieten()
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    run = build(cfg)
    run.trainer.fit(run.phase, datamodule=run.data, ckpt_path=cfg.resume_from)
    console = Console(quiet=not run.trainer.is_global_zero)
    if run.saved_at is not None:
        console.print(f"stopped at step {run.trainer.global_step}; go on with:")
        console.print(f"  {resume_command(cfg.run_dir, run.saved_at)}", soft_wrap=True)
        raise SystemExit(130)
    if run.phase.held_out_step != run.trainer.global_step:
        run.trainer.validate(run.phase, datamodule=run.data, verbose=False)
    if run.trainer.is_global_zero:
        save_metrics(run.phase.held_out.metrics(), Path(cfg.run_dir) / "held_out.json")
        console.print(held_out_table(run.phase.held_out, run.data.chance))
        console.print(next_commands(Path(cfg.run_dir), type(run.phase).__name__))


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
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # What a phase logs is summed over ranks before it is logged.
    warnings.filterwarnings("ignore", message="It is recommended to use .*sync_dist=True")


def build(cfg: DictConfig) -> Run:
    """Build every part of the run; nothing is trained yet."""
    for key in ("init_from", "resume_from"):
        if cfg[key] is not None and not Path(cfg[key]).exists():
            raise FileNotFoundError(f"{key}={cfg[key]}: no such checkpoint")
    callbacks = instantiate(cfg.callbacks)
    build_model = instantiate(cfg.model)
    check_vocabulary(cfg.tokenizer, build_model.keywords["decoder"])
    with torch.device("meta"):  # what cannot be built is refused before the corpus is made
        build_model()
    optim = instantiate(cfg.optim)
    trainer = instantiate(
        cfg.trainer,
        strategy=instantiate(cfg.strategy),
        callbacks=list(callbacks.values()),
    )
    phase = instantiate(
        cfg.phase,
        build_model=partial(initialised, build_model, cfg.init_from),
        build_optimizer=optim.optimizer,
        schedule=optim.schedule,
    )
    if isinstance(trainer.strategy, DEPStrategy):
        trainer.strategy.check_layout(
            build_model.keywords["decoder"], samples=phase.samples_from_whole_model
        )
    return Run(
        phase=phase,
        data=instantiate(cfg.data),
        trainer=trainer,
        callbacks=dict(callbacks),
    )


def initialised(build_model: Any, init_from: str | None) -> Kimi:
    """Build the model; with ``init_from``, give it the weights of an earlier phase."""
    model = build_model()
    if init_from is not None:
        path = Path(init_from)
        released = path.is_dir() and not is_sharded(path)
        (load_released if released else load_weights)(model, path)
    return model


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
