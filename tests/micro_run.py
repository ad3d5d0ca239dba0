"""A model of a few thousand weights, and rows of noise to train it on."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.checkpoint import AtomicCheckpointIO
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape, EncoderShape
from moonlit.optim.muon_clip import MuonClip
from moonlit.optim.schedule import warmup_stable_decay
from moonlit.phases.guard import StepGuard
from moonlit.phases.joint_pretraining import JointPretraining

VOCAB, MEDIA_PAD = 50, 41


def micro_model() -> Kimi:
    return Kimi(
        decoder=DecoderShape(
            vocab_size=VOCAB, media_pad_id=MEDIA_PAD, num_layers=2, num_dense_layers=1,
            model_width=24, dense_width=40, num_experts=4, top_k=2, num_shared_experts=1,
            expert_width=16, routed_scale=1.5, num_heads=2, q_lora_rank=20, kv_lora_rank=12,
            qk_nope_width=8, qk_rope_width=4, v_width=6, max_positions=64,
        ),
        vision=EncoderShape(
            num_layers=1, width=16, mlp_width=28, num_heads=2, table_height=8, table_width=8
        ),
    )  # fmt: skip


def noise_row(
    generator: torch.Generator, lengths: list[int], grids: list[tuple[int, int, int]]
) -> PackedBatch:
    """One row of documents; the first ones begin with a picture each."""
    ids = torch.randint(40, (sum(lengths),), generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for start, (_, height, width) in zip(starts.tolist(), grids, strict=False):
        ids[start : start + height * width // 4] = MEDIA_PAD
    target_ids = ids.roll(-1)
    mask = target_ids != MEDIA_PAD
    mask[starts[1:] - 1] = False
    num_patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randint(256, (num_patches, 3, 14, 14), generator=generator, dtype=torch.uint8)
    return PackedBatch(
        input_ids=ids,
        target_ids=target_ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=starts,
        loss_mask=mask,
        media=PackedMedia(pixel_values=pixels, grid_thw=torch.tensor(grids)) if grids else None,
    )


class NoiseSteps(Dataset):
    """Step i: a row with pictures and a row of text only, of unlike lengths."""

    def __getitem__(self, step: int) -> list[PackedBatch]:
        generator = torch.Generator().manual_seed(step)
        return [
            noise_row(generator, [9, 7, 5], [(1, 2, 4), (2, 4, 2)]),
            noise_row(generator, [11, 3], []),
        ]


class NoiseData(LightningDataModule):
    def __init__(self, change: Callable[[list[PackedBatch]], list[PackedBatch]] | None) -> None:
        super().__init__()
        self.change, self.next_step = change, 0

    def train_dataloader(self) -> DataLoader:
        steps = range(self.next_step, 20)
        return DataLoader(NoiseSteps(), batch_size=None, sampler=Endless(steps))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.change(batch) if self.change else batch

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]


class Endless(Sampler):
    """Has no length: Lightning must not stop a resumed run early."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)


def micro_settings(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "build_model": micro_model,
        "build_optimizer": partial(MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=100.0),
        "schedule": partial(warmup_stable_decay, warmup=0.3, decay=0.3, final_fraction=0.1),
        "trains": ["vision_tower", "mm_projector", "language_model"],
        "max_grad_norm": 1.0,
        "selection_bias_rate": 1e-3,
        "guard": StepGuard(spike_sigmas=6.0, window=50, max_skips_in_a_row=3),
    }
    return settings | changes


def fit(
    *,
    phase: JointPretraining | None = None,
    max_steps: int = 3,
    callbacks: list[Any] | None = None,
    change: Callable[[list[PackedBatch]], list[PackedBatch]] | None = None,
    resume_from: Path | None = None,
    logger: Any = False,
) -> JointPretraining:
    """Train the micro model from seed 0; ``change`` edits the rows of each step."""
    seed_everything(0, verbose=False)
    phase = phase or JointPretraining(**micro_settings())
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, logger=logger, log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks or []),
        enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=callbacks or [], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(phase, datamodule=NoiseData(change), ckpt_path=resume_from)
    return phase


def joined(rows: list[PackedBatch]) -> list[PackedBatch]:
    """The same documents in one row."""
    ends = [0, *torch.tensor([row.num_tokens for row in rows]).cumsum(0).tolist()]
    pictures = [row.media for row in rows if row.media is not None]
    return [
        PackedBatch(
            input_ids=torch.cat([row.input_ids for row in rows]),
            target_ids=torch.cat([row.target_ids for row in rows]),
            position_ids=torch.cat([row.position_ids for row in rows]),
            cu_seqlens=torch.cat(
                [torch.zeros(1, dtype=torch.int64)]
                + [row.cu_seqlens[1:] + end for row, end in zip(rows, ends, strict=False)]
            ),
            loss_mask=torch.cat([row.loss_mask for row in rows]),
            media=PackedMedia(
                pixel_values=torch.cat([p.pixel_values for p in pictures]),
                grid_thw=torch.cat([p.grid_thw for p in pictures]),
            ),
        )
    ]
