"""``moonlit prepare source=...`` and ``moonlit train data=corpora``, as a person says them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from files import json_lines, picture, tar
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from moonlit import cli

CONF = Path(__file__).parents[2] / "conf"
KINDS = ["webdataset", "jsonl", "parquet", "captioned_folder", "datasets_folder"]


def prepare(*overrides: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("prepare", overrides=list(overrides))
    cli.prepare(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("command")
    texts = [{"text": f"number {n} " * 9} for n in range(40)]
    json_lines(folder / "texts.jsonl", texts)
    pairs = {f"{n:02d}.{e}": d for n in range(20) for e, d in (("jpg", picture(9)), ("txt", b"x"))}
    tar(folder / "pairs-0.tar", pairs)
    prepare(
        "source=jsonl", f"source.reader.files={folder}/texts.jsonl",
        f"source.folder={folder}/texts", "source.num_processes=1",
    )  # fmt: skip
    prepare(
        "source=webdataset", f"source.reader.files='{folder}/pairs-{{0..0}}.tar'",
        f"source.folder={folder}/pairs", "source.num_processes=1",
    )  # fmt: skip
    return folder


def corpora(folder: Path, *overrides: str) -> list[str]:
    return [
        "data=corpora", f"data.data_dir={folder}", f"data.cache.folder={folder}/cache",
        f"data.sources={{texts: {folder}/texts, pairs: {folder}/pairs}}",
        "data.text_mixture={texts: 1}",
        "data.vision_mixture={all: {share: 1, of: {pairs: 1}}}",
        "data.row_tokens=128", *overrides,
    ]  # fmt: skip


def test_the_report_says_shares_lengths_balance_and_steps(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    prepare("report=true", *corpora(folder, "data.schedule={3: {rows_per_step: 8}}"))
    said = capfd.readouterr().out
    for words in ("texts", "pairs", "vision share", "busiest of 2 ranks", "the sources last"):
        assert words in said


def test_the_report_refuses_a_mixture_that_cannot_be_met(folder: Path):
    with pytest.raises(ValueError, match=r"asks for 60\.0% vision tokens .* only \d"):
        prepare("report=true", *corpora(folder, "data.vision_share=0.6"))
    with pytest.raises(ValueError, match=r"max_epochs\.texts=0\.5"):
        prepare("report=true", *corpora(folder, "data.max_epochs={texts: 0.5}", "data.num_steps=9"))
    with pytest.raises(ValueError, match="add data=corpora"):
        prepare("report=true")


def test_a_step_is_trained_on_prepared_sources(folder: Path, tmp_path: Path):
    from moonlit.train import train

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg: Any = compose("train", overrides=[
            *corpora(folder), "debug=one_step", "data.num_workers=0", f"run_dir={tmp_path}/run",
            "data.held_out=[]",
        ])  # fmt: skip
    train(cfg)
    assert (tmp_path / "run" / "held_out.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_person_must_say_is_asked_for(kind: str):
    with pytest.raises(Exception, match=r"(files|folder)"):
        prepare(f"source={kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_built_up_to_its_missing_files(kind: str, tmp_path: Path):
    place = "folder" if kind.endswith("folder") else "files"
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("prepare", overrides=[
            f"source={kind}", f"source.reader.{place}={tmp_path}/nothing",
            f"source.folder={tmp_path}/out",
        ])  # fmt: skip
    with pytest.raises(Exception, match="nothing"):
        instantiate(cfg.source)
