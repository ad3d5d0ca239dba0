"""The micro model on a prepared corpus, stopped or killed at a step, and gone on with."""

import base64
import io
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import time
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer, seed_everything
from micro_run import micro_model, micro_settings
from parallel_run import SaveAt, strategy
from PIL import Image

from data_modules.components.chunk_cache import CacheSettings
from data_modules.components.stream import PlannedLoader, PlannedSteps
from data_modules.corpora import Corpora
from data_modules.sources.json_lines import JSONLines
from data_modules.sources.prepare import PrepareSource
from moonlit.batch import PackedBatch
from moonlit.chat.tokenizer import Tokenizer
from moonlit.distributed.checkpoint import AtomicCheckpointIO
from moonlit.distributed.sharded_checkpoint import is_sharded
from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.phases.joint_pretraining import JointPretraining

NUM_STEPS = 8
NUM_TEXTS, NUM_PICTURES = 16, 20  # both begin another epoch within the run


def make_sources(folder: Path) -> None:
    """Prepare texts, and pictures of 4 vision tokens with a caption."""
    texts = [{"text": " ".join(f"word{n * k % 17}" for k in range(12))} for n in range(NUM_TEXTS)]
    pictures = []
    for n in range(NUM_PICTURES):
        file = io.BytesIO()
        Image.new("RGB", (50, 45), (12 * n, 255 - 12 * n, 7)).save(file, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        pictures.append({"parts": [{"image": uri}, {"text": f"shade {n}"}]})
    for name, rows in (("texts", texts), ("pictures", pictures)):
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader = JSONLines(
            files=str(lines), media_folder=None, columns={}, shard_bytes=1500,
            max_document_bytes=10**6,
        )  # fmt: skip
        PrepareSource(
            folder=str(folder / name), reader=reader, tokenizer="embedded",
            max_document_tokens=64, sound=False, num_processes=1,
        ).prepare_data()  # fmt: skip


def corpora(folder: Path, num_workers: int = 0, **changes: Any) -> Corpora:
    settings: dict[str, Any] = {
        "data_dir": str(folder), "tokenizer": "embedded", "seed": 5,
        "sources": {"texts": str(folder / "texts"), "pictures": str(folder / "pictures")},
        "held_out": [], "row_tokens": 64, "rows_per_step": 4, "num_steps": NUM_STEPS,
        "vision_share": 0.1, "text_mixture": {"texts": 1}, "vision_mixture": {"pictures": 1},
        "max_epochs": {}, "schedule": {6: {"rows_per_step": 8}}, "max_held_out": 0,
        "accept_changed_plan": False, "num_workers": num_workers, "max_corrupt_fraction": 0.0,
        "cache": CacheSettings(
            folder=str(folder / "cache"), max_bytes=10**9, max_requests_per_s=99.0,
            max_attempts=1, first_pause_s=0.0,
        ),
    }  # fmt: skip
    return Corpora(**settings | changes)


def digest_of(rows: list[PackedBatch]) -> list[int]:
    """One number a row that any change of it changes."""
    numbers = []
    for row in rows:
        pixels = row.media.pixel_values.numpy().tobytes() if row.media else b""
        parts = (row.input_ids, row.target_ids, row.loss_mask, row.cu_seqlens)
        whole = b"".join([*(part.numpy().tobytes() for part in parts), pixels])
        numbers.append(zlib.crc32(whole))
    return numbers


def rows_from(data: Corpora, next_step: int, num_ranks: int) -> list[list[int]]:
    """Digests of every row of each remaining step, put together from what the ranks read."""
    ranks = []
    for rank in range(num_ranks):
        steps = PlannedSteps(data.corpus, data.plan, rank=rank, num_ranks=num_ranks, filler_id=0)
        loader = PlannedLoader(steps, num_workers=data.num_workers, max_corrupt_documents=0.0)
        loader.next_step = next_step
        ranks.append([digest_of(rows) for rows in loader])
    return [list(chain.from_iterable(zip(*step, strict=True))) for step in zip(*ranks, strict=True)]


@dataclass
class Story:
    """What one rank saw and learnt, step by step."""

    rows: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Tell(Callback):
    def __init__(self) -> None:
        self.story = Story()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.story.rows.append(digest_of(batch))
        self.story.losses.append(trainer.callback_metrics["train/nll_per_token"].item())


class StopAt(Callback):
    """Ends the run behind a checkpoint; ``max_steps`` stays, for the schedule hangs on it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


class KillAt(Callback):
    """Ends the process without a word, some steps behind a checkpoint that is whole."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            while not (self.checkpoint.is_file() or is_sharded(self.checkpoint)):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)


def model() -> Kimi:
    micro, special = micro_model(), Tokenizer.embedded().special
    seed_everything(0, verbose=False)
    decoder = replace(micro.decoder_shape, vocab_size=2304, media_pad_id=special.media_pad_id)
    return Kimi(decoder=decoder, vision=micro.vision_shape, experts="reference").double()


def run(
    folder: Path,
    *,
    num_ranks: int,
    num_workers: int,
    save_at: int | None = None,
    path: Path | None = None,
    killed: bool = False,
    resume: bool = False,
) -> Story:
    """Train; stop at ``save_at``, or be killed a step later; or go on from what was saved."""
    # Ranks are daemons, so that none outlives a test; loader workers may have no such parent.
    multiprocessing.process.current_process()._config["daemon"] = False  # pyright: ignore
    seed_everything(0, verbose=False)
    built = {"build_model": model, "build_optimizer": partial(adamw, lr=0.01, weight_decay=0.1)}
    tell = Tell()
    callbacks: list[Callback] = [tell]
    if save_at is not None and path is not None:
        callbacks.append(SaveAt(save_at, path))
        callbacks.append(KillAt(save_at + 1, path) if killed else StopAt(save_at))
    trainer = Trainer(
        accelerator="cpu", devices=num_ranks,
        strategy="auto" if num_ranks == 1 else strategy(),
        plugins=[AtomicCheckpointIO()] if num_ranks == 1 else None,
        max_steps=NUM_STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(
        JointPretraining(**micro_settings(**built)),
        datamodule=corpora(folder, num_workers),
        ckpt_path=path if resume else None,
    )
    return tell.story
