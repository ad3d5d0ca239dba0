"""Line charts as SVG, without a plotting library: they stand in pages that need no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 40
COLOURS = ("#1f5fbf", "#c2410c", "#1d7a43", "#8a5a00", "#7c3aed", "#0e7490")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; faint ones are not in the legend (single seeds beside their mean)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    faint: bool = False


def figure(charts: Sequence[str]) -> str:
    """Lay charts side by side in one SVG."""
    placed = "".join(
        f'<g transform="translate({place * WIDTH} 0)">{chart}</g>'
        for place, chart in enumerate(charts)
    )
    width = WIDTH * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="11" width="{width}" height="{HEIGHT}">'
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>{placed}</svg>\n'
    )


def chart(title: str, lines: Sequence[Line], *, x_name: str, y_name: str) -> str:
    """Draw one chart; both axes begin at 0.

    Raises:
        ValueError: if there is no point to draw.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError(f"{title}: no point to draw")
    most_x, most_y = (max(point[axis] for point in points) or 1.0 for axis in (0, 1))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / most_x * inner_width, TOP + (1 - y / most_y) * inner_height

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold" fill="#1d2230">{escape(title)}</text>']
    for tick in ticks(most_y):
        _, y = place(0.0, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d5d9e0"/>')
        parts.append(text(LEFT - 5, y + 4, f"{tick:g}", anchor="end"))
    for tick in ticks(most_x):
        x, y = place(tick, 0.0)
        parts.append(text(x, y + 15, f"{tick:g}"))
    parts.append(text(LEFT + inner_width / 2, HEIGHT - 8, x_name))
    middle = TOP + inner_height / 2
    parts.append(f'<g transform="rotate(-90 12 {middle})">{text(12, middle, y_name)}</g>')
    for line in lines:
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in line.points)
        look = 'stroke-width="1" opacity="0.35"' if line.faint else 'stroke-width="2"'
        colour = COLOURS[line.colour % len(COLOURS)]
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" {look}/>')
    for number, line in enumerate(line for line in lines if not line.faint):
        y = TOP + 12 + 14 * number
        colour = COLOURS[line.colour % len(COLOURS)]
        parts.append(f'<path d="M{LEFT + 8} {y - 4}h14" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(LEFT + 26, y, line.name, anchor="start"))
    return "".join(parts)


def text(x: int | float, y: int | float, words: str, *, anchor: str = "middle") -> str:
    """Write words."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#1d2230">'
        f"{escape(words)}</text>"
    )


def ticks(most: float) -> list[float]:
    """Return three to seven round numbers from 0 to the largest value."""
    step = next(
        size * 10.0**power
        for power in range(-4, 9)
        for size in (1, 2, 5)
        if most / (size * 10.0**power) <= 6
    )
    return [round(number * step, 10) for number in range(int(most / step + 1e-9) + 1)]
