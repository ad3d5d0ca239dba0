"""Changes of pictures that keep what is said of them true; pure functions of a key.

Colours may change wherever colour is not asked for. Mirroring and cropping move boxes, points and
polygons too (torchvision's ``tv_tensors``), and are only for pictures whose coordinates are at
hand: words such as "left" cannot be mended.

Source: augmentation that keeps coordinates and orientation right: technical report
(arXiv:2602.02276), App. C.1. Which changes there are is not stated: these are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

F: Any = functional
"""Typed for tensors only; it takes Pillow's pictures too."""

Key = tuple[int, ...]
"""Seed, step and document, or whatever else tells one drawing from all others."""
Point = Sequence[float]
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotated:
    """A picture and what is known of its places, in [0, 1] of its width and height."""

    image: Image.Image
    boxes: Sequence[Sequence[float]] = ()
    """Left, top, right, bottom."""
    points: Sequence[Point] = ()
    polygons: Sequence[Sequence[Point]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How much may change.

    Raises:
        ValueError: if a number makes no sense.
    """

    brightness: float = 0.0
    """Factors are drawn from 1 minus to 1 plus this; so also contrast and saturation."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Of the colour circle; at most half of it."""
    mirror: float = 0.0
    """Probability of mirroring left and right."""
    smallest_crop: float = 1.0
    """A crop keeps at least this fraction of each side; 1: no crop."""

    def __post_init__(self) -> None:
        for key in ("brightness", "contrast", "saturation", "mirror"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"augmentation.{key}={getattr(self, key)}: want it in [0, 1]")
        if not 0 <= self.hue <= 0.5 or not 0 < self.smallest_crop <= 1:
            raise ValueError(
                f"augmentation.hue={self.hue}, smallest_crop={self.smallest_crop}: want them in "
                "[0, 0.5] and (0, 1]"
            )

    def colours(self, frames: Sequence[Image.Image], key: Key) -> list[Image.Image]:
        """Change the colours of the frames of one item alike; sizes stay as they are."""
        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(key))
            *changed, _ = jitter(*(frame.convert("RGB") for frame in frames), None)
        return changed

    def __call__(self, annotated: Annotated, key: Key) -> Annotated:
        """Change colours, mirror and crop a picture; it keeps its size.

        A crop is drawn around all places: what an answer speaks of must stay in the picture.
        """
        (image,) = self.colours([annotated.image], key)
        width, height = image.size
        rng = np.random.default_rng(key)
        places = Places.of(annotated, width, height)
        if rng.random() < self.mirror:
            image, places = F.horizontal_flip(image), places.changed(F.horizontal_flip)
        left, top, right, bottom = crop_around(places, self.smallest_crop, width, height, rng)
        crop = (top, left, bottom - top, right - left, [height, width])
        image = F.resized_crop(image, *crop)
        places = places.changed(lambda tensor: F.resized_crop(tensor, *crop))
        return places.annotated(image, annotated)


@dataclass(frozen=True, slots=True)
class Places:
    """Boxes, points and polygons' corners end to end, all as boxes, in pixels.

    Points are boxes without extent: torchvision mirrors its ``KeyPoints`` by the middle of the
    first and last pixel, one pixel beside its boxes.
    """

    boxes: tv_tensors.BoundingBoxes

    @classmethod
    def of(cls, annotated: Annotated, width: int, height: int) -> "Places":
        """Scale to pixels."""
        corners = [corner for polygon in annotated.polygons for corner in polygon]
        points = [[*point, *point] for point in (*annotated.points, *corners)]
        boxes = torch.tensor([*map(list, annotated.boxes), *points], dtype=torch.float64)
        side = torch.tensor([width, height, width, height], dtype=torch.float64)
        return cls(
            tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]
                boxes.reshape(-1, 4) * side,
                format=tv_tensors.BoundingBoxFormat.XYXY,
                canvas_size=(height, width),
            )
        )

    def changed(self, change: Change) -> "Places":
        """Move everything; nothing at all stays nothing."""
        return Places(change(self.boxes)) if len(self.boxes) else self  # pyright: ignore

    @property
    def extent(self) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of all places; None: there are none."""
        if not len(self.boxes):
            return None
        corners = torch.as_tensor(self.boxes).reshape(-1, 2)
        return (*corners.amin(0).tolist(), *corners.amax(0).tolist())

    def annotated(self, image: Image.Image, before: Annotated) -> Annotated:
        """Scale back to [0, 1], as many places of each kind as there were before."""
        side = torch.tensor([*image.size, *image.size], dtype=torch.float64)
        places = (torch.as_tensor(self.boxes) / side).tolist()
        num_boxes, num_points = len(before.boxes), len(before.points)
        points = [place[:2] for place in places[num_boxes:]]
        polygons, start = [], num_points
        for polygon in before.polygons:
            polygons.append(points[start : start + len(polygon)])
            start += len(polygon)
        return Annotated(
            image=image, boxes=places[:num_boxes], points=points[:num_points], polygons=polygons
        )


def crop_around(
    places: Places, smallest: float, width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop that holds all places: left, top, right, bottom in whole pixels."""
    least_width, least_height = (smallest + (1 - smallest) * rng.random()) * np.array(
        [width, height]
    )
    left, top = rng.random() * (width - least_width), rng.random() * (height - least_height)
    right, bottom = left + least_width, top + least_height
    if places.extent is not None:
        first_x, first_y, last_x, last_y = places.extent
        left, top = min(left, first_x), min(top, first_y)
        right, bottom = max(right, last_x), max(bottom, last_y)
    return (
        max(0, int(np.floor(left))),
        max(0, int(np.floor(top))),
        min(width, int(np.ceil(right))),
        min(height, int(np.ceil(bottom))),
    )


def seed_of(key: Key) -> int:
    """One number from a key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
