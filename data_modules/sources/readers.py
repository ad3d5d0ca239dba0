"""What a kind of source is: shards that are read apart from one another, and their rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import braceexpand

from data_modules.sources.rows import Row, Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A part of a source, read from beginning to end by one process."""

    name: str
    """File, and place in it."""
    size: int
    """For the progress bar: bytes, or files."""
    start: int = 0
    stop: int = 0
    """Place in the file: bytes, row groups, or files, as the reader likes."""
    path: str = ""


@runtime_checkable
class Reader(Protocol):
    """A kind of source. Its public attributes are what ``moonlit prepare`` can be told."""

    def shards(self) -> Sequence[Shard]:
        """List the shards, in order.

        Raises:
            FileNotFoundError: if there is nothing to read, naming the place.
        """
        ...

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream a shard's rows; what cannot be read comes as ``Skipped``."""
        ...

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        ...


def expanded(patterns: str | Iterable[str], kind: str) -> list[str]:
    """Return the files that patterns with ``{000..127}``, ``*`` and ``**`` mean, in order.

    Raises:
        FileNotFoundError: if a pattern means no file, naming it.
    """
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        for one in braceexpand.braceexpand(pattern):
            if is_url(one):
                files.append(one)
                continue
            path = Path(one)
            anchor = Path(path.anchor)
            found = [path] if path.is_file() else sorted(anchor.glob(str(path.relative_to(anchor))))
            if not found:
                raise FileNotFoundError(f"no {kind} at {one}: set source.reader.files")
            files += [str(file) for file in found]
    return files


def is_url(place: str) -> bool:
    """Whether a place is a stream (``pipe:COMMAND``, ``https://...``) and no file."""
    return "://" in place or place.startswith("pipe:")


def state_of(files: Iterable[str]) -> dict[str, list[int]]:
    """Return size and time of change of each file: another state makes another corpus."""
    return {
        file: [] if is_url(file) else [(s := Path(file).stat()).st_size, s.st_mtime_ns]
        for file in files
    }


def column_names(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Rename columns: ``{"text": "caption_en"}`` reads the text from ``caption_en``.

    Raises:
        KeyError: if a column that was named is not there.
    """
    renamed = {name: row[theirs] for name, theirs in columns.items()}
    return {k: v for k, v in row.items() if k not in columns.values()} | renamed
