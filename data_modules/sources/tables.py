"""Parquet files, and folders of Hugging Face ``datasets``: rows of columns, read by Arrow.

Columns are named as a row's keys are (``rows.py``): ``messages``, ``parts``, or ``image`` and
``text``. Of the structs of a ``parts`` column one field is set, the others are null. A column
``parts`` or ``messages`` may hold JSON as text.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_modules.sources.readers import Shard, column_names, expanded, state_of
from data_modules.sources.rows import Row, Skipped, SkippedError, file_in

ROWS_AT_ONCE = 16


class Parquet:
    """Reads Parquet files, a shard a row group.

    Args:
        files: paths, with ``{000..127}`` and ``*``.
        media_folder: where the rows' paths begin; None: each file's own folder.
        columns: our names of the columns, where they are called otherwise.
        max_document_bytes: a larger medium is left out.
    """

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        media_folder: str | None,
        columns: dict[str, str] | None,
        max_document_bytes: int,
    ) -> None:
        self.files, self.media_folder = expanded(files, "Parquet file"), media_folder
        self.columns, self.max_document_bytes = dict(columns or {}), max_document_bytes

    def shards(self) -> list[Shard]:
        """One for each row group; a file whose foot is damaged is one, to be counted."""
        shards = []
        for file in self.files:
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError):
                shards.append(Shard(name=f"{file}", size=0, start=0, stop=1, path=file))
                continue
            for group in range(metadata.num_row_groups):
                size = metadata.row_group(group).total_byte_size
                name = f"{file}, row group {group}"
                shards.append(Shard(name=name, size=size, start=group, stop=group + 1, path=file))
        return shards

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        return {
            "files": state_of(self.files),
            "media_folder": self.media_folder,
            "columns": self.columns,
            "max_document_bytes": self.max_document_bytes,
        }

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream a row group's rows."""
        path = Path(shard.path)
        folder = Path(self.media_folder) if self.media_folder is not None else path.parent
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                first = sum(file.metadata.row_group(g).num_rows for g in range(shard.start))
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[shard.start]):
                    for values in batch.to_pylist():
                        name = f"{path}, row {first + number}"
                        number += 1
                        yield self.row(name, values, folder)
        except (pa.ArrowException, OSError) as error:
            yield Skipped("damaged file", shard.name, f"after {number} rows: {error}")

    def row(self, name: str, values: dict[str, Any], folder: Path) -> Row:
        """Wrap a row."""
        open_file = partial(file_in, folder, max_bytes=self.max_document_bytes)
        return Row(name, partial(table_values, values, self.columns), open_file)


class DatasetsFolder:
    """Reads what ``datasets.Dataset.save_to_disk`` wrote, a shard an Arrow file.

    Args:
        folder: of a ``Dataset``, or of a ``DatasetDict``.
        split: of a ``DatasetDict``; None for a ``Dataset``.
        columns: our names of the columns, where they are called otherwise.
        max_document_bytes: a larger medium is left out.
    """

    def __init__(
        self,
        *,
        folder: str,
        split: str | None,
        columns: dict[str, str] | None,
        max_document_bytes: int,
    ) -> None:
        self.folder = Path(folder) / split if split is not None else Path(folder)
        self.columns, self.max_document_bytes = dict(columns or {}), max_document_bytes
        self.files = self.listed()

    def listed(self) -> list[str]:
        """List the folder's Arrow files.

        Raises:
            FileNotFoundError: if it is no such folder; with its splits, if it has any.
        """
        state = self.folder / "state.json"
        if not state.is_file():
            splits = self.folder / "dataset_dict.json"
            told = "want a folder that Dataset.save_to_disk wrote"
            if splits.is_file():
                names = json.loads(splits.read_text())["splits"]
                told = f"set source.reader.split to one of {names}"
            raise FileNotFoundError(f"no dataset in {self.folder}: {told}")
        named = json.loads(state.read_text())["_data_files"]
        return [str(self.folder / file["filename"]) for file in named]

    def shards(self) -> list[Shard]:
        """One for each Arrow file."""
        return [
            Shard(name=file, size=Path(file).stat().st_size, path=file)
            for file in self.files
        ]  # fmt: skip

    def asked_for(self) -> dict[str, Any]:
        """Everything that the rows are a function of."""
        return {
            "files": state_of(self.files),
            "columns": self.columns,
            "max_document_bytes": self.max_document_bytes,
        }

    def rows(self, shard: Shard) -> Iterator[Row | Skipped]:
        """Stream an Arrow file's rows."""
        open_file = partial(file_in, self.folder, max_bytes=self.max_document_bytes)
        number = 0
        try:
            with pa.memory_map(shard.path) as source, pa.ipc.open_stream(source) as batches:
                for batch in batches:
                    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                        for values in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                            name = f"{shard.path}, row {number}"
                            number += 1
                            yield Row(name, partial(table_values, values, self.columns), open_file)
        except (pa.ArrowException, OSError) as error:
            yield Skipped("damaged file", shard.name, f"after {number} rows: {error}")


def table_values(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Rename a row's columns and decode those that hold JSON.

    Raises:
        SkippedError: if a column is missing, or its JSON is none.
    """
    try:
        named = column_names(values, columns)
    except KeyError as error:
        raise SkippedError("missing key", f"no column {error}") from error
    for key in ("parts", "messages"):
        if isinstance(named.get(key), str):
            try:
                named[key] = json.loads(named[key])
            except ValueError as error:
                raise SkippedError("no JSON", f"in {key}: {error}") from error
    return named
