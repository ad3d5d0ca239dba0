"""A folder of pictures, videos or sounds with captions.

``photo.jpg`` has its caption in ``photo.txt`` beside it, or in a ``metadata.jsonl`` of the folder::

    {"file_name": "photo.jpg", "text": "..."}
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_modules.sources.readers import Shard
from data_modules.sources.rows import Row, Skipped, SkippedError, file_in
from data_modules.sources.web_dataset import EXTENSIONS, TEXT_EXTENSIONS

METADATA = "metadata.jsonl"
KIND_OF = {f".{e}": kind for kind, extensions in EXTENSIONS.items() for e in extensions}


class CaptionedFolder:
    """Reads media files below a folder, in the order of their names.

    Args:
        folder: searched with its subfolders.
        files_per_shard: media files that one process reads at a time.
        max_document_bytes: a larger file is left out.
    """

    def __init__(self, *, folder: str, files_per_shard: int, max_document_bytes: int) -> None:
        self.folder = Path(folder)
        self.files_per_shard, self.max_document_bytes = files_per_shard, max_document_bytes
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: set source.reader.folder")
        self.files = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.suffix.lower() in KIND_OF
        )
        if not self.files:
            raise FileNotFoundError(f"no picture, video or sound in {folder}")
        self.captions, self.bad_lines = self.read_metadata()

    def read_metadata(self) -> tuple[dict[str, Any], list[Skipped]]:
        """Return captions by file, and the lines that are none."""
        captions, bad = {}, []
        path = self.folder / METADATA
        if path.is_file():
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                try:
                    value = json.loads(line)
                    captions[value["file_name"]] = value["text"]
                except KeyError as error:
                    bad.append(Skipped("missing key", f"{path}, line {number}", f"no key {error}"))
                except (ValueError, TypeError) as error:
                    bad.append(Skipped("no JSON", f"{path}, line {number}", str(error)))
        return captions, bad

    def shards(self) -> list[Shard]:
        """Cut the list of files."""
        return [
            Shard(
                name=f"{self.folder}, files {start} to {stop}",
                size=stop - start,
                start=start,
                stop=stop,
            )
            for start in range(0, len(self.files), self.files_per_shard)
            for stop in [min(start + self.files_per_shard, len(self.files))]
        ]

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        metadata = self.folder / METADATA
        state = {}
        for file in self.files:
            path = self.folder / file
            captions = [path.with_suffix(f".{e}") for e in TEXT_EXTENSIONS]
            state[file] = [p.stat().st_mtime_ns for p in (path, *captions) if p.is_file()]
        return {
            "folder": str(self.folder),
            "files": state,
            "metadata": metadata.read_text("utf-8", "replace") if metadata.is_file() else None,
            "files_per_shard": self.files_per_shard,
            "max_document_bytes": self.max_document_bytes,
        }

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream the shard's files; the first shard also tells of bad lines of the metadata."""
        if shard.start == 0:
            yield from self.bad_lines
        open_file = partial(file_in, self.folder, max_bytes=self.max_document_bytes)
        for file in self.files[shard.start : shard.stop]:
            name = str(self.folder / file)
            yield Row(name, partial(self.values, file), open_file)

    def values(self, file: str) -> dict[str, Any]:
        """Return a file and its caption.

        Raises:
            SkippedError: if there is none.
        """
        path = Path(file)
        text = self.captions.get(file)
        for extension in TEXT_EXTENSIONS:
            beside = path.with_suffix(f".{extension}")
            if text is None and (self.folder / beside).is_file():
                text = file_in(self.folder, str(beside), self.max_document_bytes)
        if text is None:
            raise SkippedError("no caption", f"want {path.stem}.txt or a line of {METADATA}")
        return {KIND_OF[path.suffix.lower()]: file, "text": text}
