"""A source's chunks in an object store, kept in a folder of bounded size.

LitData's own downloaders fetch (S3, R2, GCS, Azure). Around them: what was used
longest ago makes room, an attempt that fails is repeated with back-off, and the processes of this
machine together start no more requests a second than they are told. A chunk that cannot be had is
an error and ends the run: it is never taken for a corrupt document.

Processes agree by file locks: a chunk that one of them reads is locked, and is not removed.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litdata.streaming.downloader import get_downloader
from rich.console import Console

LITDATA_INDEX, DOCUMENTS = "index.json", "documents.npy"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PACE, GATE = ".next_request", ".room.lock"


class FetchError(RuntimeError):
    """An object that could not be had, however often it was tried; names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """How object stores are read.

    Raises:
        ValueError: if a number makes no sense.
    """

    folder: str
    """Where chunks are kept; shared by all sources and processes of this machine."""
    max_bytes: int
    """Of all chunks in it, but for those that are being read."""
    max_requests_per_s: float
    """Of all processes of this machine."""
    max_attempts: int
    """Of one object; the pause doubles from one to the next."""
    first_pause_s: float
    storage_options: Mapping[str, Any] | None = None
    """As LitData's ``StreamingDataset`` takes them: ``endpoint_url``, ``region_name``, ..."""

    def __post_init__(self) -> None:
        for key in ("max_bytes", "max_requests_per_s", "max_attempts"):
            if getattr(self, key) <= 0:
                raise ValueError(f"cache.{key}={getattr(self, key)}: want more than 0")


