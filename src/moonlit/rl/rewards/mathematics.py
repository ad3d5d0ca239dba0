"""Mathematics: whether an expression is the true one, by math-verify in a process of its own."""

import asyncio
import contextlib
import json
import logging
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process

from moonlit.agents.environment import VerifierError
from moonlit.rl.rewards.math_worker import BAD_TRUTH, RIGHT, UNREADABLE

BOXED = re.compile(r"\\boxed\s*\{")
MAX_EXPRESSION_CHARS = 300
MAX_CHARS = 20_000
START_TIMEOUT_S = 120.0
SELF_TEST = (
    (r"\frac{1}{2}", "0.5", True),
    ("x + 1", "1 + x", True),
    ("3", "x = 3", True),
    ("3", "4", False),
    ("3", "3, 4", False),
    ("3", r"\{3, 4\}", False),
    ("3", "4 = 3", False),
    ("1517", r"37 \cdot 41", False),
)
"""Truth, answer, and whether they are the same: asked of every new process."""
HARMLESS = r"\sqrt{2} + \pi"
"""An answer that takes no time, whatever the truth."""
LOG = logging.getLogger(__name__)


class Mathematics:
    r"""1 if an answer's expression is the true one, else 0.

    The expression is what stands in the one ``\boxed{...}``, or the whole of a short answer
    without one: an answer with several is none. A number that is asked for must be written as a
    number, and an equation may only name a variable's value.

    Where an answer makes the process hang, run out of memory or crash, the process is killed, and a
    new one, which passes its self-test, is asked again. If that fails too, but another answer to
    the same truth does not, the answer was at fault: it earns 0, and the log says so. Else it is
    the verifier's error.

    Source: rule-based outcome (arXiv:2602.02276, Sec. 4.4.2); the strictness is ours.

    Args:
        timeout_s: of one comparison.
        memory_bytes: of the process' address space.

    Raises:
        ValueError: if a number is not above 0.
    """

    def __init__(self, *, timeout_s: float, memory_bytes: int) -> None:
        if min(timeout_s, memory_bytes) <= 0:
            raise ValueError(
                f"mathematics: timeout_s={timeout_s}, memory_bytes={memory_bytes}: want above 0"
            )
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes
        self.one_request = asyncio.Lock()
        self.process: Process | None = None
        self.num_requests = 0

    async def __call__(self, answer: str, truth: str | int | float) -> float:
        r"""Return the reward.

        Args:
            answer: the words.
            truth: LaTeX, such as ``\frac{1}{2}``, or a number.

        Raises:
            VerifierError: if the process does not work, or cannot read the truth.
        """
        expression = final_expression(answer)
        if expression is None:
            return 0.0
        async with self.one_request:
            reply = await self.ask(expression, str(truth))
            if "verdict" not in reply:
                reply = await self.ask_anew(expression, str(truth))
        if reply["verdict"] == BAD_TRUTH:
            raise VerifierError(f"mathematics: the truth {truth!r} cannot be read")
        return float(reply["verdict"] == RIGHT)

    async def ask_anew(self, expression: str, truth: str) -> dict[str, str]:
        """Ask a new process; if it fails too, find out whose fault it is.

        Raises:
            VerifierError: if it is not the answer's.
        """
        await self.kill()
        reply = await self.ask(expression, truth)
        if "verdict" in reply:
            return reply
        await self.kill()
        alone = await self.ask(HARMLESS, truth)
        if "verdict" not in alone:
            await self.kill()
            raise VerifierError(f"mathematics: {reply['error']}; for the truth: {alone['error']}")
        if alone["verdict"] == BAD_TRUTH:
            return alone
        LOG.warning("mathematics: the answer %.80r earns 0: %s", expression, reply["error"])
        return {"verdict": UNREADABLE}

    async def ask(self, answer: str, truth: str) -> dict[str, str]:
        """Return the process' reply, or ``{"error": why there is none}``; then it is dead."""
        if self.process is None:
            await self.start()
        return await self.exchange(answer, truth, self.timeout_s)

    async def start(self) -> None:
        """Start the process, and see that it knows right from wrong.

        Raises:
            VerifierError: if it does not.
        """
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "moonlit.rl.rewards.math_worker"),
            str(self.memory_bytes),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        for place, (truth, answer, is_right) in enumerate(SELF_TEST):
            timeout_s = self.timeout_s if place else START_TIMEOUT_S  # the first one imports
            reply = await self.exchange(answer, truth, timeout_s)
            if (reply.get("verdict") == RIGHT) != is_right or "error" in reply:
                await self.kill()
                raise VerifierError(
                    f"mathematics: the verifier fails its self-test: {answer!r} for {truth!r}: "
                    f"{reply}"
                )

    async def exchange(self, answer: str, truth: str, timeout_s: float) -> dict[str, str]:
        """Send a request and wait for its reply."""
        process, self.num_requests = self.process, self.num_requests + 1
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"id": self.num_requests, "answer": answer, "truth": truth}
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write((json.dumps(request) + "\n").encode())
                await process.stdin.drain()
                reply = json.loads(await process.stdout.readline())
        except TimeoutError:
            await self.kill()
            return {"error": f"no verdict within {timeout_s:g} s"}
        except (OSError, ValueError) as error:
            await self.kill()
            return {"error": f"the process ended: {type(error).__name__} {error}"}
        except BaseException:  # whoever comes next must not read this reply
            await asyncio.shield(self.kill())
            raise
        if reply.get("id") != self.num_requests:
            await self.kill()
            return {"error": f"a reply to another request: {reply}"}
        return reply

    async def kill(self) -> None:
        """End the process, whatever it does."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def aclose(self) -> None:
        """End the process."""
        await self.kill()


def final_expression(answer: str) -> str | None:
    r"""Return the one expression that an answer ends in; several, or none, are no answer."""
    if len(answer) > MAX_CHARS:
        return None
    found = list(BOXED.finditer(answer))
    if len(found) > 1:
        return None
    text = balanced(answer, found[0].end()) if found else answer.strip().removesuffix(".")
    if text is None:
        return None
    if not found:
        for mark in ("$$", "$"):
            if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
                text = text[len(mark) : -len(mark)]
                break
    text = text.strip()
    is_one_line = 0 < len(text) <= MAX_EXPRESSION_CHARS and "\n" not in text and "$" not in text
    return text if is_one_line else None


def balanced(text: str, start: int) -> str | None:
    """Return what stands from ``start`` to the brace that closes it."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
