"""A corpus on disk: LitData chunks of each source, and an index of every document.

    FOLDER/corpus.json            what was asked for
    FOLDER/SOURCE/index.json      LitData's own index of the chunks
    FOLDER/SOURCE/chunk-*.bin     the records, ``Document.record``
    FOLDER/SOURCE/documents.npy   one ``INDEX_DTYPE`` row a document

It is written beside its place and moved there when whole: a killed writer leaves nothing that
looks like a corpus. Chunks do not depend on the number of processes.
"""

import fcntl
import io
import json
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset
from litdata.streaming.writer import BinaryWriter
from rich.console import Console

from data_modules.components.chunk_cache import (
    DOCUMENTS,
    FULL_DISK,
    LITDATA_INDEX,
    CacheSettings,
    ChunkCache,
)
from data_modules.components.document import INDEX_DTYPE, Document
from moonlit.progress import Work

DESCRIPTION = "corpus.json"
SOURCE = "source.json"
"""Beside the chunks of a source that was prepared by itself."""
WRITER_RANK = "DATA_OPTIMIZER_GLOBAL_RANK"
"""LitData names chunks by this variable: ``chunk-RANK-NUMBER.bin``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe:
    """How the documents of one source are made."""

    name: str
    num_inputs: int
    make: Callable[[int], Iterable[Document]]
    """Documents of input number i; a pure function of i."""
    inputs_per_chunk: int = 1024


@dataclass(frozen=True, slots=True)
class Shard:
    """Inputs ``start`` to ``stop`` of a source: one chunk."""

    source: int
    number: int
    start: int
    stop: int


def write_corpus(
    folder: Path,
    recipes: Sequence[SourceRecipe],
    *,
    description: dict[str, Any],
    num_processes: int | None = None,
) -> None:
    """Write a corpus unless it is there already; processes that ask at once wait for the first.

    Args:
        folder: where it shall lie; its parent is made.
        recipes: the sources.
        description: what was asked for, kept as JSON.
        num_processes: None: as many as this process may use cores.

    Raises:
        OSError: if the disk is full, naming the folder.
    """
    with (
        full_disk_named(folder),
        locked(folder.with_name(f".{folder.name}.lock")),
    ):
        if (folder / DESCRIPTION).is_file():
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            Console(stderr=True, markup=False).print(
                f"preparing the corpus in {folder}, once", soft_wrap=True
            )
            write_sources(unfinished, recipes, num_processes or len(os.sched_getaffinity(0)))
            (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a file lock: one process writes at a time, or several that hold it as a shared one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Say which folder had no room; other errors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(
            error.errno,
            f"no room left while preparing {folder}: {os.strerror(error.errno or 0)}; free some "
            "space or choose another place with data.data_dir",
        ) from error


def write_sources(folder: Path, recipes: Sequence[SourceRecipe], num_processes: int) -> None:
    """Write every shard, then join each source's index."""
    shards = [
        Shard(source, number, start, min(start + recipe.inputs_per_chunk, recipe.num_inputs))
        for source, recipe in enumerate(recipes)
        for number, start in enumerate(range(0, recipe.num_inputs, recipe.inputs_per_chunk))
    ]
    rows: dict[Shard, np.ndarray] = {}
    # fork: recipes hold closures; the children use neither torch's threads nor CUDA.
    fork = multiprocessing.get_context("fork")
    with (
        Work("preparing the corpus", sum(s.stop - s.start for s in shards)) as work,
        ProcessPoolExecutor(num_processes, fork, inherit, (folder, recipes)) as pool,
    ):
        futures: dict[Future[np.ndarray], Shard] = {
            pool.submit(write_shard, shard): shard for shard in shards
        }
        try:
            for future in as_completed(futures):
                shard = futures[future]
                rows[shard] = future.result()
                work.advance(shard.stop - shard.start)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the rest would be thrown away
            raise
    for source, recipe in enumerate(recipes):
        join_index(folder / recipe.name, [rows[s] for s in shards if s.source == source])


inherited: tuple[Path, Sequence[SourceRecipe]]
"""In a writer process: the folder and the recipes it was forked with."""


def inherit(folder: Path, recipes: Sequence[SourceRecipe]) -> None:
    """Keep what the parent gave, in a fresh writer process."""
    global inherited
    inherited = (folder, recipes)


def write_shard(shard: Shard) -> np.ndarray:
    """Make the documents of a shard and write them as one chunk (more if beyond 64 MB)."""
    folder, recipes = inherited
    recipe = recipes[shard.source]
    os.environ[WRITER_RANK] = str(shard.number)
    writer = BinaryWriter(str(folder / recipe.name), chunk_bytes="64MB")
    rows = []
    with redirect_stdout(io.StringIO()):  # LitData prints the record's format
        for number in range(shard.start, shard.stop):
            for document in recipe.make(number):
                record = document.record()
                writer.add_item(len(rows), record)
                rows.append(document.index_row(record))
        writer.done()
    return np.array(rows, INDEX_DTYPE)


