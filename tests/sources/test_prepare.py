"""Prepared sources: equal however many processes wrote them, and whole after a kill."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from files import TABLE, json_lines, prepared, preparing

from data_modules.sources import prepare
from data_modules.sources.json_lines import JSONLines
from data_modules.sources.readers import Shard
from data_modules.sources.rows import Row, Skipped


def reader_of(folder: Path, num_rows: int = 30) -> JSONLines:
    file = folder / "c.jsonl"
    if not file.is_file():
        json_lines(file, [{"id": n % 25, "text": f"row {n}"} for n in range(num_rows)])
    return JSONLines(files=str(file), shard_bytes=99, **TABLE)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name[0] != "."}


class Slow(JSONLines):
    """Notes which shards it reads, and gets stuck in the fourth."""

    stuck = True

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        note = Path(shard.path).with_name(f"read-{shard.start}")
        note.write_text(note.read_text() + "x" if note.is_file() else "x")
        if self.stuck and shard.start >= 3 * 99:
            time.sleep(60)
        yield from super().rows(shard)


Slow.__name__ = "JSONLines"  # as what it is asked for


def test_the_number_of_processes_changes_no_byte(tmp_path: Path):
    for num in (1, 3):
        prepared(tmp_path / str(num), reader_of(tmp_path), num_processes=num)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_parts_read_their_shards_alone_and_are_joined_as_if_there_were_none(tmp_path: Path):
    reader = Slow(files=reader_of(tmp_path, num_rows=25).files, shard_bytes=99, **TABLE)
    reader.stuck = False
    num_shards = len(reader.shards())
    for part in ("2/3", "3/3"):
        preparing(tmp_path / "parts", reader, part=part).prepare_data()
        assert not (tmp_path / "parts/source.json").exists()
    read = {path.name: path.read_text() for path in tmp_path.glob("read-*")}
    assert len(read) == num_shards - len(range(0, num_shards, 3))
    prepared(tmp_path / "parts", reader)
    assert {(tmp_path / name).read_text() for name in read} == {"x"}
    prepared(tmp_path / "whole", reader_of(tmp_path))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("part", ["0/3", "4/3", "half", "1/0"])
def test_a_part_that_is_none_is_refused(part: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"source.part={part}: want INDEX/COUNT"):
        preparing(tmp_path, reader_of(tmp_path), part=part)


def test_a_killed_run_goes_on_without_redoing_shards(tmp_path: Path):
    reader = reader_of(tmp_path)
    slow = Slow(files=reader.files, shard_bytes=99, **TABLE)
    fork = multiprocessing.get_context("fork")

    def run() -> None:
        os.setpgrp()
        preparing(tmp_path / "out", slow).prepare_data()

    writer = fork.Process(target=run)
    writer.start()
    while len(list(tmp_path.glob("out/.shards-*/[0-9]*"))) < 3:
        time.sleep(0.02)
    os.killpg(writer.pid, signal.SIGKILL)  # pyright: ignore[reportArgumentType]
    writer.join()
    assert not (tmp_path / "out" / "source.json").exists()

    Slow.stuck = False
    prepared(tmp_path / "out", slow)

    prepared(tmp_path / "at_once", reader)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at_once")
    assert [(tmp_path / f"read-{99 * n}").read_text() for n in range(3)] == ["x"] * 3
    assert not list((tmp_path / "out").glob(".shards-*"))


def test_shards_of_other_code_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = Slow(files=reader_of(tmp_path).files, shard_bytes=99, **TABLE)
    reader.stuck = False
    preparing(tmp_path / "out", reader, part="1/2").prepare_data()
    monkeypatch.setattr(prepare, "reading_code", lambda: [b"another parser"])

    prepared(tmp_path / "out", reader)

    assert (tmp_path / "read-0").read_text() == "xx"
    assert not list((tmp_path / "out").glob(".shards-*"))


def test_preparing_again_does_nothing_and_another_source_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    prepared(tmp_path / "out", reader_of(tmp_path))
    before = files_of(tmp_path / "out")
    prepared(tmp_path / "out", reader_of(tmp_path))
    assert "holds this source already" in capfd.readouterr().err
    assert files_of(tmp_path / "out") == before

    with pytest.raises(ValueError, match=r"prepared otherwise \(max_document_tokens differ\)"):
        prepared(tmp_path / "out", reader_of(tmp_path), max_document_tokens=3)


def test_a_process_that_dies_is_told_with_the_shards_it_read(tmp_path: Path):
    class Deadly(JSONLines):
        def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
            if shard.start == 2 * 99:
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().rows(shard)

    deadly = Deadly(files=reader_of(tmp_path).files, shard_bytes=99, **TABLE)
    with pytest.raises(RuntimeError, match=r"died .*c\.jsonl from byte 198.* to go on"):
        preparing(tmp_path / "out", deadly, num_processes=1).prepare_data()


def test_the_closing_report_counts_and_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    report = prepared(tmp_path / "out", reader_of(tmp_path))
    assert report["documents"] == 25
    assert report["skipped"] == {"duplicate id": 5}
    said = capfd.readouterr().err
    for words in ("documents", "text tokens", "vision tokens", "patches", "duplicate id"):
        assert words in said
