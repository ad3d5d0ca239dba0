"""JSON Lines: one row an object and line; media as paths beside the file, or ``data:`` URIs."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_modules.sources.readers import Shard, column_names, expanded, state_of
from data_modules.sources.rows import Row, Skipped, SkippedError, file_in

BLOCK = 1 << 20


class JSONLines:
    """Reads ``.jsonl`` files, cut into shards at line ends.

    Args:
        files: paths, with ``{000..127}`` and ``*``.
        media_folder: where the rows' paths begin; None: each file's own folder.
        columns: our names of the rows' keys, where they are called otherwise.
        shard_bytes: a shard is about so long.
        max_document_bytes: a longer line, or a larger medium, is left out without being read.
    """

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        media_folder: str | None,
        columns: dict[str, str] | None,
        shard_bytes: int,
        max_document_bytes: int,
    ) -> None:
        self.files, self.media_folder = expanded(files, "JSON Lines file"), media_folder
        self.columns = dict(columns or {})
        self.shard_bytes, self.max_document_bytes = shard_bytes, max_document_bytes

    def shards(self) -> list[Shard]:
        """Cut the files; a line belongs to the shard in which it begins."""
        shards = []
        for file in self.files:
            size = Path(file).stat().st_size
            for start in range(0, size, self.shard_bytes):
                stop = min(start + self.shard_bytes, size)
                shards.append(
                    Shard(
                        name=f"{file} from byte {start}",
                        size=stop - start,
                        start=start,
                        stop=stop,
                        path=file,
                    )
                )
        return shards

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        return {
            "files": state_of(self.files),
            "media_folder": self.media_folder,
            "columns": self.columns,
            "shard_bytes": self.shard_bytes,
            "max_document_bytes": self.max_document_bytes,
        }

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream the lines that begin in the shard."""
        path = Path(shard.path)
        folder = Path(self.media_folder) if self.media_folder is not None else path.parent
        open_file = partial(file_in, folder, max_bytes=self.max_document_bytes)
        number = line_number(path, shard.start)
        with path.open("rb") as file:
            if shard.start:
                file.seek(shard.start - 1)
                skip_line(file)  # its beginning is the shard's before this one
            while file.tell() < shard.stop:
                line = file.readline(self.max_document_bytes + 1)
                name = f"{path}, line {number}"
                number += 1
                if len(line) > self.max_document_bytes:
                    rest = 0 if line.endswith(b"\n") else skip_line(file)
                    detail = f"{len(line) + rest:,} bytes, want at most {self.max_document_bytes:,}"
                    yield Skipped("too large", name, detail)
                elif line.strip():
                    yield Row(name, partial(self.values, line), open_file)

    def values(self, line: bytes) -> dict[str, Any]:
        """Decode a line.

        Raises:
            SkippedError: if it is no object.
        """
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            raise SkippedError("text is not UTF-8", str(error)) from error
        except (ValueError, RecursionError) as error:
            raise SkippedError("no JSON", str(error)) from error
        if isinstance(value, list):
            value = {"parts": value}
        if not isinstance(value, dict):
            raise SkippedError("no JSON object", f"got {type(value).__name__}")
        try:
            return column_names(value, self.columns)
        except KeyError as error:
            raise SkippedError("missing key", f"no key {error}") from error


def line_number(path: Path, offset: int) -> int:
    """Return the number, from one, of the first line that begins at ``offset`` or behind it."""
    number, left = 1, offset
    with path.open("rb") as file:
        last = b"\n"
        while left and (block := file.read(min(BLOCK, left))):
            number += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return number if last == b"\n" else number + 1


def skip_line(file: Any) -> int:
    """Read on behind the next line end, in blocks; return how many bytes that were."""
    skipped = 0
    while block := file.readline(BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped
