"""Questions about Python's own documentation: which function of a module does what is described."""

import ast
import sysconfig
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_modules.tasks.source import HELD_OUT
from data_modules.world.docs import is_held_out, library_files
from data_modules.world.pages import (
    INKS,
    MARGIN,
    PAGE_HEIGHT,
    PAGE_WIDTH,
    font,
    line_height,
    set_lines,
)
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text

SUMMARY_CHARS = (20, 160)
FONT_SIZE = 12


class Documentation:
    """Makes tasks of the ability ``knowledge``: as text, or with the description on a page.

    A module of the standard library is in one split only.

    Args:
        seed: of everything.
        picture_fraction: of the tasks that show the description in a picture.
    """

    def __init__(self, *, seed: int, picture_fraction: float) -> None:
        if not 0 <= picture_fraction <= 1:
            raise ValueError(f"picture_fraction={picture_fraction}: want it in [0, 1]")
        self.seed, self.picture_fraction = seed, picture_fraction

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        files = described(split == HELD_OUT)
        module, functions = files[rng.integers(len(files))]
        name, summary = functions[rng.integers(len(functions))]
        is_drawn = rng.random() < self.picture_fraction
        asked = f"Which function of Python's module {module} does this: "
        content = (
            [ImagePart(page(summary, rng)), Text(asked + "what the page says?")]
            if is_drawn
            else [Text(asked + summary)]
        )
        return Task(
            prompt=[Message(role="user", content=content)],
            domain="knowledge",
            environment="exact",
            answer=name,
            tags={"module": module, "modality": "picture" if is_drawn else "text"},
        )


@lru_cache(maxsize=2)
def described(held_out: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the modules of a split, each with its functions' names and summaries."""
    files = enumerate(library_files())
    read = ((path, summaries(path)) for n, path in files if is_held_out(n) == held_out)
    return [(module_name(path), functions) for path, functions in read if functions]


def summaries(path: Path) -> list[tuple[str, str]]:
    """Return a file's public functions with the first line of their docstrings.

    Left out is what has no one answer: a line that two functions share, or that says the name.
    """
    found: list[tuple[str, str]] = []
    for node in ast.parse(path.read_text(encoding="utf-8", errors="replace")).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
        is_fit = SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1] and summary.isascii()
        if not node.name.startswith("_") and is_fit and node.name.lower() not in summary.lower():
            found.append((node.name, summary))
    shared = Counter(summary for _, summary in found)
    return [(name, summary) for name, summary in found if shared[summary] == 1]


def module_name(path: Path) -> str:
    """Return the name under which a file of the library is imported."""
    parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def page(text: str, rng: np.random.Generator) -> Image.Image:
    """Set a text on a page."""
    ink, paper = INKS[rng.integers(len(INKS))]
    image = Image.new("RGB", (PAGE_WIDTH, PAGE_HEIGHT), paper)
    pen = ImageDraw.Draw(image)
    # A last word that no line has room for ends the last line.
    lines = set_lines([*text.split(), "_" * 60], FONT_SIZE)
    for row, line in enumerate(lines):
        y = MARGIN + row * line_height(FONT_SIZE)
        pen.text((MARGIN, y), line, fill=ink, font=font(FONT_SIZE))
    return image
