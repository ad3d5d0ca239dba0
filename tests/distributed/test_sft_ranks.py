"""Zero-vision SFT on many ranks: text-only rows for a model with an encoder, as on one process."""

from functools import cache, partial

import pytest
import torch
from lightning import Trainer, seed_everything
from micro_run import micro_settings
from parallel_run import NUM_STEPS, Outcome, Record, StepRows, exact_model, strategy, whole
from ranks import Ranks

from moonlit.optim.muon_clip import MuonClip
from moonlit.phases.zero_vision_sft import ZeroVisionSFT
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.engines.sync import logprob_gap, trainer_logprobs

ENCODER = ("vision_tower.", "mm_projector.")


def train_sft(
    num_ranks: int | None, encoder: str = "decoupled", ep_size: int = 1
) -> tuple[Outcome, float]:
    """Fine-tune; then copy the sharded weights into an engine of this rank's own."""
    seed_everything(0, verbose=False)
    phase = ZeroVisionSFT(
        **micro_settings(
            build_model=partial(exact_model, torch.float64),
            build_optimizer=partial(MuonClip, lr=0.01, weight_decay=0.1, qk_clip_threshold=0.01),
            trains=["language_model"],
        )
    )
    record = Record()
    trainer = Trainer(
        accelerator="cpu", devices=num_ranks or 1,
        strategy=strategy(encoder=encoder, ep_size=ep_size) if num_ranks else "auto",
        max_steps=NUM_STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[record],
    )  # fmt: skip
    trainer.fit(phase, datamodule=StepRows(text_only=True))
    return record.outcome, engine_gap(phase) if num_ranks else 0.0


def engine_gap(phase: ZeroVisionSFT) -> float:
    """Largest difference of the probe's log-probs between this rank's engine and the shards."""
    engine = NativeEngine.copy_of(phase.model)
    try:
        return logprob_gap(
            engine.runner, trainer_logprobs(phase.model, engine.probe.prompts), engine.probe
        )
    finally:
        engine.close()


@cache
def alone() -> Outcome:
    return train_sft(None)[0]


def assert_as_alone(answers: list[tuple[Outcome, float]]) -> None:
    before = {name: whole(p) for name, p in exact_model(torch.float64).state_dict().items()}
    for ours, gap in answers:
        for name, expected in alone().weights.items():
            torch.testing.assert_close(
                ours.weights[name], expected, rtol=1e-5, atol=1e-5, msg=f"weight {name}"
            )
            if name.removeprefix("model.").startswith(ENCODER):
                assert torch.equal(ours.weights[name], before[name.removeprefix("model.")]), name
        assert gap < 1e-4


@pytest.mark.parametrize(
    ("encoder", "ep_size"), [("decoupled", 1), ("inline", 1), ("decoupled", 2)]
)
def test_two_ranks_fine_tune_as_one_process_and_each_can_sample(
    two_ranks: Ranks, encoder: str, ep_size: int
):
    """Catches: a collective that only rows with media join, and an engine copied from one shard."""
    assert_as_alone(two_ranks(train_sft, 2, encoder, ep_size))


@pytest.mark.slow
def test_four_ranks_too(four_ranks: Ranks):
    assert_as_alone(four_ranks(train_sft, 4))
