"""Run a program on a problem in the sandbox; keep it as a dialogue only if its answer is true."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_modules.zero_vision.families import (
    charts,
    clocks,
    counting,
    differences,
    majority,
    mazes,
    motion,
    places,
    reading,
    sizes,
)
from data_modules.zero_vision.lines import assistant, called, line, user
from data_modules.zero_vision.problem import Answer, Problem, Rng, UnexpectedOutputError, pick
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.toolsets.ipython import declaration, ipython

FAMILIES = {
    maker.__name__: maker
    for maker in (
        counting.counting,
        counting.counting_colour,
        sizes.size,
        places.localisation,
        places.pointing,
        majority.majority,
        places.extreme,
        places.distance,
        mazes.maze,
        charts.pie,
        charts.bars,
        clocks.clock,
        differences.differences,
        differences.difference_box,
        differences.turned,
        motion.moving,
        motion.appearing,
        reading.number,
        reading.lines,
    )
}
"""Every function makes one problem from random numbers."""
NOTES = (
    "The picture is {files}.",
    "Image file: {files}.",
    "You find it as {files} in the IPython session.",
    "({files} is loaded in the session.)",
)
MAX_OUTPUT_CHARS = 1500
"""Trajectories with a longer tool result are dropped: they teach to print too much."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why there is no dialogue."""

    family: str
    program: str
    reason: str
    """``wrong``, ``error``, ``unexpected`` or ``long``."""
    detail: str


async def solve(pool: Pool, family: str, rng: Rng, provenance: dict[str, Any]) -> Any:
    """Make a problem, run one of its programs on it, compare, and write the dialogue.

    Args:
        pool: of sandboxes; each problem has a fresh one.
        family: one of ``FAMILIES``.
        rng: of this problem alone.
        provenance: what the line is to say about where it comes from, and is added to.

    Returns:
        A line of the set, or why there is none: ``Rejected``.
    """
    problem = FAMILIES[family](rng)
    program = str(pick(rng, *problem.programs))
    messages: list[dict[str, Any]] = [user(asked(rng, problem))]
    steps = problem.programs[program](rng, problem.stated)
    async with ipython(pool, problem.images) as tool:
        try:
            cell = next(steps)
            while True:
                output = await tool.call({"code": cell.code})
                if output.error is not None:
                    return Rejected(family, program, "error", f"{output.error}\n{cell.code}")
                if len(output.text) > MAX_OUTPUT_CHARS:
                    return Rejected(family, program, "long", output.text[:200])
                calls = [("ipython", {"code": cell.code}, output.text.rstrip("\n"))]
                messages += called(cell.thinking, calls, messages)
                cell = steps.send(output.text)
        except UnexpectedOutputError as error:
            return Rejected(family, program, "unexpected", str(error))
        except StopIteration as end:
            answer: Answer = end.value
    if not problem.is_right(answer.value, problem.truth):
        detail = f"{answer.value} instead of {problem.truth}"
        return Rejected(family, program, "wrong", detail)
    messages.append(assistant(answer.text, answer.thinking))
    return line(
        messages,
        [declaration()],
        {
            **provenance,
            "family": family,
            "program": program,
            "difficulty": problem.difficulty,
            "truth": problem.truth,
        },
    )


def asked(rng: Rng, problem: Problem) -> str:
    """Return the question, often with the names of the files, before or behind it."""
    files = [f"image_{place}.png" for place in range(len(problem.images))]
    names = files[0] if len(files) == 1 else f"{', '.join(files[:-1])} and {files[-1]}"
    note = pick(rng, *NOTES).format(files=names)
    if len(files) > 1:
        note = f"Pictures: {names}."
    where = rng.integers(3)
    return [problem.question, f"{problem.question} {note}", f"{note} {problem.question}"][where]


def problem_rng(seed: int, split: int, family: str, number: int) -> Rng:
    """Return the random numbers of one problem."""
    place = list(FAMILIES).index(family)
    return np.random.default_rng([seed, 11, split, place, number])
