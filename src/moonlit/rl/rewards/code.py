"""Code: whether a program does what its tests say, run in the sandbox and compared outside it.

The sandbox is told what to call, never what to expect: values come out as JSON and are compared
here. So nothing that a program does to its interpreter can pass a test: not an early ``exit(0)``,
not an ``__eq__`` that is always true, not a tampered ``assert``.
"""

import ast
import asyncio
import json
import math
import re
import secrets
from collections.abc import Sequence
from typing import Any

from moonlit.agents.environment import VerifierError
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.sandbox.worker import Worker

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
LOAD = """import json as JSON
SPACE = {{"__name__": "answer"}}
exec(compile({source!r}, "answer.py", "exec"), SPACE)"""
CALL = """print("\\n" + {mark!r} + JSON.dumps(eval({call!r}, SPACE)))"""
PROGRAM = """import io, sys
sys.stdin = io.StringIO({stdin!r})
exec(compile({source!r}, "answer.py", "exec"), {{"__name__": "__main__"}})"""
SELF_TEST = (
    ("def f(x): return x + 1", [{"call": "f(1)", "expected": 2}], 1.0),
    ("print(int(input()) + 1)", [{"stdin": "1\n", "stdout": "2\n"}], 1.0),
    ("def f(x): return x", [{"call": "f(1)", "expected": 2}], 0.0),
    ("def f(x): return x + 1\nexit(0)", [{"call": "f(1)", "expected": 2}], 0.0),
)
"""Source, tests and reward: asked of every new pool."""


class CodeTests:
    """1 if a program passes all of its tests, else 0.

    The program is the answer's one fenced block, or the whole of an answer without one. It fails if
    it raises, exits, dies, runs too long, or one value is not the expected one.

    A test is ``{"call": "f(1)", "expected": JSON}`` or ``{"stdin": ..., "stdout": ...}``. Printed
    text is compared line by line, white space at the ends left out.

    Source: rule-based outcome (arXiv:2602.02276, Sec. 4.4.2); all else is ours.

    Args:
        timeout_s: of each test, and of loading the program.
        pool: of sandboxes; None: one of its own, which starts when it is first needed.

    Raises:
        ValueError: if the time is not above 0.
    """

    def __init__(self, *, timeout_s: float, pool: Pool | None = None) -> None:
        if timeout_s <= 0:
            raise ValueError(f"code: timeout_s={timeout_s}: want it above 0")
        self.timeout_s = timeout_s
        self.pool = Pool(num_warm=1, max_workers=4) if pool is None else pool
        self.is_open = False
        self.opening = asyncio.Lock()

    async def __call__(self, answer: str, truth: dict[str, Any]) -> float:
        """Return the reward.

        Args:
            answer: the words.
            truth: its ``tests``.

        Raises:
            VerifierError: if there is no sandbox, or it fails its self-test.
            ValueError: if a test is none.
        """
        tests = checked(truth)
        source = source_of(answer)
        if source is None:
            return 0.0
        await self.open()
        return await self.score(source, tests)

    async def score(self, source: str, tests: Sequence[dict[str, Any]]) -> float:
        """Run a program against its tests in a worker of its own."""
        calls = [test for test in tests if "call" in test]
        async with self.pool.worker() as worker:
            if calls and not await self.loads(worker, source):
                return 0.0
            for test in tests:
                passes = self.passes_call if "call" in test else self.passes_program
                if not await passes(worker, source, test):
                    return 0.0
        return 1.0

    async def loads(self, worker: Worker, source: str) -> bool:
        """Run the program once, for its functions."""
        output = await worker.run(LOAD.format(source=source), timeout_s=self.timeout_s)
        return output.error is None

    async def passes_call(self, worker: Worker, source: str, test: dict[str, Any]) -> bool:
        """Whether a call returns what is expected."""
        mark = secrets.token_hex(16)
        cell = CALL.format(mark=mark, call=test["call"])
        output = await worker.run(cell, timeout_s=self.timeout_s)
        values = [
            line.removeprefix(mark) for line in output.text.splitlines() if line.startswith(mark)
        ]
        if output.error is not None or len(values) != 1:
            return False
        try:
            return same(json.loads(values[0]), test["expected"])
        except (ValueError, RecursionError):
            return False

    async def passes_program(self, worker: Worker, source: str, test: dict[str, Any]) -> bool:
        """Whether a program prints what is expected."""
        cell = PROGRAM.format(stdin=test["stdin"], source=source)
        output = await worker.run(cell, timeout_s=self.timeout_s)
        return output.error is None and lines_of(output.text) == lines_of(test["stdout"])

    async def open(self) -> None:
        """Start the sandboxes, and see that they know right from wrong.

        Raises:
            VerifierError: if they do not.
        """
        async with self.opening:
            if self.is_open:
                return
            await self.pool.__aenter__()
            self.is_open = True
            for source, tests, reward in SELF_TEST:
                if (got := await self.score(source, tests)) != reward:
                    await self.aclose()
                    raise VerifierError(f"code: the self-test {source!r} gives {got}, not {reward}")

    async def aclose(self) -> None:
        """End the sandboxes."""
        if self.is_open:
            self.is_open = False
            await self.pool.__aexit__()


def source_of(answer: str) -> str | None:
    """Return an answer's program; several blocks are no answer, nor is what is no Python."""
    blocks = FENCED.findall(answer)
    if len(blocks) > 1 or (not blocks and "```" in answer) or answer.count("```") > 2:
        return None
    source = blocks[0] if blocks else answer
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return source if source.strip() else None


def checked(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a task's tests.

    Raises:
        ValueError: if there are none, or one could be passed by doing nothing.
    """
    tests = truth.get("tests")
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"a task of code has no tests: {truth!r:.200}")
    for test in tests:
        if set(test) == {"call", "expected"} or (
            set(test) == {"stdin", "stdout"} and test["stdout"].strip()
        ):
            continue
        raise ValueError(f"no test: {test!r:.200}; want call and expected, or stdin and stdout")
    return tests


def same(value: Any, expected: Any) -> bool:
    """Whether two JSON values are the same: kinds too, numbers to nine digits."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    return type(value) is type(expected) and value == expected


def lines_of(text: str) -> list[str]:
    """Return a text's lines without white space at their ends."""
    return [line.rstrip() for line in text.strip().splitlines()]
