"""A model that is cut first and filled then starts with the bits of one that is built whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, seed_everything
from micro_run import micro_model
from parallel_run import Outcome, SaveAt, merged, train, whole
from ranks import Ranks

from moonlit.chat.tokenizer import Tokenizer
from moonlit.distributed.initial_model import InitialModel, drawn, require_same_start, shapes_of
from moonlit.hub.writer import save_released
from moonlit.models.kimi import Kimi

CONF = str(Path(__file__).parents[2] / "conf")
LAYOUTS = [{"zero_stage": 1}, {"ep_size": 2}, {"pp_size": 2, "stages_per_rank": 2}]


def builder(*words: str):
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        return instantiate(compose("train", overrides=[*words]).model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_module_by_module_gives_the_bits_of_building(dtype: torch.dtype):
    build = builder("model=tiny")
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(11)
        whole: Kimi = build()
        initial = InitialModel(build, None)
        initial.empty()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(11)
    assert initial.twin is not None
    parts = dict(drawn(initial.twin))
    assert parts.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert parts[name].dtype == tensor.dtype
        assert torch.equal(parts[name], tensor), name
    assert all(p.is_meta for p in initial.twin.parameters())  # no module kept its memory
    assert shapes_of(initial.twin) == shapes_of(whole)


MICRO = micro_model()
SHAPE = replace(  # a release demands as many ids as the embedded tokenizer has
    MICRO.decoder_shape,
    num_layers=4,
    vocab_size=2304,
    media_pad_id=Tokenizer.embedded().special.media_pad_id,
)


def build() -> Kimi:
    return Kimi(decoder=SHAPE, vision=MICRO.vision_shape)


class Start(Callback):
    """Notes the weights before the first step, and what they were when the phase was built."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    def on_train_start(self, trainer, pl_module):
        self.outcome.weights = {k: whole(v) for k, v in pl_module.model.state_dict().items()}


def started(layout: dict[str, int] | None, init_from: str | None, num_ranks: int) -> Outcome:
    start = Start()
    phase = {"build_model": InitialModel(build, init_from)}
    train(
        layout, num_ranks=num_ranks, max_steps=1, text_only=True, callbacks=[start], phase=phase,
        dtype=torch.float32,
    )  # fmt: skip
    return start.outcome


def saved(layout: dict[str, int] | None, path: Path, num_ranks: int) -> None:
    seed_everything(5)
    train(
        layout, num_ranks=num_ranks, max_steps=1, text_only=True, callbacks=[SaveAt(1, path)],
        phase={"build_model": build}, dtype=torch.float32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sources(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """A file, a folder of shards and a release, all of other weights than fresh ones."""
    folder = tmp_path_factory.mktemp("sources")
    two_ranks(saved, {"ep_size": 2}, folder / "shards.ckpt", 2)
    saved(None, folder / "file.ckpt", 1)
    seed_everything(6)
    save_released(build(), Tokenizer.embedded(), folder / "release", dtype=torch.float32)
    return {"fresh": None, **{p.stem: p for p in folder.iterdir()}}


def assert_starts(starts: list[Outcome], source: Path | None) -> None:
    alone = started(None, None if source is None else str(source), 1).weights
    ours = merged(starts).weights
    assert ours.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_ranks_start_with_the_bits_of_one(two_ranks: Ranks, sources, layout: dict[str, int]):
    for source in sources.values():
        path = None if source is None else str(source)
        assert_starts(two_ranks(started, layout, path, 2), source)


def test_four_ranks_start_with_the_bits_of_one(four_ranks: Ranks, sources):
    """Experts are cut twice: over ``ep`` and over ``dp_shard``."""
    for source in sources.values():
        path = None if source is None else str(source)
        assert_starts(four_ranks(started, {"ep_size": 2}, path, 4), source)


def of_one_rank(seed: int) -> str:
    torch.manual_seed(seed + torch.distributed.get_rank())
    initial = InitialModel(build, None)
    initial.empty()
    try:
        require_same_start(initial.identity())
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_of_other_seeds_are_refused(two_ranks: Ranks):
    for answer in two_ranks(of_one_rank, 3):
        assert "the ranks would start from different weights, seed " in answer
