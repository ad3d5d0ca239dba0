"""What a cell prints and shows, capped while it runs so that no cell can fill the memory."""

import base64
import io
import threading
from collections.abc import Collection
from typing import Any


class CappedText(io.TextIOBase):
    """A text stream that keeps the first three quarters of its cap and the last quarter.

    Args:
        max_chars: the cap.
        refused: threads whose writes are dropped and counted.
    """

    def __init__(self, max_chars: int, refused: Collection[threading.Thread] = ()) -> None:
        self.tail_chars = max_chars // 4
        self.head_chars = max_chars - self.tail_chars
        self.head, self.tail = io.StringIO(), ""
        self.num_chars = self.num_refused = 0
        self.refused = refused

    def write(self, text: str) -> int:
        """Append."""
        if self.refused and threading.current_thread() in self.refused:
            self.num_refused += len(text)
            return len(text)
        room = max(0, self.head_chars - self.head.tell())
        self.head.write(text[:room])
        if rest := text[room:]:
            self.tail = (self.tail + rest[-self.tail_chars :])[-self.tail_chars :]
        self.num_chars += len(text)
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """Return descriptor 1, for code that writes past Python."""
        return 1

    def text(self) -> str:
        """Return what was kept, saying what was not."""
        left_out = self.num_chars - self.head.tell() - len(self.tail)
        middle = f"\n... {left_out} characters left out ...\n" if left_out else ""
        note = f"\n[{self.num_refused} characters from threads of earlier calls left out]"
        return self.head.getvalue() + middle + self.tail + (note if self.num_refused else "")


class Pictures:
    """Pictures of one call, as raw RGB: the trainer decodes no file that a worker made."""

    def __init__(self) -> None:
        self.begin(1, 1)

    def begin(self, max_images: int, max_pixels: int) -> None:
        """Forget those of the last call."""
        self.max_images, self.max_pixels = max_images, max_pixels
        self.kept: list[Any] = []
        self.num_left_out = 0

    def add(self, value: object) -> str | None:
        """Keep a picture or figure and return its caption; None: it is neither."""
        import numpy as np
        from matplotlib.figure import Figure
        from PIL import Image

        if isinstance(value, Figure):
            from matplotlib import pyplot
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            canvas = FigureCanvasAgg(value)
            canvas.draw()
            pyplot.close(value)
            value = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        if not isinstance(value, Image.Image):
            return None
        caption = f"<image of {value.width} x {value.height} px>"
        if len(self.kept) == self.max_images or not all(value.size):
            self.num_left_out += 1
            return f"{caption} left out"
        self.kept.append(self.shrink(value).convert("RGB"))
        return caption

    def shrink(self, picture: Any) -> Any:
        """Shrink a picture to the cap."""
        scale = (self.max_pixels / (picture.width * picture.height)) ** 0.5
        if scale >= 1:
            return picture
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        if size[0] * size[1] > self.max_pixels:  # one side was less than a pixel
            size = (min(size[0], self.max_pixels), 1) if size[1] == 1 else (1, self.max_pixels)
        return picture.convert("RGB").resize(size)

    def add_open_figures(self) -> None:
        """Keep the figures that pyplot has open, and close them."""
        from matplotlib import pyplot

        for number in pyplot.get_fignums():
            self.add(pyplot.figure(number))

    def as_json(self) -> list[dict[str, Any]]:
        """Return sizes and pixels."""
        return [
            {"size": picture.size, "data": base64.b64encode(picture.tobytes()).decode()}
            for picture in self.kept
        ]
