"""Windowed block shuffle: an endless order over a source that reads few chunks at a time."""

import zlib
from collections import deque
from collections.abc import Iterator

import numpy as np

WINDOW_CHUNKS = 8
"""Chunks whose documents are mixed with one another (our default)."""


class Order:
    """Documents of one source, epoch after epoch, each epoch every document once.

    An epoch shuffles the chunks, takes them ``window_chunks`` at a time, and shuffles the documents
    of such a window: nearly as mixed as a full shuffle, while a reader holds few chunks.

    Args:
        chunk_starts: first document of each chunk, and the number of documents last.
        seed: of the run.
        name: of the source; sources of one run differ in their order.
        only: bool for each document; False leaves it out. None: all documents.
        window_chunks: chunks mixed at a time.
    """

    def __init__(
        self,
        chunk_starts: np.ndarray,
        *,
        seed: int,
        name: str,
        only: np.ndarray | None = None,
        window_chunks: int = WINDOW_CHUNKS,
    ) -> None:
        self.chunk_starts: list[int] = chunk_starts.tolist()
        self.seed, self.name, self.only = seed, name, only
        self.window_chunks = window_chunks
        self.epoch = 0
        self.windows: Iterator[np.ndarray] = iter(())
        self.ahead: deque[int] = deque()

    def look(self, num: int) -> deque[int]:
        """Return the documents in sight: the next ``num``, or what is left of the epoch.

        The caller may remove any of them; what it leaves is served before the epoch ends.
        """
        while len(self.ahead) < num:
            window = next(self.windows, None)
            if window is not None:
                self.ahead.extend(window.tolist())
            elif self.ahead:
                break
            else:
                self.windows = self.shuffled_windows(self.epoch)
                self.epoch += 1
        return self.ahead

    def next(self) -> int:
        """Take the next document."""
        return self.look(1).popleft()

    def shuffled_windows(self, epoch: int) -> Iterator[np.ndarray]:
        """Shuffle one epoch, a window at a time: the rest is not drawn before it is needed."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch])
        order = rng.permutation(len(self.chunk_starts) - 1)
        for first in range(0, len(order), self.window_chunks):
            chunks = order[first : first + self.window_chunks]
            spans = [np.arange(self.chunk_starts[c], self.chunk_starts[c + 1]) for c in chunks]
            window = np.concatenate(spans)
            yield rng.permutation(window if self.only is None else window[self.only[window]])
