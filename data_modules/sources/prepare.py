"""``moonlit prepare source=KIND``: a source's rows as LitData chunks with an index.

    FOLDER/source.json      what was asked for, and the closing report
    FOLDER/index.json       LitData's own index of the chunks
    FOLDER/chunk-*.bin      the records, ``Document.record``
    FOLDER/documents.npy    one ``INDEX_DTYPE`` row a document

Shards are read in processes of their own and written whole below ``FOLDER/.shards-DIGEST``; a run
that was killed goes on with the shards that are not there (and begins again where the code that
reads has changed since: shards of two kinds are never joined). A row that is bad is left out and
counted; it stops nobody. Of rows with the same id the first one stays, in the order of the shards:
a shard that repeats an earlier one's is read once more without them.
"""

import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from litdata.streaming.writer import BinaryWriter
from rich.console import Console

from data_modules.components import document
from data_modules.components.corpus import (
    DOCUMENTS,
    LITDATA_INDEX,
    SOURCE,
    WRITER_RANK,
    full_disk_named,
    joined,
    locked,
)
from data_modules.components.digests import digest
from data_modules.components.document import INDEX_DTYPE
from data_modules.components.part import Part
from data_modules.sources.readers import Reader, Shard
from data_modules.sources.report import Report
from data_modules.sources.rows import RowReader, Skipped, SkippedError
from moonlit import chat
from moonlit.chat.tokenizer import Tokenizer
from moonlit.progress import Work

IDS, REPORT = "ids.npy", "report.json"
CHUNK_BYTES = "64MB"
POLL_S = 0.2


