"""Corpora on disk: whole or not there, equal however they were written, damage noticed."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_modules.components.corpus import (
    Corpus,
    CorruptDocumentError,
    SourceRecipe,
    corpus_in,
    write_corpus,
)
from data_modules.components.document import INDEX_DTYPE, Document, png
from data_modules.world.things import Thing, draw


def letters(number: int) -> list[Document]:
    """One or two documents of numbers alone."""
    return [
        Document(
            input_ids=np.arange(number, number + 5 + number % 3, dtype=np.uint32),
            loss_mask=np.arange(5 + number % 3) % 2 == 0,
        )
    ] * (1 + number % 2)


def picture(number: int) -> list[Document]:
    """One document with a picture and a clip."""
    things = [
        Thing(colour="red", shape="star", x=20.0 + number, y=20.0 + frame, radius=9.0)
        for frame in range(4)
    ]
    frames = [png(draw([thing], 56, (0, 0, 0))) for thing in things]
    return [
        Document(
            input_ids=np.full(8, number, np.uint32),
            loss_mask=np.zeros(8, bool),
            media=[frames[:1], frames],
            num_vision_tokens=8,
            num_patches=16 + 64,
        )
    ]


RECIPES = [
    SourceRecipe(name="letters", num_inputs=11, make=letters, inputs_per_chunk=4),
    SourceRecipe(name="pictures", num_inputs=7, make=picture, inputs_per_chunk=3),
]


def written(folder: Path, num_processes: int = 1) -> Corpus:
    write_corpus(folder, RECIPES, description={"asked": 1}, num_processes=num_processes)
    return corpus_in(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return written(tmp_path / "corpus")


def test_documents_come_back_as_they_were_written(corpus: Corpus):
    expected = [document for number in range(11) for document in letters(number)]
    assert len(corpus.index["letters"]) == len(expected) == 16
    for number in (15, 0, 7, 3, 8):
        document = corpus.read("letters", number)
        np.testing.assert_array_equal(document.input_ids, expected[number].input_ids)
        np.testing.assert_array_equal(document.loss_mask, expected[number].loss_mask)

    (original,) = picture(5)
    document = corpus.read("pictures", 5)
    assert [list(item) for item in document.media] == [list(item) for item in original.media]
    assert [item.grid_thw for item in document.patches("x")] == [(1, 4, 4), (4, 4, 4)]


def test_the_index_counts_tokens_vision_tokens_and_patches(corpus: Corpus):
    row = corpus.index["pictures"][5]
    assert (row["num_tokens"], row["num_vision_tokens"], row["num_patches"]) == (8, 8, 80)
    assert corpus.chunk_starts["letters"].tolist() == [0, 6, 12, 16]
    assert corpus.chunk_starts["pictures"].tolist() == [0, 3, 6, 7]


def test_the_number_of_processes_changes_no_byte(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    written(one, num_processes=1)
    written(two, num_processes=2)
    assert files_of(one) == files_of(two)


def test_writing_again_does_nothing(tmp_path: Path):
    written(tmp_path / "corpus")

    def never(number: int) -> list[Document]:
        raise AssertionError("made a document of a corpus that is there")

    recipes = [SourceRecipe(name="letters", num_inputs=1, make=never)]
    write_corpus(tmp_path / "corpus", recipes, description={})


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """What a full disk looks like to a writer: EFBIG in place of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path):
    folder = tmp_path / "corpus"
    with (
        files_no_larger_than(600),
        pytest.raises(OSError, match=rf"no room left while preparing {folder}: .*data_dir"),
    ):
        written(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".corpus.lock"]
    assert len(written(folder).index["letters"]) == 16


def test_a_killed_writer_leaves_no_corpus_and_the_next_one_succeeds(tmp_path: Path):
    folder = tmp_path / "corpus"

    def slow(number: int) -> list[Document]:
        time.sleep(60)
        return letters(number)

    recipes = [*RECIPES, SourceRecipe(name="slow", num_inputs=2, make=slow)]
    fork = multiprocessing.get_context("fork")
    writer = fork.Process(
        target=lambda: (os.setpgrp(), write_corpus(folder, recipes, description={}))
    )
    writer.start()
    while not list(tmp_path.glob(".corpus.unfinished/pictures/*.bin")):
        time.sleep(0.01)
    os.killpg(writer.pid, signal.SIGKILL)  # pyright: ignore[reportArgumentType]
    writer.join()

    with pytest.raises(FileNotFoundError, match="moonlit prepare"):
        corpus_in(folder)
    assert len(written(folder).index["letters"]) == 16
    assert not list(tmp_path.glob(".corpus.unfinished*"))


def test_an_error_in_a_recipe_arrives_and_leaves_nothing(tmp_path: Path):
    def broken(number: int) -> list[Document]:
        raise KeyError("no such shape")

    recipes = [*RECIPES, SourceRecipe(name="broken", num_inputs=1, make=broken)]
    with pytest.raises(KeyError, match="no such shape"):
        write_corpus(tmp_path / "corpus", recipes, description={})
    assert not (tmp_path / "corpus").exists()


def flip_byte_of(folder: Path, source: str, needle: bytes) -> None:
    """Damage the one chunk that holds ``needle``, in its middle."""
    (path,) = [p for p in (folder / source).glob("*.bin") if needle in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed_and_named(tmp_path: Path):
    written(tmp_path / "corpus")
    (document,) = picture(4)
    flip_byte_of(tmp_path / "corpus", "pictures", document.media[1][2])

    corpus = corpus_in(tmp_path / "corpus")
    with pytest.raises(CorruptDocumentError, match=r"pictures/4: CRC-32 is"):
        corpus.read("pictures", 4)
    assert corpus.read("pictures", 3).num_patches == 80


@pytest.mark.parametrize(
    "field",
    ["input_ids", "loss_mask", "frames_per_item", "kinds", "bytes_per_frame", "frames"],
)
def test_every_field_of_a_record_is_checked(field: str):
    """Catches: a damaged mask, which decodes and trains on what it should not."""
    (document,) = picture(3)
    record = document.record()
    row = np.array(document.index_row(record), INDEX_DTYPE)[()]
    assert Document.from_record(record, row).num_patches == 80

    damaged = bytearray(bytes(record[field]))
    damaged[0] ^= 1
    with pytest.raises(ValueError, match="CRC-32 is"):
        Document.from_record(record | {field: bytes(damaged)}, row)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_chunk_cut_short_or_gone_costs_its_documents_only(tmp_path: Path, damage: str):
    folder = tmp_path / "corpus"
    written(folder)
    chunk = folder / "letters" / "chunk-1-0.bin"
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:100])
    else:
        chunk.unlink()

    corpus = corpus_in(folder)
    begin = time.monotonic()
    for number in range(6, 12):
        with pytest.raises(CorruptDocumentError, match=f"letters/{number}"):
            corpus.read("letters", number)
    assert (
        time.monotonic() - begin < 6
    )  # LitData waits 2 s for a missing chunk: once, not six times
    assert corpus.read("letters", 5).input_ids[0] == 3
    assert corpus.read("letters", 12).input_ids[0] == 8


def test_a_source_without_documents_is_refused(tmp_path: Path):
    recipes = [SourceRecipe(name="empty", num_inputs=2, make=lambda number: [])]
    with pytest.raises(ValueError, match="'empty' made no document"):
        write_corpus(tmp_path / "corpus", recipes, description={})


def test_a_corpus_can_be_moved(tmp_path: Path):
    written(tmp_path / "corpus")
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere")
    assert corpus_in(tmp_path / "elsewhere").read("letters", 2).input_ids[0] == 1