def join_index(folder: Path, rows: Sequence[np.ndarray]) -> None:
    """Join the shards' indices, in order, into LitData's index and ours.

    Raises:
        ValueError: if the source has no document at all.
    """
    if not sum(map(len, rows)):
        raise ValueError(f"source {folder.name!r} made no document: is what it reads empty?")
    parts = sorted(folder.glob(f"*.{LITDATA_INDEX}"), key=lambda path: int(path.name.split(".")[0]))
    indices = [json.loads(path.read_text()) for path in parts]
    (folder / LITDATA_INDEX).write_text(json.dumps(joined(indices), sort_keys=True))
    np.save(folder / DOCUMENTS, np.concatenate(rows))
    for path in parts:
        path.unlink()


def joined(indices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join LitData's indices, in order."""
    chunks = [chunk for index in indices for chunk in index["chunks"]]
    return {"chunks": chunks, "config": indices[0]["config"]}


class CorruptDocumentError(ValueError):
    """A document that cannot be read as it was written; carries its name."""


def corpus_in(folder: Path) -> "Corpus":
    """Open what ``write_corpus`` left.

    Raises:
        FileNotFoundError: if there is no corpus.
    """
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"no prepared corpus in {folder}: run moonlit prepare")
    return Corpus(
        {path.parent.name: str(path.parent) for path in sorted(folder.glob(f"*/{DOCUMENTS}"))}
    )


class Corpus:
    """Reads documents by source and number.

    Args:
        places: of each source: a folder, or a URL of an object store (``s3://``, ``gs://``,
            ``azure://``, ...) whose chunks are kept in a cache.
        cache: of the chunks of object stores; needed where there are any.

    Raises:
        FileNotFoundError: if a folder holds no source.
        ValueError: if a source lies in an object store and there is no cache.
    """

    def __init__(self, places: Mapping[str, str], cache: CacheSettings | None = None) -> None:
        self.caches: dict[str, ChunkCache] = {}
        self.folders: dict[str, Path] = {}
        for name, place in places.items():
            if "://" in place:
                if cache is None:
                    raise ValueError(f"source {name!r} is in {place}: it needs a cache")
                self.caches[name] = ChunkCache(place, cache)
                self.folders[name] = self.caches[name].folder
            else:
                self.folders[name] = Path(place)
            if not (self.folders[name] / DOCUMENTS).is_file():
                raise FileNotFoundError(f"no prepared source in {place}: run moonlit prepare")
        self.index = {n: np.load(f / DOCUMENTS, mmap_mode="r") for n, f in self.folders.items()}
        self.chunk_starts = {source: self.read_chunk_starts(source) for source in self.index}
        self.process_id = 0
        self.datasets: dict[str, StreamingDataset] = {}
        self.missing_chunks: dict[tuple[str, int], str] = {}

    def read(self, source: str, number: int) -> Document:
        """Read one document.

        Raises:
            CorruptDocumentError: if it is damaged, or its chunk is.
            FetchError: if its chunk cannot be had from its object store.
        """
        name, chunk = f"{source}/{number}", self.chunk_of(source, number)
        if reason := self.missing_chunks.get((source, chunk)):
            raise CorruptDocumentError(f"{name}: {reason}")
        if source in self.caches:
            self.caches[source].hold(chunk)
        try:
            record = self.dataset(source)[number]
            return Document.from_record(record, self.index[source][number])
        except (OSError, ValueError, KeyError, struct.error) as error:
            if isinstance(error, FileNotFoundError):  # LitData waits 2 s for it each time
                self.missing_chunks[source, chunk] = f"chunk {chunk} is missing or cut short"
            raise CorruptDocumentError(f"{name}: {error}") from error

    def chunk_of(self, source: str, number: int) -> int:
        """Chunk that holds a document."""
        return int(np.searchsorted(self.chunk_starts[source], number, side="right")) - 1

    def dataset(self, source: str) -> StreamingDataset:
        """Open a source once in each process: LitData's download threads do not survive a fork."""
        if self.process_id != os.getpid():
            self.process_id, self.datasets = os.getpid(), {}
        if source not in self.datasets:
            self.datasets[source] = StreamingDataset(
                str(self.folders[source]),
                batch_decode=False,  # else it decodes a window around each document asked for
            )
        return self.datasets[source]

    def read_chunk_starts(self, source: str) -> np.ndarray:
        """Number of the first document of each chunk, and the number of documents last."""
        index = json.loads((self.folders[source] / LITDATA_INDEX).read_text())
        return np.cumsum([0, *(chunk["chunk_size"] for chunk in index["chunks"])])
