"""A tone as a file."""

import io
import wave

import numpy as np


def tone(frequency: float, seconds: float, rate: int = 8000) -> bytes:
    """A WAV."""
    samples = np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((20_000 * samples).astype("<i2").tobytes())
    return file.getvalue()
