"""Files that are either whole or absent: written beside their place, renamed when complete."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, num_bytes: int) -> Iterator[Path]:
    """Hand out a temporary name beside ``path``; rename what was written there when all went well.

    Whatever interrupts the writing, ``path`` holds either what it held before or all of the new
    content, and the temporary is removed (only a killed process leaves it, under a hidden name
    that the next attempt reuses). The caller syncs the files; the rename is synced here.

    Args:
        path: a file, or a folder that is new or empty.
        num_bytes: what will be written [bytes]; asked of the disk before the first byte.

    Raises:
        OSError: if the disk is or gets full; names the path and the bytes needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    if (free := shutil.disk_usage(path.parent).free) < num_bytes:
        raise OSError(
            errno.ENOSPC, f"no space left: {num_bytes:,} bytes needed, {free:,} free", str(path)
        )
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        remove(partial)
        if error.errno not in DISK_IS_FULL:
            raise
        problem = f"{os.strerror(error.errno).lower()}: {num_bytes:,} bytes needed"
        raise OSError(error.errno, problem, str(path)) from error
    except BaseException:  # Ctrl-C too must leave no half-written file behind
        remove(partial)
        raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a small file that readers see whole, the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
