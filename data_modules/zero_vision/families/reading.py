"""Problems over writing: numbers drawn large, lines of a page."""

from typing import Any

from PIL import Image, ImageDraw

from data_modules.world.pages import INKS, MARGIN, font, line_height, set_lines
from data_modules.world.scenes import digits as digit_item
from data_modules.zero_vision.cells import look, whole
from data_modules.zero_vision.problem import (
    Answer,
    Cell,
    Names,
    Problem,
    Program,
    Rng,
    field,
    pick,
    same,
)

WORDS = [
    *("the", "of", "and", "to", "in", "is", "that", "for", "on", "with", "as", "are", "be", "this"),
    *("by", "an", "or", "from", "at", "not", "can", "if", "when", "each", "one", "value", "name"),
    *("list", "number", "object", "string", "module", "class", "method", "return", "call", "set"),
    *("key", "index", "file", "code", "error", "type", "line", "text", "result", "state", "frame"),
    *("small", "large", "first", "second", "third", "next", "only", "also"),
]


def number(rng: Rng) -> Problem:
    """Which number is drawn."""
    item = digit_item(rng, (), int(pick(rng, 56, 84, 112)))
    question = pick(
        rng,
        "What number is shown?",
        "Read the number in the picture.",
        "Which number (0 to 99) is drawn here?",
    )
    truth = str(item.questions[0].truth)
    return Problem(
        family="number",
        question=question,
        images=list(item.frames),
        truth=truth,
        is_right=same,
        programs={"template": number_template, "profile": number_profile},
        stated={},
        difficulty=1 + len(truth),
    )


GLYPH = """
import numpy as np
from PIL import Image, ImageDraw, ImageFont
$px = np.array(images[0]).astype(int)
$mask = (abs($px - $px[0, 0]).sum(axis=2) > 60)
ys, xs = np.nonzero($mask)
glyph = $mask[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
print("ink:", glyph.shape, "columns without ink:", int((~glyph.any(axis=0)).sum()))"""
RENDER = """
def render(text, size):
    font = ImageFont.load_default(size)
    box = font.getbbox(text)
    im = Image.new("L", (box[2] + 4, box[3] + 4))
    ImageDraw.Draw(im).text((0, 0), text, 255, font=font)
    return im.crop(im.getbbox()).resize(glyph.shape[::-1])
"""


def number_template(rng: Rng, stated: dict[str, Any]) -> Program:
    """Compare with every rendered number."""
    names = Names(rng)
    yield Cell("First cut out the ink.", names(GLYPH))
    code = (
        RENDER
        + """
scores = {}
for $n in range(100):
    t = np.array(render(str($n), $(size))) > 127
    scores[$n] = (t & glyph).sum() / (t | glyph).sum()
best = sorted(scores, key=scores.get, reverse=True)[:3]
print({k: round(float(scores[k]), 2) for k in best})
print("number:", best[0])"""
    )
    thinking = "Render every number from 0 to 99 at this size and keep the best overlap."
    output = yield Cell(thinking, names(code, size=int(rng.integers(40, 70))))
    return read(rng, field(output, "number"))


def number_profile(rng: Rng, stated: dict[str, Any]) -> Program:
    """Split into digits by empty columns, then match each."""
    names = Names(rng)
    yield from look(rng, names, chance=0.3)
    yield Cell("Find the ink against the background.", names(GLYPH))
    code = """
from scipy import ndimage
runs = ndimage.find_objects(ndimage.label(glyph.any(axis=0))[0])
text = ""
for (cols,) in runs:
    part = glyph[:, cols]
    part = part[part.any(axis=1)]
    scores = {}
    for d in "0123456789":
        im = Image.new("L", (99, 99))
        ImageDraw.Draw(im).text((5, 5), d, 255, font=ImageFont.load_default($(size)))
        im = im.crop(im.getbbox())
        shape = np.log(im.width / im.height * len(part) / part.shape[1])
        t = np.array(im.resize(part.shape[::-1])) > 127
        scores[d] = (t & part).sum() / (t | part).sum() - abs(shape)
    text += max(scores, key=scores.get)
print("digits:", len(runs))
print("number:", text)"""
    thinking = "Empty columns part the digits; I match each one with rendered digits."
    output = yield Cell(thinking, names(code, size=int(rng.integers(40, 70))))
    return read(rng, field(output, "number"))


def read(rng: Rng, value: str) -> Answer:
    """Answer with a number."""
    return Answer(f"The best match is {value}.", pick(rng, value, f"It shows {value}."), value)


def page(rng: Rng) -> tuple[list[str], Image.Image]:
    """Set words on a page; return its lines."""
    size = int(pick(rng, 10, 11, 12, 13))
    words = [str(word) for word in rng.choice(WORDS, int(rng.integers(6, 60)))]
    lines = set_lines([*words, "x" * 60], size)  # the last word fits on no line and ends the page
    ink, paper = INKS[rng.integers(len(INKS))]
    image = Image.new("RGB", (196, 112), paper)
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + row * line_height(size)), line, fill=ink, font=font(size))
    return lines, image


def lines(rng: Rng) -> Problem:
    """How many lines of text a page has."""
    written, image = page(rng)
    question = pick(
        rng,
        "How many lines of text are on the page?",
        "Count the lines of writing.",
        "The picture is a page of text. Of how many lines?",
    )
    return Problem(
        family="lines",
        question=question,
        images=[image],
        truth=f"{len(written)}",
        is_right=same,
        programs={"profile": lines_profile, "runs": lines_runs},
        stated={},
        difficulty=1 + (len(written) > 2) + (len(written) > 4),
    )


def lines_profile(rng: Rng, stated: dict[str, Any]) -> Program:
    """Runs of rows with ink."""
    names = Names(rng)
    yield from look(rng, names, chance=0.3)
    code = """
import numpy as np
from scipy import ndimage
$px = np.array(images[0]).astype(int)
rows = (abs($px - $px[0, 0]).sum(axis=2) > 60).any(axis=1)
labels, $n = ndimage.label(rows)
print("rows:", [(s[0].start, s[0].stop) for s in ndimage.find_objects(labels)])
print("lines:", $n)"""
    output = yield Cell("Lines of text are runs of rows that hold ink.", names(code))
    return lines_counted(field(output, "lines"))


def lines_runs(rng: Rng, stated: dict[str, Any]) -> Program:
    """Changes from paper to ink in the row profile."""
    names = Names(rng)
    code = """
import numpy as np
$px = np.array(images[0].convert("L")).astype(int)
ink = (abs($px - $px[0, 0]) > 40).sum(axis=1)
print("profile:", ink.tolist())
print("lines:", int(((ink[1:] > 0) & (ink[:-1] == 0)).sum()))"""
    thinking = "In the profile of ink per row, each line begins with a step up from zero."
    output = yield Cell(thinking, names(code))
    return lines_counted(field(output, "lines"))


def lines_counted(value: str) -> Answer:
    """Answer with a number of lines."""
    num = whole(value)
    return Answer(f"{num} runs of ink, so {num} lines.", f"{num}", f"{num}")
