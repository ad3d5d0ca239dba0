"""Small files of every kind, and corpora made of them."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_modules.sources.prepare import PrepareSource
from data_modules.sources.readers import Reader

MAX_BYTES = 100_000
LIMIT = {"max_document_bytes": MAX_BYTES}
TABLE: dict[str, Any] = {"media_folder": None, "columns": {}, **LIMIT}


def picture(shade: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded picture whose left half is darker."""
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[:, : size[0] // 2] //= 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def video(num_frames: int = 9, fps: int = 4, size: tuple[int, int] = (64, 48)) -> bytes:
    """An MP4 whose frames grow brighter, 20 a frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), min(20 * number, 255), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar."""
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def json_lines(path: Path, rows: list[Any]) -> Path:
    """Write rows; bytes are lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def preparing(folder: Path, reader: Reader, **changes: Any) -> PrepareSource:
    """What ``moonlit prepare`` builds."""
    settings: dict[str, Any] = {
        "folder": str(folder),
        "reader": reader,
        "tokenizer": "embedded",
        "max_document_tokens": 512,
        "sound": False,
        "num_processes": 2,
    }
    return PrepareSource(**settings | changes)


def prepared(folder: Path, reader: Reader, **changes: Any) -> dict[str, Any]:
    """Prepare a source and return its closing report."""
    preparing(folder, reader, **changes).prepare_data()
    return json.loads((folder / "source.json").read_text())["report"]
