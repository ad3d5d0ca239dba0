"""Code in the real sandbox: what passes, and every way around the tests that does not."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from moonlit.agents.environment import VerifierError
from moonlit.agents.sandbox.policy import Limits, Policy
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.sandbox.worker import Worker
from moonlit.rl.rewards import code
from moonlit.rl.rewards.code import CodeTests, same, source_of

TESTS = [{"call": "double(2)", "expected": 4}, {"call": "double([1])", "expected": [1, 1]}]
PROGRAM = [{"stdin": "3\n4\n", "stdout": "7\n"}, {"stdin": "1\n1\n", "stdout": "2"}]
GOOD = "def double(x):\n    return x + x\n"
ADDS = "print(int(input()) + int(input()))"


def rewards(*asked: tuple[str, list[dict[str, Any]]]) -> list[float]:
    async def run() -> list[float]:
        limits = Limits(memory_bytes=256 << 20, interrupt_grace_s=0.3)
        scorer = CodeTests(timeout_s=1.0, pool=Pool(Policy(limits=limits), num_warm=1))
        try:
            return [await scorer(answer, {"tests": tests}) for answer, tests in asked]
        finally:
            await scorer.aclose()

    return asyncio.run(run())


RIGHT = {
    "plain": (GOOD, TESTS),
    "fenced": (f"Here it is:\n```python\n{GOOD}```\nIt doubles.", TESTS),
    "chatty": (GOOD.replace("return", "print('hm'); return"), TESTS),
    "tuple": (GOOD + "def pair(): return (1, 2.0)", [{"call": "pair()", "expected": [1, 2]}]),
    "program": (ADDS, PROGRAM),
    "white space": (r"print('7 \n8\t\n')", [{"stdin": "", "stdout": "7\n8\n"}]),
    "main": (f"if __name__ == '__main__':\n    {ADDS}", PROGRAM),
}
ALWAYS_EQUAL = """
class Any:
    def __eq__(self, other): return True
    def __iter__(self): return iter([])
def double(x): return Any()
"""
WRONG = {
    "wrong": ("def double(x):\n    return x\n", TESTS),
    "one of two": ("def double(x):\n    return 4\n", TESTS),
    "empty": ("", TESTS),
    "words": ("It doubles its argument.", TESTS),
    "another name": ("def twice(x):\n    return x + x\n", TESTS),
    "exit(0)": ("exit(0)", TESTS),
    "quit": ("quit()", TESTS),
    "exit after": (GOOD + "exit(0)", TESTS),
    "sys.exit after": (GOOD + "import sys; sys.exit(0)", TESTS),
    "os._exit after": (GOOD + "import os; os._exit(0)", TESTS),
    "os._exit inside": ("import os\ndef double(x): os._exit(0)", TESTS),
    "SystemExit inside": ("def double(x): raise SystemExit(0)", TESTS),
    "exit of a program": ("exit(0)", PROGRAM),
    "exit after printing": (ADDS + "\nexit(0)", PROGRAM),
    "always equal": (ALWAYS_EQUAL, TESTS),
    "tampered json": (
        "import json\njson.dumps = lambda *_: 'true'\ndef double(x): return x", TESTS),
    "tampered print": (
        "import builtins\nbuiltins.print = lambda *_: None\ndef double(x): return x", TESTS),
    "prints the truth": ("print(4)\ndef double(x): print(4)", TESTS),
    "no assert": ("import sys\nsys.flags\ndef double(x): assert True", TESTS),
    "two blocks": (f"```python\n{GOOD}```\nor\n```python\n{GOOD}```", TESTS),
    "no end of block": (f"```python\n{GOOD}", TESTS),
    "endless": ("def double(x):\n    while True: pass", TESTS),
    "endless load": ("while True: pass", TESTS),
    "too much memory": ("def double(x): return [0] * 10**10", TESTS),
    "more printed": ("print(7); print(2)", PROGRAM),
    "nothing printed": ("x = input()", PROGRAM),
    "endless nesting": ("def double(x):\n    y = []\n    y.append(y)\n    return y", TESTS),
    "not a number": ("def double(x): return float('nan')", TESTS),
    "true for one": (GOOD + "def one(): return True", [{"call": "one()", "expected": 1}]),
}  # fmt: skip


def test_right_programs_earn_one_and_all_others_nothing():
    found = rewards(*RIGHT.values(), *WRONG.values())
    names = [*RIGHT, *WRONG]
    wanted = [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    assert dict(zip(names, found, strict=True)) == dict(zip(names, wanted, strict=True))


@pytest.mark.parametrize(
    "truth",
    [
        {},
        {"tests": []},
        {"tests": [{"call": "f()"}]},
        {"tests": [{"stdin": "1", "stdout": " \n"}]},  # doing nothing would pass
    ],
)
def test_a_task_without_tests_is_named(truth: dict[str, Any]):
    with pytest.raises(ValueError, match="no test"):
        asyncio.run(CodeTests(timeout_s=1.0)(GOOD, truth))


def test_sandboxes_that_fail_their_self_test_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "SELF_TEST", ((GOOD, [{"call": "double(1)", "expected": 3}], 1.0),))
    with pytest.raises(VerifierError, match=r"self-test .* gives 0.0, not 1.0"):
        rewards((GOOD, TESTS))


def test_values_are_compared_by_kind():
    assert same([1, {"a": 2.0}], [1.0, {"a": 2}])
    assert not any([same(True, 1), same(0, False), same("1", 1), same(None, 0), same([1], [1, 1])])
    assert same(0.1 + 0.2, 0.3)
    assert not any([same(1.000001, 1), same(1e-6, 0), same({"a": 1}, {"b": 1})])


def test_every_run_has_the_time_that_was_given():
    """Loading, a call and a program alike."""
    worker, scorer = Mock(Worker), CodeTests(timeout_s=3.0, pool=Mock(Pool))
    worker.run = AsyncMock(return_value=Mock(text="7", error=None))
    asyncio.run(scorer.loads(worker, GOOD))
    asyncio.run(scorer.passes_call(worker, GOOD, TESTS[0]))
    asyncio.run(scorer.passes_program(worker, ADDS, PROGRAM[0]))
    assert [asked.kwargs["timeout_s"] for asked in worker.run.await_args_list] == [3.0] * 3


def test_the_program_is_the_one_block():
    assert source_of("```\nx = 1\n```") == "x = 1\n"
    assert source_of("``` ```\nx = 1") is None
    assert source_of("x = (") is None
