"""``moonlit <command> [overrides]``: one command for each thing a person does."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from moonlit.help import help_text
from moonlit.parts import made
from moonlit.refusal import said_plainly

COMMANDS = {
    "train": "fit a phase: moonlit train phase=joint_pretraining model=tiny trainer.max_steps=300",
    "prepare": "make a corpus and its index: moonlit prepare data=embedded_world",
    "info": "parameters, FLOPs and cache of a model: moonlit info model=kimi_k2_5",
    "chat": "talk to a model: moonlit chat ckpt=PATH image=photo.png prompt='What is this?'",
    "eval": "answer held-out tasks by generation: moonlit eval ckpt=PATH",
    "rejection_sampling": "keep right answers: moonlit rejection_sampling ckpt=PATH out=FOLDER",
    "report": "one HTML page of curves and rollouts: moonlit report run=runs/A",
    "serve": "an engine server that trainers elsewhere sample from: moonlit serve model=tiny",
    "submit": "queue a SLURM job: moonlit submit phase=visual_rl slurm.nodes=2 --dry-run",
    "export": "write the released layout: moonlit export ckpt=PATH out=FOLDER",
}


def main() -> None:
    """Run one command; what a user can mend ends in one line and a non-zero exit."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: moonlit <command> [overrides]\n")
        print("\n".join(f"  {name:8} {line}" for name, line in COMMANDS.items()))
        print("\nmoonlit <command> --help lists what can be overridden.")
        raise SystemExit(0)
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        fail(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    sys.argv[0] = f"moonlit {name}"
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{COMMANDS[name]}\n\n{help_text(name, conf_folder())}")
        return
    if name == "submit":
        with_clear_errors(submit)(sys.argv[1:])
        return
    if name == "report":  # to Hydra experiment= is a group, whose files belong to train
        sys.argv[1:] = [word.replace("experiment=", "arms=", 1) if word.startswith("experiment=")
                        else word for word in sys.argv[1:]]  # fmt: skip
    sys.argv[1:] = map(quoted_words, sys.argv[1:])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what is wrong, instead of printing it
    command = with_clear_errors(globals()[name])
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)(command)()
    except HydraException as error:
        fail(said_plainly(error))
    except OSError as error:  # the command's own are told by with_clear_errors
        fail(f"the run's folder cannot be made: {error}")
    except KeyboardInterrupt:
        fail("interrupted", status=130)


def quoted_words(override: str) -> str:
    """Quote what a person says (``prompt=``, ``system=``) for Hydra, which would read commas."""
    key, is_set, value = override.partition("=")
    if not is_set or key not in ("prompt", "system") or value in ("null", ""):
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def conf_folder() -> Path:
    """Return ``conf/``: beside ``src`` in a checkout, inside the package in a wheel."""
    return top_folder("conf")


def top_folder(name: str) -> Path:
    """Return a folder that lies beside ``src`` in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parents[1]
    return (checkout if (checkout / "conf/train.yaml").is_file() else package) / name


BEFORE_A_RUN = {".hydra", "configuration.json"}
"""What a run's folder holds before anything is trained."""
MENDABLE = (OSError, ValueError, RuntimeError, OmegaConfBaseException)


def with_clear_errors(command: Callable[[Any], None]) -> Callable[[Any], None]:
    """Print the message of an error a user can mend; MOONLIT_TRACEBACK=1 shows where it arose."""

    def run(cfg: Any) -> None:
        try:
            command(cfg)
        except KeyboardInterrupt:
            kept = ": the same command goes on with what is finished"
            fail(f"interrupted{kept if command.__name__ == 'prepare' else ''}", status=130)
        except HydraException as error:
            if os.environ.get("MOONLIT_TRACEBACK"):
                raise
            if not isinstance(error, InstantiationException):
                fail(said_plainly(error))
            fail(f"{error.__cause__ or error}\n(MOONLIT_TRACEBACK=1 shows where)")
        except MENDABLE as error:
            if os.environ.get("MOONLIT_TRACEBACK"):
                raise
            fail(f"{error}\n(MOONLIT_TRACEBACK=1 shows where)")

    run.__name__ = command.__name__
    return run


def fail(message: str, status: int = 1) -> None:
    """Say what is wrong on standard error and end with ``status``."""
    Console(stderr=True, markup=False).print(
        f"moonlit: {message}", style="red", markup=False, soft_wrap=True
    )
    raise SystemExit(status)


def train(cfg: DictConfig) -> None:
    """Fit a phase."""
    try:
        require_files(cfg, "init_from")
        from moonlit.train import train as fit

        fit(cfg)
    except Exception:
        remove_unused(Path(cfg.run_dir))
        raise


def prepare(cfg: DictConfig) -> None:
    """Make the corpus of a data group, or the files of a source; or report on a plan."""
    if not cfg.report:
        made(cfg.source if "source" in cfg else cfg.data).prepare_data()
        return
    if "corpora" not in cfg.data._target_:
        raise ValueError("report=true counts what a plan of data=corpora holds: add data=corpora")
    counts, longest = made(cfg.data).report()
    console = Console(markup=False)
    for table in counts.tables():
        console.print(table)
    console.print(f"the sources last {longest:,} steps: each at most max_epochs times, or once")


