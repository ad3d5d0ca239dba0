"""``moonlit prepare source=zero_vision_pictures``: the same trajectories with the pictures shown.

The other arm of the question whether zero-vision SFT hurts vision: every dialogue of a zero-vision
set word for word, its pictures in the question. They are made again from the line's provenance, so
nothing runs in a sandbox.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage
from rich.console import Console

from data_modules.zero_vision.solve import FAMILIES, problem_rng
from data_modules.zero_vision.source import SPLITS, write_whole, written

PICTURES = "pictures"


class WithPictures:
    """Makes the set.

    Args:
        folder: where it goes.
        zero_vision: the folder of a zero-vision set made by this code.
    """

    def __init__(self, *, folder: str, zero_vision: str) -> None:
        self.folder, self.zero_vision = Path(folder), Path(zero_vision)
        self.console = Console(stderr=True, markup=False)

    def prepare_data(self) -> None:
        """Write both splits unless they are there.

        Raises:
            FileNotFoundError: if there is no zero-vision set.
            ValueError: if a line does not come from this code, naming it.
        """
        for split in SPLITS:
            source, target = self.zero_vision / f"{split}.jsonl", self.folder / f"{split}.jsonl"
            if not source.is_file():
                raise FileNotFoundError(f"{source}: make it by moonlit prepare source=zero_vision")
            if target.is_file():
                self.console.print(f"{target} is there already")
                continue
            with source.open(encoding="utf-8") as lines:
                shown = [
                    self.shown(json.loads(line), f"{source}, line {number}")
                    for number, line in enumerate(lines, start=1)
                ]
            write_whole(target, "".join(map(written, shown)))
            num_pictures = sum(map(num_images, shown))
            self.console.print(
                f"wrote {target}: {len(shown):,} dialogues, {num_pictures:,} pictures"
            )

    def shown(self, line: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a line with its pictures in the question; one without pictures as it is."""
        provenance = line["provenance"]
        if provenance["source"] != "zero_vision":
            return line
        family, split, number = (provenance[key] for key in ("family", "split", "number"))
        problem = FAMILIES[family](problem_rng(provenance["seed"], SPLITS[split], family, number))
        if problem.truth != provenance["truth"]:
            raise ValueError(
                f"{where}: {family} {number} is {problem.truth!r} here and {provenance['truth']!r}"
                " there: the set was made by other code; make it again"
            )
        question, *others = line["messages"]
        name = f"{family}-{split}-{number}"
        parts = [*self.kept(problem.images, name), {"type": "text", "text": question["content"]}]
        return {
            **line,
            "messages": [{**question, "content": parts}, *others],
            "provenance": {**provenance, "source": "zero_vision_pictures"},
        }

    def kept(self, images: Any, name: str) -> Iterator[dict[str, Any]]:
        """Write a problem's pictures; yield the parts that show them."""
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(images):
            path = f"{PICTURES}/{name}-{place}.png"
            (self.folder / path).write_bytes(png(image))
            yield {"type": "image_url", "image_url": {"url": path}}


def num_images(line: dict[str, Any]) -> int:
    """Pictures in a line's question."""
    content = line["messages"][0]["content"]
    return 0 if isinstance(content, str) else len(content) - 1


def png(image: PILImage) -> bytes:
    """Encode a picture."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
