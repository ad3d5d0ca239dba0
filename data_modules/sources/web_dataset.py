"""WebDataset tars: files of one key are a row.

    KEY.jpg KEY.txt              a picture and its text (also .png, .webp, .gif)
    KEY.mp4 KEY.txt              a video and its text (also .webm, .mkv, .mov, .avi)
    KEY.wav KEY.txt              a sound and its text (also .flac, .mp3, .ogg)
    KEY.json KEY.0.jpg KEY.1.jpg an interleaved document or a dialogue: the JSON is a row as in
                                 ``rows.py``, and names the others by what follows the key

``KEY.json`` beside a picture and without ``parts`` or ``messages`` may hold ``text``.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, group_by_keys

from data_modules.sources.readers import Shard, column_names, expanded, is_url, state_of
from data_modules.sources.rows import Row, Skipped, SkippedError, check_inside, checked_text

EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
    "audio": ("wav", "flac", "mp3", "ogg"),
}
TEXT_EXTENSIONS = ("txt", "text", "caption")


class WebDataset:
    """Reads tars, a shard a tar, from beginning to end.

    Args:
        files: paths, with ``{000..127}`` and ``*``; or ``pipe:COMMAND`` and ``https://...``, which
            ``webdataset`` opens.
        columns: our names of the JSON's keys, where they are called otherwise.
        max_document_bytes: a file of more is left out without being read.
    """

    def __init__(
        self, *, files: str | Sequence[str], columns: dict[str, str] | None, max_document_bytes: int
    ) -> None:
        self.files, self.columns = expanded(files, "tar"), dict(columns or {})
        self.max_document_bytes = max_document_bytes

    def shards(self) -> list[Shard]:
        """One for each tar."""
        return [
            Shard(name=file, size=1 if is_url(file) else Path(file).stat().st_size, path=file)
            for file in self.files
        ]

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        return {
            "files": state_of(self.files),
            "columns": self.columns,
            "max_document_bytes": self.max_document_bytes,
        }

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream a tar's rows; what lies behind a damaged place is lost, and said to be."""
        refused: list[Skipped] = []
        keys: set[str] = set()
        for sample in group_by_keys(self.members(shard, refused), handler=repeated(refused)):
            yield from drained(refused)
            key = sample.pop("__key__")
            sample.pop("__url__")
            is_refused = [extension.startswith(REFUSED) for extension in sample]
            if all(is_refused):
                continue
            name = f"{shard.path}, {key}"
            if key in keys:
                yield Skipped("duplicate key in a tar", name, "its files do not stand together")
                continue
            keys.add(key)
            if any(is_refused):
                yield Skipped("incomplete", name, "one of its files was refused")
                continue
            yield Row(name, partial(self.values, sample), partial(member_named, sample))
        yield from drained(refused)

    def members(self, shard: Shard, refused: list[Skipped]) -> Iterator[dict[str, Any]]:
        """Yield name and bytes of each file; the refused ones without their bytes."""
        number, last = 0, None
        try:
            stream: Any = gopen(shard.path, "rb")
            with stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    number += 1
                    if not member.isfile():
                        if member.issym() or member.islnk():
                            detail = f"{member.name!r} links to {member.linkname!r}"
                            refused.append(Skipped("link in a tar", shard.path, detail))
                        continue
                    if reason := self.reason_to_refuse(member):
                        refused.append(
                            Skipped(reason[0], f"{shard.path}, {member.name}", reason[1])
                        )
                        yield refused_file(member.name, number, shard)
                        continue
                    last = member.name
                    file = tar.extractfile(member)
                    data = file.read() if file is not None else b""
                    if len(data) != member.size:
                        raise tarfile.ReadError(f"{member.name!r} is cut short")
                    yield {"fname": member.name, "data": data, "__url__": shard.path}
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] # else it keeps every header
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            if not is_url(shard.path) and not Path(shard.path).is_file():
                raise
            refused.append(Skipped("damaged tar", shard.path, f"after {number} files: {error}"))
            if last is not None:  # its row may lack files that stood behind
                yield refused_file(last, number + 1, shard)

    def reason_to_refuse(self, member: tarfile.TarInfo) -> tuple[str, str] | None:
        """Return why a file is not read, if it is not."""
        try:
            check_inside(member.name)
        except SkippedError as error:
            return error.reason, error.detail
        if member.size > self.max_document_bytes:
            detail = f"{member.size:,} bytes, want at most {self.max_document_bytes:,}"
            return "too large", detail
        return None

    def values(self, sample: Mapping[str, bytes]) -> dict[str, Any]:
        """Return the row that the files of one key are.

        Raises:
            SkippedError: if they are none.
        """
        values: dict[str, Any] = {}
        if "json" in sample:
            values = self.described(sample["json"])
            if values.get("parts") is not None or values.get("messages") is not None:
                return values
        for kind, extensions in EXTENSIONS.items():
            for extension in extensions:
                if extension in sample:
                    values[kind] = sample[extension]
        for extension in TEXT_EXTENSIONS:
            if extension in sample:
                values["text"] = checked_text(sample[extension])
        return values

    def described(self, data: bytes) -> dict[str, Any]:
        """Read a row's JSON."""
        try:
            value = json.loads(data)
            value = {"parts": value} if isinstance(value, list) else value
            return column_names(dict(value), self.columns)
        except UnicodeDecodeError as error:
            raise SkippedError("text is not UTF-8", str(error)) from error
        except KeyError as error:
            raise SkippedError("missing key", f"no key {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise SkippedError("no JSON", str(error)) from error


REFUSED = "refused"
"""With a number, stands in a row for a file that was refused."""


def refused_file(name: str, number: int, shard: Shard) -> dict[str, Any]:
    """Return what stands in a row for a file that was refused."""
    key = base_plus_ext(name)[0] or name
    return {"fname": f"{key}.{REFUSED}-{number}", "data": b"", "__url__": shard.path}


def repeated(refused: list[Skipped]) -> Any:
    """Return what ``group_by_keys`` calls when a key has the same file twice."""

    def handler(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        refused.append(Skipped("duplicate file in a tar", str(error.args[0])))
        return True

    return handler


def drained(refused: list[Skipped]) -> Iterator[Skipped]:
    """Yield and forget what was refused so far."""
    while refused:
        yield refused.pop(0)


def member_named(sample: Mapping[str, bytes], name: str) -> bytes:
    """Return another file of the row.

    Raises:
        SkippedError: if there is none.
    """
    check_inside(name)
    if name.lower() not in sample:
        raise SkippedError("missing medium", f"no file {name!r}: there are {sorted(sample)}")
    return sample[name.lower()]
