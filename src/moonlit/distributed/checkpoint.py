"""Single-file checkpoints that are never seen half written; weights out of files and folders."""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from moonlit.distributed.sharded_checkpoint import (
    STATE_FILE,
    ShardedWeights,
    fault_of_shards,
    is_sharded,
)
from moonlit.hub.disk import remove, replacing
from moonlit.hub.mismatch import require_fit
from moonlit.hub.reader import materialise
from moonlit.models.kimi import Kimi
from moonlit.models.placement import write
from moonlit.models.shapes import DecoderShape, EncoderShape

MODEL_PREFIX = "model."
"""Every phase holds the network it trains under this attribute."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the checkpoint, syncs, renames: a kill at any moment leaves the old file.

    Tensors go to the disk one by one; no copy of the whole checkpoint is held in memory.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint, or leave everything as it was.

        Raises:
            OSError: if the disk is full; names the path and the bytes needed.
        """
        if storage_options is not None:
            raise ValueError(
                f"storage_options must be None for a local file, got {storage_options}"
            )
        with replacing(Path(path), tensor_bytes(checkpoint)) as partial:
            write_synced(checkpoint, partial)

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: if there is none; names the path.
            ValueError: if it is truncated or no checkpoint at all; names the path.
        """
        return read(Path(path), map_location=map_location, weights_only=weights_only)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete a checkpoint if it exists."""
        remove(Path(path))


def weights_of(path: _PATH) -> Mapping[str, Tensor]:
    """Return the network's weights in a checkpoint, by the names the network gives them.

    The tensors stay on the disk until they are used.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is truncated or holds no weights.
    """
    if is_sharded(path):
        return ShardedWeights(Path(path), prefix=MODEL_PREFIX)
    checkpoint = read(Path(path), map_location="cpu", weights_only=None, mmap=True)
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in checkpoint.get("state_dict", {}).items()
        if name.startswith(MODEL_PREFIX)
    }
    if not weights:
        raise ValueError(f"{path} holds no weights: no {MODEL_PREFIX}* in its state_dict")
    return weights


@torch.no_grad()
def load_weights(
    model: nn.Module, path: _PATH, *, shapes: Mapping[str, torch.Size] | None = None
) -> None:
    """Start a network from the weights in a checkpoint, a file or a folder of shards.

    Args:
        model: the network, or one rank's part of it.
        path: the checkpoint.
        shapes: of the whole network's state dict, where ``model`` is a part.

    Raises:
        ValueError: if a tensor is missing, unexpected or misshapen; names them all.
    """
    weights = weights_of(path)
    parameters = model.state_dict()
    require_fit(shapes_of(weights), shapes or shapes_of(parameters), source=str(path))
    if isinstance(weights, ShardedWeights):
        weights.read_into(parameters)
        return
    for name, parameter in parameters.items():
        write(parameter, weights[name])


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of every tensor, without reading a shard."""
    if isinstance(weights, ShardedWeights):
        return weights.shapes
    return {name: tensor.shape for name, tensor in weights.items()}


def model_from_checkpoint(path: _PATH) -> Kimi:
    """Build the network a checkpoint was trained with, and give it its weights.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is truncated, or holds no shapes or no weights.
    """
    model, _ = stored_model(path)
    materialise(model, "cpu")
    load_weights(model, path)
    return model


def account_of(path: _PATH) -> dict[str, Any]:
    """Return what a checkpoint says of itself, such as ``shapes`` and ``made_by``.

    Weights that it holds stay on the disk until they are used.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is truncated, or holds no shapes.
    """
    rest = Path(path) / STATE_FILE if is_sharded(path) else Path(path)
    checkpoint = read(rest, map_location="cpu", weights_only=None, mmap=True)
    if "shapes" not in checkpoint:
        raise ValueError(f"{path} does not say the model's shapes: no phase of ours wrote it")
    return checkpoint


def stored_model(path: _PATH) -> tuple[Kimi, Mapping[str, Tensor]]:
    """Return the network a checkpoint was trained with, without memory, and its weights by name.

    The weights stay on the disk until they are used.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is truncated, holds no shapes or no weights, or does not fit them.
    """
    checkpoint = account_of(path)
    decoder, vision = checkpoint["shapes"]["decoder"], checkpoint["shapes"]["vision"]
    with torch.device("meta"):
        model = Kimi(
            decoder=DecoderShape(**decoder),
            vision=None if vision is None else EncoderShape(**vision),
        )
    weights = weights_of(path)
    require_fit(shapes_of(weights), shapes_of(model.state_dict()), source=str(path))
    return model, weights


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint on the disk, reading all of a file; None if it is whole.

    Of a folder of shards the index, the small state and the sizes are looked at: reading every
    byte of a large model would take longer than resuming from it.
    """
    if path.is_dir():
        return fault_of_shards(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    return None if broken is None else f"{broken} has a wrong checksum"


def tensor_bytes(checkpoint: object) -> int:
    """Return the bytes of all tensors; those that share memory are written, and counted, once."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(checkpoint)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


class WatchedFile(io.FileIO):
    """A file that remembers why a write failed: ``torch.save`` hides it behind RuntimeError."""

    failure: OSError | None = None

    @override
    def write(self, data: Any) -> int:
        """Write like any file."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def write_synced(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a new file and wait until the disk has it."""
    raw = WatchedFile(path, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(raw.fileno())
    except RuntimeError as error:
        raise raw.failure or error from error


def read(
    path: Path, *, map_location: Any, weights_only: bool | None, mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint file; the errors name it."""
    if is_sharded(path):
        raise ValueError(
            f"{path} is a folder of shards: go on with strategy=dep, on one process too"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not zipfile.is_zipfile(path):  # the archive's directory is written last
        raise ValueError(f"{path} is truncated or no checkpoint ({path.stat().st_size:,} bytes)")
    try:
        return torch.load(
            str(path), map_location=map_location, weights_only=weights_only, mmap=mmap
        )
    except (pickle.UnpicklingError, RuntimeError) as error:  # a zip file, but another kind
        raise ValueError(f"{path} is no checkpoint: {error}") from error
