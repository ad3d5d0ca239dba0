"""Checkpoints as folders: every rank writes its own shards, in the background.

A folder bears its name only when all of it is on the disk: it is written as ``.NAME.partial`` and
renamed by the first rank. It holds torch's distributed checkpoint (``model.*`` and
``optimizer.PARAMETER.STATE``, each whole tensor by its name, however it was cut) and ``state.pt``,
what Lightning keeps beside the tensors. So any other layout can read it.
"""

import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moonlit.hub.disk import remove, sync_folder

STATE_FILE, INDEX_FILE = "state.pt", ".metadata"
OPTIMIZER = "optimizer."


def is_sharded(path: Path | str) -> bool:
    """Say whether there is a whole sharded checkpoint at ``path``."""
    return (Path(path) / INDEX_FILE).is_file() and (Path(path) / STATE_FILE).is_file()


def fault_of_shards(path: Path) -> str | None:
    """Say what is wrong with a folder of shards; None if index, state and sizes are right."""
    if not is_sharded(path):
        return f"no {INDEX_FILE} or no {STATE_FILE}"
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
        with zipfile.ZipFile(path / STATE_FILE) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    if broken is not None:
        return f"{broken} in {STATE_FILE} has a wrong checksum"
    needed: dict[str, int] = {}
    for piece in (metadata.storage_data or {}).values():
        end = piece.offset + piece.length
        needed[piece.relative_path] = max(needed.get(piece.relative_path, 0), end)
    for name, size in needed.items():
        shard = path / name
        if not shard.is_file():
            return f"{name} is missing"
        if shard.stat().st_size < size:
            return f"{name} has {shard.stat().st_size:,} of {size:,} bytes"
    return None


class ShardedWriter:
    """Saves in the background, one checkpoint at a time.

    Args:
        group: of all ranks, on the CPU, and used for nothing else.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def save(self, tensors: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        """Copy everything, and begin to write; returns before it is on the disk.

        Raises:
            OSError: if the last checkpoint could not be written; names it.
        """
        self.finish()
        partial = path.with_name(f".{path.name}.partial")
        is_first = dist.get_rank(self.group) == 0
        problem: list[str | None] = [begin(partial, rest) if is_first else None]
        dist.broadcast_object_list(problem, group_src=0, group=self.group)
        if problem[0] is not None:  # on every rank, so that none waits for another
            raise OSError(f"cannot write the checkpoint {path}: {problem[0]}")
        writer = dcp.FileSystemWriter(partial, sync_files=True)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        assert isinstance(future, Future)
        self.thread = threading.Thread(
            target=self._settle, args=(future, partial if is_first else None, path)
        )
        self.thread.start()

    def _settle(self, future: "Future[Any]", partial: Path | None, path: Path) -> None:
        """Wait for all ranks' shards, then give the folder its name."""
        try:
            future.result()  # the first rank's is the last: it has heard of all the others'
            if partial is not None:
                sync_folder(partial)
                replace_folder(partial, path)
        except BaseException as error:
            error.add_note(f"while writing the checkpoint {path}")
            self.failure = error

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: if it could not be written; names it.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise OSError(
                f"{'; '.join(failure.__notes__)}: {type(failure).__name__}: {failure}"
            ) from failure


