"""The shortest way through a maze, the report's own example (arXiv:2602.02276, App. F)."""

from collections import deque
from typing import Any

from PIL import Image, ImageDraw

from data_modules.world.things import COLOURS
from data_modules.zero_vision.cells import reference, whole
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

Cells = set[tuple[int, int]]


def carve(rng: Rng, num: int) -> Cells:
    """Carve a maze of ``num`` by ``num`` rooms, with a few loops; rooms stand at odd places."""
    free: Cells = {(1, 1)}
    stack = [(1, 1)]
    while stack:
        y, x = stack[-1]
        steps = [(y + 2, x), (y - 2, x), (y, x + 2), (y, x - 2)]
        fresh = [p for p in steps if min(p) > 0 and max(p) < 2 * num and p not in free]
        if not fresh:
            stack.pop()
            continue
        room = fresh[rng.integers(len(fresh))]
        free |= {room, ((room[0] + y) // 2, (room[1] + x) // 2)}
        stack.append(room)
    for _ in range(num // 2):
        y, x = (int(v) for v in rng.integers(1, 2 * num, size=2))
        if (y + x) % 2:
            free.add((y, x))
    return free


def path_length(free: Cells, start: tuple[int, int], end: tuple[int, int]) -> int:
    """Length of a shortest path in squares."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        y, x = queue.popleft()
        for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if p in free and p not in distance:
                distance[p] = distance[y, x] + 1
                queue.append(p)
    return distance[end]


def maze(rng: Rng) -> Problem:
    """Length of the shortest path through a maze."""
    num, cell = int(rng.integers(3, 9)), int(rng.integers(5, 10))
    free = carve(rng, num)
    rooms = [(y, x) for y, x in sorted(free) if y % 2 and x % 2]
    start, end = (rooms[i] for i in rng.choice(len(rooms), 2, replace=False))
    colours = {"start": pick(rng, "green", "blue"), "end": pick(rng, "red", "orange")}
    wall, floor = pick(rng, ((0, 0, 0), (255, 255, 255)), ((40, 40, 60), (235, 235, 225)))
    width = (2 * num + 1) * cell
    image = Image.new("RGB", (width, width), wall)
    pen = ImageDraw.Draw(image)
    special = {start: COLOURS[colours["start"]], end: COLOURS[colours["end"]]}
    for y, x in free:
        box = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
        pen.rectangle(box, fill=special.get((y, x), floor))
    stated = {**colours, "squares": 2 * num + 1}
    question = pick(
        rng,
        "The maze has {squares} by {squares} squares. How many steps does the shortest way from "
        "the {start} square to the {end} square take?",
        "Find the shortest path from {start} to {end} in this maze of {squares} x {squares} "
        "squares. How many steps is it?",
        "A maze of {squares} by {squares} squares, dark walls. Start: {start}, goal: {end}. "
        "Length of the shortest path, in squares moved?",
    ).format(**stated)
    length = path_length(free, start, end)
    return Problem(
        family="maze",
        question=question,
        images=[image],
        truth=f"{length}",
        is_right=same,
        programs={"bfs": maze_bfs, "networkx": maze_networkx, "wave": maze_wave},
        stated=stated,
        difficulty=1 + (num > 4) + (num > 6),
    )


def maze_grid(rng: Rng, names: Names, stated: dict[str, Any]) -> str:
    """Write the code that reads the maze into a grid of squares."""
    return names(
        """
import numpy as np
$px = np.array(images[0]).astype(int)
s = $px.shape[0] // $(squares)
grid = $px[s // 2::s, s // 2::s]
free = grid.max(axis=2) > 128
near = lambda c: tuple(map(int, np.unravel_index(abs(grid - c).sum(axis=2).argmin(), free.shape)))
start, end = near($(start)), near($(end))
print("square:", s, "px; free:", int(free.sum()), "of", free.size)
print("start", start, "end", end)""",
        squares=stated["squares"],
        start=reference(rng, stated["start"]),
        end=reference(rng, stated["end"]),
    )


MAZE_THOUGHTS = (
    "I sample the middle of each square: bright or coloured is free, dark is wall.",
    "First I turn the picture into a grid of free squares and find both ends by their colour.",
    "Binarise per square, mark start and goal, then search.",
)


def maze_with(rng: Rng, stated: dict[str, Any], thinking: str, code: str) -> Program:
    """Read the grid, search it, answer."""
    names = Names(rng)
    yield Cell(pick(rng, *MAZE_THOUGHTS), maze_grid(rng, names, stated))
    output = yield Cell(thinking, names(code))
    length = whole(field(output, "steps"))
    return Answer(f"The search reaches the goal after {length} steps.", f"{length}", f"{length}")


def maze_bfs(rng: Rng, stated: dict[str, Any]) -> Program:
    """Breadth-first search by hand."""
    code = """
from collections import deque
dist, queue = {start: 0}, deque([start])
while queue:
    y, x = queue.popleft()
    for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
        if 0 <= min(p) and max(p) < len(free) and free[p] and p not in dist:
            dist[p] = dist[y, x] + 1
            queue.append(p)
print("reached:", len(dist), "squares")
print("steps:", dist[end])"""
    return (yield from maze_with(rng, stated, "Breadth-first search gives the length.", code))


def maze_networkx(rng: Rng, stated: dict[str, Any]) -> Program:
    """Networkx's shortest path."""
    code = """
import networkx as nx
g = nx.grid_2d_graph(*free.shape).subgraph(map(tuple, np.argwhere(free).tolist()))
path = nx.shortest_path(g, start, end)
print(path[:6], "...")
print("steps:", len(path) - 1)"""
    return (yield from maze_with(rng, stated, "The free squares are a graph.", code))


def maze_wave(rng: Rng, stated: dict[str, Any]) -> Program:
    """A wave of dilations."""
    code = """
from scipy import ndimage
wave, $n = np.zeros_like(free), 0
wave[start] = True
while not wave[end]:
    wave = ndimage.binary_dilation(wave, mask=free)
    $n += 1
print("wave covers:", int(wave.sum()))
print("steps:", $n)"""
    thinking = "I let a wave spread from the start, one square a step, until it meets the goal."
    return (yield from maze_with(rng, stated, thinking, code))
