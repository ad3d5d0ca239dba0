"""A run goes on from its own phase, optimizer and model; anything else is named and refused."""

from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from micro_run import fit, micro_model, micro_settings

from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.phases.joint_pretraining import JointPretraining
from moonlit.phases.zero_vision_sft import ZeroVisionSFT


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three steps."""
    folder = tmp_path_factory.mktemp("saved")
    fit(max_steps=3, callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)])
    return folder / "last.ckpt"


def wider() -> Kimi:
    shape = micro_model().decoder_shape
    values = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    return Kimi(decoder=type(shape)(**values | {"dense_width": 2 * shape.dense_width}), vision=None)


ADAMW = {"build_optimizer": partial(adamw, lr=1e-3, weight_decay=0.0)}


@pytest.mark.parametrize(
    ("phase", "changes", "max_steps", "told"),
    [
        (ZeroVisionSFT, {}, 6, "phase is JointPretraining, this one's ZeroVisionSFT.*init_from"),
        (JointPretraining, ADAMW, 6, "optim is MuonClip, this one's adamw"),
        (JointPretraining, {"build_model": wider}, 6, r"model.decoder.dense_width is \d+"),
        (JointPretraining, {}, 2, "at step 3, past trainer.max_steps=2"),
    ],
)
def test_what_another_run_wrote_is_refused(
    phase: type[JointPretraining], changes: dict, max_steps: int, told: str, saved: Path
):
    with pytest.raises(ValueError, match=told):
        fit(phase=phase(**micro_settings(**changes)), max_steps=max_steps, resume_from=saved)


def test_its_own_run_goes_on(saved: Path):
    assert fit(max_steps=4, resume_from=saved).global_step == 4