class PrepareSource:
    """Writes one source, to be named in a mixture of ``data=corpora``.

    Args:
        folder: where it goes.
        reader: what kind of source it is.
        tokenizer: ``embedded``, or a folder in the released layout.
        max_document_tokens: a document with media that has more is left out, for it is never cut.
        sound: read sounds too, those of videos included, as pictures of their spectra.
        num_processes: None: as many as this process may use cores.
        part: ``2/8``: read only the second of eight parts of the shards and leave it beside the
            source; a run without it reads what is missing and joins all. Parts may run at the
            same time.
    """

    def __init__(
        self,
        *,
        folder: str,
        reader: Reader,
        tokenizer: str,
        max_document_tokens: int | None,
        sound: bool,
        num_processes: int | None,
        part: str | None = None,
    ) -> None:
        self.folder, self.reader = Path(folder), reader
        self.rows = RowReader(
            tokenizer=Tokenizer.named(tokenizer),
            max_document_tokens=max_document_tokens,
            sound=sound,
        )
        self.num_processes = num_processes or len(os.sched_getaffinity(0))
        self.part = Part.named(part)
        self.console = Console(stderr=True, markup=False)

    def asked_for(self) -> dict[str, Any]:
        """Everything that the source's documents are a function of, but the code."""
        return {
            "kind": type(self.reader).__name__,
            "reader": self.reader.asked_for(),
            "tokenizer": self.rows.tokenizer.digest,
            "max_document_tokens": self.rows.max_document_tokens,
            "sound": self.rows.sound,
        }

    def prepare_data(self) -> None:
        """Write the source unless it is there, and say what is in it.

        Raises:
            ValueError: if the folder holds another source, or there is no document at all.
            OSError: if the disk is full, naming the folder.
        """
        asked = json.loads(json.dumps(self.asked_for()))
        with full_disk_named(self.folder), self.locked():
            if (self.folder / SOURCE).is_file():
                self.check_same(asked)
                return
            parts = self.folder / f".shards-{digest(json.dumps(asked).encode(), *reading_code())}"
            parts.mkdir(parents=True, exist_ok=True)
            shards = self.reader.shards()
            writer = ShardWriter(parts, self.reader, self.rows)
            numbered = list(enumerate(shards))
            if self.part is not None:
                self.write_all(writer, self.part.of(numbered))
                self.console.print(f"made part {self.part}; without source.part they are joined")
                return
            self.write_all(writer, numbered)
            for number, repeated in writer.repeated_ids(len(shards)).items():
                write_shard_of(writer, number, shards[number], repeated)
            report = self.join(parts, len(shards))
            written = {"asked_for": asked, "report": asdict(report)}
            (parts / SOURCE).write_text(json.dumps(written, indent=1))
            os.replace(parts / SOURCE, self.folder / SOURCE)
            for left in self.folder.glob(".shards-*"):
                shutil.rmtree(left)
            for lock in self.folder.glob(".lock-*"):
                lock.unlink()
        self.console.print(report.table(str(self.folder)))
        self.console.print(f"wrote {self.folder}", soft_wrap=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let other parts read on, but no other run of the same part, and nobody who joins them."""
        lock = self.folder / ".lock"
        if self.part is None:
            with locked(lock):
                yield
            return
        own = self.folder / f".lock-{self.part.index}-of-{self.part.count}"
        with locked(lock, shared=True), locked(own):
            yield

    def check_same(self, asked: dict[str, Any]) -> None:
        """Refuse to take another source for this one.

        Raises:
            ValueError: naming what differs.
        """
        held = json.loads((self.folder / SOURCE).read_text())
        there = held["asked_for"]
        if changed := [key for key in asked if asked[key] != there.get(key)]:
            raise ValueError(
                f"{self.folder} holds a source that was prepared otherwise ({', '.join(changed)} "
                "differ): choose another source.folder, or remove this one"
            )
        self.console.print(Report(**held["report"]).table(str(self.folder)))
        self.console.print(f"{self.folder} holds this source already", soft_wrap=True)

    def write_all(self, writer: "ShardWriter", shards: Sequence[tuple[int, Shard]]) -> None:
        """Write the shards that are not there yet, in processes.

        Raises:
            RuntimeError: if a process died, with the shards it may have died of.
        """
        left = [(number, shard) for number, shard in shards if not writer.is_done(number)]
        total, done = sum(s.size for _, s in shards), sum(s.size for _, s in shards)
        done -= sum(shard.size for _, shard in left)
        if done:
            self.console.print(f"going on: {len(shards) - len(left)} shards are there already")
        # fork: readers may hold what cannot be pickled; the children use no thread of the parent.
        fork = multiprocessing.get_context("fork")
        counter = fork.Value("q", 0)
        with (
            Work("preparing", total, completed=done, console=self.console) as work,
            ProcessPoolExecutor(self.num_processes, fork, inherit, (writer, counter)) as pool,
        ):
            futures: dict[Future[None], tuple[int, Shard]] = {
                pool.submit(write_inherited, number, shard): (number, shard)
                for number, shard in left
            }
            pending = set(futures)
            try:
                while pending:
                    finished, pending = wait(pending, timeout=POLL_S)
                    for future in finished:
                        future.result()
                        work.advance(futures[future][1].size)
                    num = counter.value  # pyright: ignore[reportAttributeAccessIssue]
                    work.update(work.completed, f"preparing, {num:,} documents so far")
            except BrokenProcessPool as error:
                names = ", ".join(shard.name for n, shard in left if writer.is_begun(n))
                raise RuntimeError(
                    f"a process died while it read one of: {names}; run the same command again to "
                    "go on, with source.num_processes=1 to learn which one"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def join(self, parts: Path, num_shards: int) -> Report:
        """Move the shards' chunks together and join their indices; may be done again.

        Raises:
            ValueError: if there is no document, with what was left out.
        """
        folders = [parts / shard_folder(number) for number in range(num_shards)]
        report = Report()
        for folder in folders:
            report.add(Report(**json.loads((folder / REPORT).read_text())))
        if not report.documents:
            raise ValueError(f"{self.folder}: no document; left out: {dict(report.skipped)}")
        indices, rows = [], []
        for folder in (f for f in folders if (f / DOCUMENTS).is_file()):
            rows.append(np.load(folder / DOCUMENTS))
            for path in folder.glob(f"*.{LITDATA_INDEX}"):
                indices.append(json.loads(path.read_text()))
                for chunk in indices[-1]["chunks"]:
                    if (folder / chunk["filename"]).is_file():  # else an earlier run moved it
                        (folder / chunk["filename"]).rename(self.folder / chunk["filename"])
        (self.folder / LITDATA_INDEX).write_text(json.dumps(joined(indices), sort_keys=True))
        np.save(self.folder / DOCUMENTS, np.concatenate(rows))
        return report


def reading_code() -> list[bytes]:
    """Return the code that a shard is a function of."""
    folders = (Path(__file__).parent, Path(document.__file__).parent, Path(chat.__file__).parent)
    return [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]


def shard_folder(number: int) -> str:
    """Name of a shard's folder."""
    return f"{number:06d}"


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards below a folder, each in a folder of its own."""

    folder: Path
    reader: Reader
    rows: RowReader

    def is_done(self, number: int) -> bool:
        """Whether a shard is there, whole."""
        return (self.folder / shard_folder(number) / REPORT).is_file()

    def is_begun(self, number: int) -> bool:
        """Whether somebody has begun a shard and not finished it."""
        return (self.folder / f".{shard_folder(number)}").is_dir()

    def write(
        self, number: int, shard: Shard, excluded: frozenset[int], counter: Any = None
    ) -> None:
        """Read a shard's rows and write what becomes of them."""
        unfinished = self.folder / f".{shard_folder(number)}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        os.environ[WRITER_RANK] = str(number)
        writing = Writing(BinaryWriter(str(unfinished), chunk_bytes=CHUNK_BYTES), counter=counter)
        with redirect_stdout(io.StringIO()):  # LitData prints the record's format
            for row in self.reader.rows(shard):
                if isinstance(row, Skipped):
                    writing.report.skip(row)
                    continue
                try:
                    made = self.rows.documents(row)
                    writing.check_new(made.row_id, excluded)
                except SkippedError as error:
                    writing.report.skip(Skipped(error.reason, row.name, error.detail))
                    continue
                writing.report.note_unread(made.unread)
                for document in made.documents:
                    writing.add(document)
            if writing.rows:
                writing.writer.done()
        if writing.rows:
            np.save(unfinished / DOCUMENTS, np.array(writing.rows, INDEX_DTYPE))
        np.save(unfinished / IDS, np.array(list(writing.ids), np.uint64))
        (unfinished / REPORT).write_text(json.dumps(asdict(writing.report)))
        done = self.folder / shard_folder(number)
        shutil.rmtree(done, ignore_errors=True)
        unfinished.rename(done)

    def repeated_ids(self, num_shards: int) -> dict[int, frozenset[int]]:
        """Return for each shard the ids that an earlier one has, where there are any."""
        seen: set[int] = set()
        repeated = {}
        for number in range(num_shards):
            ids = set(np.load(self.folder / shard_folder(number) / IDS).tolist())
            if both := ids & seen:
                repeated[number] = frozenset(both)
            seen |= ids
        return repeated


@dataclass
class Writing:
    """What is known of a shard while it is written."""

    writer: BinaryWriter
    counter: Any
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    ids: dict[int, None] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    def check_new(self, row_id: str | None, excluded: frozenset[int]) -> None:
        """Refuse an id for the second time.

        Raises:
            SkippedError: if a row had it before.
        """
        if row_id is None:
            return
        number = int(digest(row_id.encode()), 16)
        if number in self.ids or number in excluded:
            raise SkippedError("duplicate id", repr(row_id))
        self.ids[number] = None

    def add(self, document: Any) -> None:
        """Write a document."""
        record = document.record()
        self.writer.add_item(len(self.rows), record)
        self.rows.append(document.index_row(record))
        self.report.count(document)
        if self.counter is not None:
            with self.counter.get_lock():
                self.counter.value += 1


inherited: tuple[ShardWriter, Any]
"""In a writer process: what it was forked with."""


def inherit(writer: ShardWriter, counter: Any) -> None:
    """Keep what the parent gave, in a fresh writer process."""
    global inherited
    inherited = (writer, counter)


def write_inherited(number: int, shard: Shard) -> None:
    """Write a shard, in a writer process."""
    writer, counter = inherited
    writer.write(number, shard, frozenset(), counter)


def write_shard_of(
    writer: ShardWriter, number: int, shard: Shard, excluded: frozenset[int]
) -> None:
    """Write a shard anew, without ids of earlier ones."""
    writer.write(number, shard, excluded)
