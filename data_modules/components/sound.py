"""Sounds as pictures: log-mel spectra that the vision encoder reads like any other picture.

An optional modality of ours, off by default; no report has it. Time runs to the right, pitch
upwards, brightness is loudness: 0 is ``RANGE_DB`` below the loudest place of the file. Each
picture is one stretch of time; its beginning stands before it as a timestamp, as of video chunks.
"""

import io
from collections.abc import Callable
from functools import cache

import av
import numpy as np
import torch
from PIL import Image

from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import MediaFile, Text
from moonlit.chat.template import timestamp

SAMPLE_RATE, WINDOW, HOP = 16_000, 1024, 320
"""Samples a second; samples of a spectrum; samples from one column to the next (20 ms)."""
NUM_MELS = 112
"""Rows: four tokens high."""
MAX_COLUMNS = 500
"""Columns of one picture: 10 s, 72 tokens."""
RANGE_DB = 80.0
MAX_SECONDS = 3600


def sound_parts(file: MediaFile, name: str) -> list[ImagePart | Text]:
    """Decode a sound into timestamps and pictures.

    Raises:
        ValueError: if there is no sound, it is damaged, or it is longer than an hour.
    """
    if not file.data:
        raise ValueError(f"sound {name!r} has no byte")
    try:
        samples = decoded_samples(file.data, name)
    except av.FFmpegError as error:
        raise ValueError(f"sound {name!r} ({len(file.data)} bytes): {error}") from error
    if not len(samples):
        raise ValueError(f"sound {name!r} has no sample")
    pixels = spectrum(samples)
    parts: list[ImagePart | Text] = []
    for start in range(0, pixels.shape[1], MAX_COLUMNS):
        picture = Image.fromarray(np.ascontiguousarray(pixels[:, start : start + MAX_COLUMNS]))
        parts.append(Text(timestamp(start * HOP / SAMPLE_RATE)))
        parts.append(ImagePart(picture.convert("RGB"), file))
    return parts


def has_sound(data: bytes) -> bool:
    """Say whether a file has an audio track; of what cannot be opened, that it has none."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            return bool(container.streams.audio)
    except av.FFmpegError:  # whoever decodes it will name it
        return False


def decoded_samples(data: bytes, name: str) -> np.ndarray:
    """Decode to one channel at ``SAMPLE_RATE``: float32 [samples]."""
    pieces, num_samples = [], 0
    with av.open(io.BytesIO(data), "r") as container:
        if not container.streams.audio:
            raise ValueError(f"sound {name!r} has no audio")
        resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        for frame in container.decode(audio=0):
            for resampled in resampler.resample(frame):
                pieces.append(resampled.to_ndarray()[0])
                num_samples += len(pieces[-1])
                if num_samples > MAX_SECONDS * SAMPLE_RATE:
                    raise ValueError(f"sound {name!r} is longer than {MAX_SECONDS} s")
        pieces += [resampled.to_ndarray()[0] for resampled in resampler.resample(None)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def spectrum(samples: np.ndarray) -> np.ndarray:
    """Return the log-mel spectrum as a picture: uint8 [mels, columns], pitch upwards."""
    power = mel_of()(torch.from_numpy(samples)).numpy()
    decibel = 10 * np.log10(np.maximum(power, 1e-10))
    scaled = (decibel - decibel.max() + RANGE_DB) / RANGE_DB
    return (255 * np.clip(scaled[::-1], 0, 1)).round().astype(np.uint8)


@cache
def mel_of() -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the transform."""
    from torchaudio.transforms import MelSpectrogram  # slow to import, and seldom needed

    return MelSpectrogram(SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, n_mels=NUM_MELS)
