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
from data_modules.sources.rows import Row, Skipped, SkippedError, check_inside, file_in
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
        self.captions, bad_lines = self.read_metadata()
        self.left_out = [*bad_lines, *self.files_left_out()]

    def read_metadata(self) -> tuple[dict[str, Any], list[Skipped]]:
        """Return captions by file, and the lines that are none."""
        captions, bad = {}, []
        path = self.folder / METADATA
        if path.is_file():
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                try:
                    value = json.loads(line)
                    file, text = value["file_name"], value["text"]
                    self.require_new(file, captions)
                    captions[file] = text
                except SkippedError as error:
                    place = f"{path}, line {number}"
                    bad.append(Skipped(error.reason, place, error.detail))
                except KeyError as error:
                    bad.append(Skipped("missing key", f"{path}, line {number}", f"no key {error}"))
                except (ValueError, TypeError) as error:
                    bad.append(Skipped("no JSON", f"{path}, line {number}", str(error)))
        return captions, bad

    def require_new(self, file: str, captions: dict[str, Any]) -> None:
        """Refuse a caption of a file that is not there, or has one.

        Raises:
            SkippedError: naming it.
        """
        check_inside(file)
        if file not in self.files:
            raise SkippedError("missing medium", f"no file {self.folder / file} of a known kind")
        if file in captions:
            raise SkippedError("second caption", f"{file!r} has one already")

    def files_left_out(self) -> Iterator[Skipped]:
        """Name the files that are neither a medium nor the caption of one."""
        captions = {
            str(Path(file).with_suffix(f".{e}")) for file in self.files for e in TEXT_EXTENSIONS
        }
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(self.folder))
            if path.suffix.lower() in KIND_OF or name in captions or name == METADATA:
                continue
            is_caption = path.suffix.lower().lstrip(".") in TEXT_EXTENSIONS
            yield Skipped("caption without a medium" if is_caption else "unknown kind", str(path))

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
        """Stream the shard's files; the first shard also tells what is left out of the folder."""
        if shard.start == 0:
            yield from self.left_out
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
