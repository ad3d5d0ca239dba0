"""Cells that several programs begin with: look at a picture, find its background, name a colour."""

from collections.abc import Generator

from data_modules.world.things import COLOURS
from data_modules.zero_vision.problem import Cell, Names, Rng, UnexpectedOutputError, pick

LOOKS = (
    """
$img = images[$(place)]
print("size:", $img.size)
print("colors:", sorted($img.getcolors(65536), reverse=True)[:8])
""",
    """
import numpy as np
$px = np.array(images[$(place)])
values, counts = np.unique($px.reshape(-1, 3), axis=0, return_counts=True)
print("shape:", $px.shape)
for i in counts.argsort()[::-1][:8]:
    print(values[i].tolist(), counts[i])
""",
    """
from PIL import Image
$img = Image.open("image_$(place).png").convert("RGB")
print($img.size, $img.getpixel((0, 0)))
""",
)
LOOK_THOUGHTS = (
    "I cannot judge the pixels by eye, so I look at the size and the colours first.",
    "Let me look at what colours the picture has before I measure anything.",
    "First the basics: size, background, main colours.",
    "I start by inspecting the picture in code.",
    "The picture is plain shapes, so its few colours will tell a lot. I list them.",
)
LOAD = """
import numpy as np
$px = np.asarray(images[$(place)]).astype(int)
$bg = $px[0, 0]
"""


def look(rng: Rng, names: Names, place: int = 0, chance: float = 0.6) -> Generator[Cell, str, None]:
    """Often begin by looking at the picture's size and colours."""
    if rng.random() < chance:
        yield Cell(pick(rng, *LOOK_THOUGHTS), names(pick(rng, *LOOKS), place=place))


def palette(rng: Rng) -> str:
    """Write a dictionary of reference colours: near the usual ones, never the same twice."""
    entries = []
    for name in rng.permutation(list(COLOURS)):
        jittered = [int(min(255, max(0, c + rng.integers(-12, 13)))) for c in COLOURS[str(name)]]
        entries.append(f'"{name}": ({jittered[0]}, {jittered[1]}, {jittered[2]})')
    return "{" + ", ".join(entries) + "}"


def reference(rng: Rng, colour: str) -> str:
    """Write a colour as one would guess it."""
    near = [int(min(255, max(0, c + rng.integers(-15, 16)))) for c in COLOURS[colour]]
    return f"({near[0]}, {near[1]}, {near[2]})"


def colour_mask(rng: Rng, colour: str) -> str:
    """Write the line that makes ``$mask`` of one colour, by distance or by hue."""
    return pick(
        rng,
        f"$mask = np.abs($px - {reference(rng, colour)}).sum(axis=2) < {rng.integers(60, 80)}",
        f"$mask = (($px - np.array({reference(rng, colour)})) ** 2).sum(-1) < {rng.integers(38, 44)} ** 2",  # noqa: E501
        f"$mask = np.linalg.norm($px - {reference(rng, colour)}, axis=-1) < {rng.integers(38, 44)}",
    )


def whole(text: str) -> int:
    """Read a whole number that a cell printed.

    Raises:
        UnexpectedOutputError: if it is none.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UnexpectedOutputError(f"{text!r} is no whole number") from error
