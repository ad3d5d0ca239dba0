"""Mathematics through a real process: what is equal, what does not pay, and what hangs."""

import asyncio
import logging
from typing import Any

import pytest

from moonlit.agents.environment import VerifierError
from moonlit.batch import Task, Trajectory
from moonlit.rl.rewards import mathematics
from moonlit.rl.rewards.mathematics import Mathematics, final_expression
from moonlit.rl.rewards.rules import RuleJudge

HANGS = "9^{9^{9^{9^9}}}"


def make(**changes: Any) -> Mathematics:
    return Mathematics(**{"timeout_s": 5.0, "memory_bytes": 2 << 30, **changes})


def rewards(*asked: tuple[str, str | int | float], **changes: Any) -> list[float]:
    """One process for all of them: (truth, answer)."""

    async def run() -> list[float]:
        verifier = make(**changes)
        try:
            return [await verifier(answer, truth) for answer, truth in asked]
        finally:
            await verifier.aclose()

    return asyncio.run(run())


RIGHT = [
    ("7", 7),
    ("7.", "7"),
    ("$7$", "7"),
    (r"So we get \boxed{\frac{1}{2}}.", "0.5"),
    ("0.5", r"\frac12"),
    (r"-\frac{3}{4}", "-0.75"),
    ("1,000", "1000"),
    (r"2 \cdot 10^{3}", "2000"),
    ("x = 3", "3"),
    ("x_1 = 3", "3"),
    ("x + 1", "1 + x"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("2, 1", r"\{1, 2\}"),
]
WRONG = [
    ("8", 7),
    ("", "7"),
    ("no idea", "7"),
    ("7 or 8", "7"),  # several possibilities
    ("7, 8", "7"),
    (r"\{7, 8\}", "7"),
    (r"7 \text{ or } 8", "7"),
    (r"\boxed{7} or \boxed{8}", "7"),
    (r"\boxed{7} \boxed{7}", "7"),
    ("8 = 7", "7"),  # an equation that is false
    ("x = 8 = 7", "7"),
    ("37 \\cdot 41", "1517"),  # the question given back
    ("1500 + 17", "1517"),
    (r"\frac{3034}{2} + 0", "1517"),
    ("x = 1500 + 17", "1517"),
    ("7$ and $8", "7"),
    ("7\n8", "7"),
    ("7" + " " * 30_000, "7"),
    (r"\boxed{7", "7"),
    ("1", r"\{1, 2\}"),  # half of it
]


def test_right_answers_earn_one_and_wrong_ones_nothing():
    found = rewards(*RIGHT, *WRONG)
    right, wrong = found[: len(RIGHT)], found[len(RIGHT) :]
    assert [asked for asked, reward in zip(RIGHT, right, strict=True) if reward != 1] == []
    assert [asked for asked, reward in zip(WRONG, wrong, strict=True) if reward != 0] == []


def test_an_answer_that_hangs_is_killed_told_and_earns_nothing(caplog: pytest.LogCaptureFixture):
    """The process that comes after it knows right from wrong."""
    with caplog.at_level(logging.WARNING):
        found = rewards((HANGS, r"\sqrt{2}"), ("7", "7"), timeout_s=5.0)
    assert found == [0.0, 1.0]
    assert "9^{9^{9^{9^9}}}' earns 0: no verdict within 5 s" in caplog.text


def test_a_truth_that_hangs_is_the_verifiers_error():
    with pytest.raises(VerifierError, match="no verdict within 5 s; for the truth"):
        rewards((r"\sqrt{3}", r"\pi + " + HANGS), timeout_s=5.0)


@pytest.mark.parametrize("truth", ["", r"\text{}"])
def test_a_truth_that_cannot_be_read_is_the_verifiers_error(truth: str):
    with pytest.raises(VerifierError, match="cannot be read"):
        rewards(("7", truth))


def test_a_process_that_dies_between_two_answers_is_replaced():
    async def run() -> list[float]:
        verifier = make()
        first = await verifier("7", "7")
        assert verifier.process is not None
        verifier.process.kill()
        found = [first, await verifier("7", "7"), await verifier("8", "7")]
        await verifier.aclose()
        return found

    assert asyncio.run(run()) == [1.0, 1.0, 0.0]


def test_a_verifier_that_fails_its_self_test_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mathematics, "SELF_TEST", (("3", "4", True),))
    with pytest.raises(VerifierError, match=r"fails its self-test: '4' for '3'.*wrong"):
        rewards(("7", "7"))


def test_a_cancelled_request_takes_its_process_along():
    """Its late reply must not answer the next request."""

    async def run() -> float:
        verifier = make(timeout_s=30.0)
        await verifier("7", "7")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(verifier(HANGS, r"\sqrt{2}"), 0.2)
        assert verifier.process is None
        found = await verifier("7", "7")
        await verifier.aclose()
        return found

    assert asyncio.run(run()) == 1.0


def test_the_judge_awaits_it_and_closes_it():
    verifier = make()
    judge = RuleJudge(rules={"mathematics": verifier})
    task = Task(prompt=[], domain="reasoning", environment="mathematics", answer="7")
    trajectory = Trajectory(
        segments=[], messages=[], spans=[], stop_reason="answer", text=r"\boxed{7}"
    )

    async def run() -> dict[str, float]:
        found = await judge.judge(task, trajectory)
        await judge.aclose()
        return found

    assert asyncio.run(run()) == {"mathematics": 1.0}
    assert trajectory.metrics["well_formed"] == 1.0
    assert verifier.process is None


def test_the_final_expression_is_the_one_in_the_box():
    assert final_expression(r"first 3, then \boxed{ \frac{1}{2} } follows") == r"\frac{1}{2}"
    assert final_expression("$$x$$") == "x"
    assert final_expression("word " * 100) is None


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="timeout_s=0"):
        make(timeout_s=0.0)
