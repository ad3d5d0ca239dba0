"""The next step, before it is trained: what lets work for it begin behind this one's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from moonlit.batch import PackedBatch


class LookAhead:
    """Iterates a loader of planned steps; ``coming`` shows the one that will be handed out next.

    A step is read ahead only when someone asks.

    Args:
        loader: of known length, whose steps do not depend on the training.
        to_device: moves a step to where it is trained.
    """

    def __init__(self, loader: Iterable[Any], *, to_device: Callable[[Any], Any]) -> None:
        self.loader, self.to_device = loader, to_device
        self.source: Iterator[Any] = iter(())
        self.held: list[PackedBatch] | None = None

    def __len__(self) -> int:
        """Steps of the loader."""
        return len(self.loader)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Hand out the steps in order."""
        self.source, self.held = iter(self.loader), None
        while (step := self.coming()) is not None:
            self.held = None
            yield step

    def coming(self) -> list[PackedBatch] | None:
        """Return the next step, on the device; None at the end."""
        if self.held is None:
            self.held = next(map(self.to_device, self.source), None)
        return self.held


def same_media(some: Sequence[PackedBatch], others: Sequence[PackedBatch]) -> bool:
    """Say whether two lists of microbatches hold the very same pixels."""
    pixels, theirs = (
        [None if b.media is None else b.media.pixel_values for b in rows] for rows in (some, others)
    )
    return len(pixels) == len(theirs) and all(a is b for a, b in zip(pixels, theirs, strict=True))