def info(cfg: DictConfig) -> None:
    """Print what a model costs, built on the meta device."""
    import torch

    from moonlit.commands.info import cost_tables

    with torch.device("meta"):
        model = made(cfg.model)()
    Console(markup=False).print(cost_tables(model, seq_len=cfg.seq_len))


def chat(cfg: DictConfig) -> None:
    """Talk to a checkpoint: one question where there is a prompt, else as many as a person asks."""
    require_files(cfg, "ckpt", "image")
    from moonlit.commands.talk import chat as talk

    talk(settings_of(cfg))


def eval(cfg: DictConfig) -> None:
    """Answer held-out tasks by generation; print a table by set and write everything as JSON."""
    require_files(cfg, "ckpt")
    from moonlit.commands.evaluation import evaluate_checkpoint

    settings = settings_of(cfg)
    evaluate_checkpoint(made(cfg.data), made(cfg.judge), settings)


def rejection_sampling(cfg: DictConfig) -> None:
    """Sample answers to training tasks; keep the right ones as dialogues to learn from."""
    require_files(cfg, "ckpt")
    from moonlit.commands.rejection_set import make_set

    settings = settings_of(cfg)
    make_set(made(cfg.data), made(cfg.judge), settings)


def report(cfg: DictConfig) -> None:
    """Draw a run's curves and rollouts, or an experiment's arms, on one HTML page."""
    if cfg.arms is not None:
        report_arms(cfg)
        return
    require_files(cfg, "run")
    from moonlit.report.page import write_page

    settings = settings_of(cfg)
    run = Path(settings["run"])
    out = Path(settings["out"] or run / "report.html")
    print(write_page(run, out, max_rollouts=settings["max_rollouts"]))
    print(f"wrote {out}")


def report_arms(cfg: DictConfig) -> None:
    """Compare the arms of an experiment on one HTML page; print the tables."""
    from moonlit.report.parl_facts import write_comparison

    if cfg.arms != "parl_facts":
        raise ValueError(f"experiment={cfg.arms}: the arms of parl_facts can be compared")
    folder = Path("runs") / cfg.arms if OmegaConf.is_missing(cfg, "run") else Path(cfg.run)
    out = Path(cfg.out or folder / "report.html")
    print(write_comparison(folder, out))
    print(f"wrote {out} and {out.with_suffix('.svg')}")


def serve(cfg: DictConfig) -> None:
    """Serve an engine until a signal ends it."""
    from moonlit.commands.engine_server import serve_engine

    serve_engine(made(cfg.model), settings_of(cfg))


def submit(words: list[str]) -> None:
    """Queue a SLURM job, or a pipeline's chain; ``--dry-run`` prints it."""
    from moonlit.submit import submit as submit_words

    said = ["dry_run=true" if word == "--dry-run" else word for word in words]
    submit_words(said, conf=conf_folder(), slurm=top_folder("slurm"))


def remove_unused(run_dir: Path) -> None:
    """Remove the folder of a run that was refused before it began."""
    if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= BEFORE_A_RUN:
        shutil.rmtree(run_dir)


def require_files(cfg: DictConfig, *keys: str) -> None:
    """Refuse a path at which there is nothing, before what works on it is imported.

    Raises:
        FileNotFoundError: naming key and path.
        ValueError: if there is no path where one is needed.
    """
    if missing := sorted(key for key in keys if OmegaConf.is_missing(cfg, key) or cfg[key] == ""):
        raise ValueError(f"say {' and '.join(f'{key}=...' for key in missing)}")
    for key in keys:
        said = cfg[key] if OmegaConf.is_list(cfg[key]) else [cfg[key]]
        for path in said:
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"{key}={path}: there is nothing at this path")


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return a command's own values, without its groups; ask for what has no default."""
    if missing := OmegaConf.missing_keys(cfg):
        raise ValueError(f"say {' and '.join(f'{key}=...' for key in sorted(missing))}")
    return {
        str(key): OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in cfg
        if key not in ("data", "model", "judge")
    }


def export(cfg: DictConfig) -> None:
    """Write a checkpoint as a folder in the released layout."""
    require_files(cfg, "ckpt")
    import torch

    from moonlit.chat.tokenizer import Tokenizer
    from moonlit.distributed.checkpoint import stored_model
    from moonlit.hub.writer import save_released

    settings_of(cfg)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if cfg.dtype not in dtypes:
        raise ValueError(f"dtype={cfg.dtype}: want one of {', '.join(dtypes)}")
    model, weights = stored_model(Path(cfg.ckpt))
    save_released(
        model,
        Tokenizer.named(cfg.tokenizer),
        Path(cfg.out),
        max_shard_bytes=int(cfg.max_shard_gb * 1e9),
        int4_experts=cfg.int4_experts,
        dtype=dtypes[cfg.dtype],
        weights=weights,
    )
    print(f"wrote {cfg.out}")