class ChunkCache:
    """The chunks of one source.

    Args:
        remote: URL of the folder that ``moonlit prepare`` made.
        settings: of the cache.

    Raises:
        FetchError: if there is no source at the URL.
        ValueError: if the cache has no room for a single chunk.
    """

    def __init__(self, remote: str, settings: CacheSettings) -> None:
        self.remote, self.settings = remote.rstrip("/"), settings
        self.root = Path(settings.folder)
        self.folder = self.root / hashlib.sha256(self.remote.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held: tuple[int, int, Any] | None = None
        """Process, chunk and the open lock file."""
        self.chunks: list[dict[str, Any]] = []
        self.made: Any = None
        self.made_in = 0
        self.console = Console(stderr=True, markup=False)
        with (self.folder / ".opening.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.open()

    def open(self) -> None:
        """Fetch the indices; drop chunks of a source that stood at this URL before."""
        index, kept = self.folder / LITDATA_INDEX, self.folder / "kept.json"
        self.fetch(LITDATA_INDEX)  # in one go: others may be reading the one that is there
        if not kept.is_file() or kept.read_bytes() != index.read_bytes():
            for path in [*self.folder.glob("chunk-*"), self.folder / DOCUMENTS]:
                path.unlink(missing_ok=True)
            shutil.copyfile(index, kept)
        self.chunks = json.loads(index.read_text())["chunks"]
        if not (self.folder / DOCUMENTS).is_file():
            self.fetch(DOCUMENTS)
        largest = max(self.chunks, key=lambda chunk: chunk["chunk_bytes"])
        if largest["chunk_bytes"] > self.settings.max_bytes:
            raise ValueError(
                f"cache.max_bytes={self.settings.max_bytes:,} has no room for "
                f"{self.remote}/{largest['filename']} of {largest['chunk_bytes']:,} bytes"
            )

    def hold(self, number: int) -> None:
        """Have a chunk on disk and keep it there until this process holds another one.

        Raises:
            FetchError: if it cannot be had.
            OSError: if the disk is full, naming the folder.
        """
        if self.held is not None and self.held[:2] == (os.getpid(), number):
            return
        if self.held is not None and self.held[0] == os.getpid():
            self.held[2].close()
        name = self.chunks[number]["filename"]
        path, lock = self.folder / name, (self.folder / f".{name}.lock").open("w")
        try:
            self.lock_whole(number, path, lock)
        except BaseException:
            lock.close()  # else whoever keeps the error keeps everybody else waiting
            raise
        self.held = os.getpid(), number, lock

    def lock_whole(self, number: int, path: Path, lock: Any) -> None:
        """Lock a chunk among other readers; fetch it first if it is missing."""
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not path.is_file():  # it may also be removed while the lock changes hands
            # Alone only where it is missing: two that read what the other wants would wait forever.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                self.make_room(self.chunks[number]["chunk_bytes"])
                self.fetch(path.name)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(path)

    def fetch(self, name: str) -> None:
        """Download one object, as often as allowed.

        Raises:
            FetchError: after the last attempt, with its reason.
            OSError: if the disk is full, naming the folder.
        """
        downloader = self.downloader()
        path, attempts = self.folder / name, self.settings.max_attempts
        reason: Exception | None = None
        for attempt in range(attempts):
            if attempt:
                self.pause(name, attempt, reason)
            self.keep_pace()
            unfinished = path.with_name(f".{name}.unfinished")
            try:
                # Not download_file: on S3 it takes a client that refuses http:// and forks badly.
                with unfinished.open("wb") as file:
                    downloader.download_fileobj(f"{self.remote}/{name}", file)
                unfinished.rename(path)
                return
            except Exception as error:  # each store has its own; all are told in the end
                unfinished.unlink()
                if isinstance(error, OSError) and error.errno in FULL_DISK:
                    self.say_full(name, error, is_last=attempt == attempts - 1)
                reason = error
        raise FetchError(f"{self.remote}/{name} could not be read in {attempts} attempts: {reason}")

    def downloader(self) -> Any:
        """Return LitData's downloader, made once in each process."""
        if self.made_in != os.getpid():
            options = storage_options(self.remote, self.settings)
            self.made = get_downloader(self.remote, str(self.folder), [], options)
            self.made_in = os.getpid()
        return self.made

    def pause(self, name: str, attempt: int, reason: Exception | None) -> None:
        """Wait before another attempt, each time twice as long, half of it by chance."""
        pause_s = self.settings.first_pause_s * 2 ** (attempt - 1)
        told = f"{self.remote}/{name}: {reason}; again in {pause_s:.1f} s"
        self.console.print(told, soft_wrap=True)
        time.sleep(pause_s * (0.5 + random.random() / 2))

    def say_full(self, name: str, error: OSError, *, is_last: bool) -> None:
        """Drop all chunks that nobody reads; if that was the last attempt, say where room lacks."""
        self.make_room(self.settings.max_bytes)
        if is_last:
            raise OSError(
                error.errno,
                f"no room left for {name} in the cache {self.root}: {os.strerror(error.errno or 0)}"
                "; free some space, lower cache.max_bytes or choose another cache.folder: the run "
                "goes on from its checkpoint",
            ) from error

    def make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago and is not being read, until so many bytes are free."""
        with (self.root / GATE).open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            there = []
            for path in self.root.glob("*/chunk-*.bin"):
                with suppress(FileNotFoundError):
                    there.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            too_many = sum(size for _, size, _ in there) + num_bytes - self.settings.max_bytes
            for _, size, path in sorted(there):
                if too_many <= 0:
                    return
                with (path.parent / f".{path.name}.lock").open("w") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # somebody reads it
                    path.unlink(missing_ok=True)
                    too_many -= size

    def keep_pace(self) -> None:
        """Wait for this request's turn among those of all processes of the machine."""
        with (self.root / PACE).open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            turn = max(time.time(), float(file.read() or 0))
            file.truncate(0)
            file.write(repr(turn + 1 / self.settings.max_requests_per_s))
        time.sleep(max(0.0, turn - time.time()))


def storage_options(remote: str, settings: CacheSettings) -> dict[str, Any]:
    """Return what LitData's downloader is told; on S3 it shall not retry by itself, 1000 times."""
    options = dict(settings.storage_options or {})
    if remote.startswith("s3://") and "config" not in options:
        from botocore.config import Config

        options["config"] = Config(retries={"total_max_attempts": 1, "mode": "standard"})
    return options