def begin(partial: Path, rest: dict[str, Any]) -> str | None:
    """Make the folder with what is no tensor; return why that is impossible."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.mkdir()
        with (partial / STATE_FILE).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save turns some of the first into the second
        return str(error)
    return None


def replace_folder(new: Path, path: Path) -> None:
    """Rename a folder over another one, which stays whole beside it until then."""
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.exists() or path.is_symlink():
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    remove(old)


def named_parameters_of(module: nn.Module) -> dict[Tensor, str]:
    """Return the name of every parameter, as the state dict spells it."""
    return {parameter: name for name, parameter in module.named_parameters()}


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's tensors as ``optimizer.PARAMETER.STATE``.

    Rates and coefficients are the configuration's; they are not saved.
    """
    names = named_parameters_of(module)
    return {
        f"{OPTIMIZER}{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_sharded(
    path: Path, module: nn.Module, optimizer: Optimizer | None, *, weights_only: bool | None
) -> dict[str, Any]:
    """Read shards into a module and an optimizer that may be cut otherwise; return the rest.

    Raises:
        FileNotFoundError: if there is no whole checkpoint at ``path``.
        ValueError: if a tensor is missing or misshapen; names them.
    """
    reader, stored = open_sharded(path)
    state: dict[str, Any] = dict(module.state_dict())
    require_stored(stored, {name: t.shape for name, t in state.items()}, path)
    if optimizer is not None:
        state |= make_optimizer_state(optimizer, module, stored)
    dcp.load(state, storage_reader=reader)
    return torch.load(path / STATE_FILE, map_location="cpu", weights_only=weights_only)


def make_optimizer_state(
    optimizer: Optimizer, module: nn.Module, stored: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Give the optimizer zeros wherever the checkpoint has a state; return them by name."""
    names, made = named_parameters_of(module), {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{OPTIMIZER}{names[parameter]}."
            for key in [name for name in stored if name.startswith(prefix)]:
                like = (
                    torch.zeros_like(parameter)
                    if stored[key] == parameter.shape
                    else torch.zeros(stored[key], dtype=torch.float32, device=parameter.device)
                )
                optimizer.state[parameter][key.removeprefix(prefix)] = like
                made[key] = like
    return made


def open_sharded(path: Path) -> tuple[dcp.FileSystemReader, dict[str, torch.Size]]:
    """Return a reader, and the shape of every tensor.

    Raises:
        FileNotFoundError: if there is no whole checkpoint at ``path``.
    """
    if not is_sharded(path):
        raise FileNotFoundError(f"no sharded checkpoint at {path}")
    reader = dcp.FileSystemReader(path)
    index = reader.read_metadata().state_dict_metadata
    return reader, {n: m.size for n, m in index.items() if isinstance(m, TensorStorageMetadata)}


def require_stored(
    stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], path: Path
) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ValueError: naming what is missing or misshapen.
    """
    missing = [name for name in wanted if name not in stored]
    misshapen = [
        f"{name} is {list(stored[name])}, the model has {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if missing or misshapen:
        lines = [f"{path} does not fit the model:"]
        lines += [f"  missing ({len(missing)}): {', '.join(missing[:5])}"] if missing else []
        lines += (
            [f"  misshapen ({len(misshapen)}): {'; '.join(misshapen[:5])}"] if misshapen else []
        )
        raise ValueError("\n".join(lines))


class ShardedWeights(Mapping[str, Tensor]):
    """A network's weights by name, each put together from its shards when it is asked for.

    The last one asked for is kept: a stack of experts is asked for once an expert.

    Args:
        path: a sharded checkpoint.
        prefix: what the names of the network's weights begin with there.
    """

    def __init__(self, path: Path, *, prefix: str) -> None:
        self.reader, stored = open_sharded(path)
        index = self.reader.read_metadata().state_dict_metadata
        self.prefix = prefix
        self.stored = {
            name.removeprefix(prefix): index[name] for name in stored if name.startswith(prefix)
        }
        self.last: tuple[str, Tensor] | None = None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor, from the index."""
        entries: dict[str, Any] = self.stored
        return {name: entry.size for name, entry in entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        if self.last is None or self.last[0] != name:
            entry: Any = self.stored[name]
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            self._read({self.prefix + name: tensor})
            self.last = (name, tensor)
        return self.last[1]

    def read_into(self, parameters: Mapping[str, Tensor]) -> None:
        """Fill tensors, or this rank's shards of them, whatever layout wrote the shards."""
        self._read({self.prefix + name: tensor for name, tensor in parameters.items()})

    def _read(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors; the parts of ranks may differ, and each reads its own."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = dcp.FileSystemReader(self.reader.path)
            dcp.load(tensors, storage_reader=reader, no_dist=True)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the index."""
        return iter(self.stored)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.stored)
