"""The trainer's handle on one worker: calls with a time-out ladder, and an end.

Every request bears a random number and only a reply with that number answers it; others are dropped
and counted. Between calls the worker is stopped (SIGSTOP), so threads it left running cost nothing.
A call that runs too long is interrupted, which keeps the state; if it does not stop, the whole
worker is killed and the state is lost, and the output says so.
"""

import asyncio
import base64
import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from moonlit.agents.sandbox.confinement import Report
from moonlit.agents.sandbox.frames import ProtocolError, pack, read_frame
from moonlit.agents.sandbox.policy import Limits

MAX_STRAY_FRAMES = 16
DISK_CHECK_S = 0.25
SLACK_BYTES = 65536


@dataclass(slots=True, kw_only=True)
class CellOutput:
    """What came of running one cell."""

    text: str = ""
    """What it printed and showed, tracebacks included."""
    images: list[Image.Image] = field(default_factory=list)
    error: str | None = None
    """One line: the exception, the time-out, or how the worker ended; None: it went well."""
    state_lost: bool = False
    """The worker is gone; a new one begins empty."""
    duration_s: float = 0.0


class Worker:
    """One confined interpreter.

    Args:
        pid: of its process.
        reader: its messages.
        writer: ours to it.
        folder: its working folder, as named outside.
        limits: of its calls.
        reap: asks the template for the exit status, once the process is dead.
        report: what protects us from it.
    """

    def __init__(
        self,
        *,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        folder: Path,
        limits: Limits,
        reap: Callable[[int], Awaitable[int]],
        report: Report,
    ) -> None:
        self.pid, self.reader, self.writer, self.folder = pid, reader, writer, folder
        self.limits, self.reap, self.report = limits, reap, report
        self.pidfd = os.pidfd_open(pid)
        self.pending: asyncio.Task[dict[str, Any]] | None = None
        self.ending: str | None = None
        self.num_stray_frames = 0
        self.one_call = asyncio.Lock()
        self.folder_is_bounded = report.layers.get("folder", "").startswith("active")
        # a reply's text (a character may take 12 bytes in JSON) and pictures (base64)
        pixels = limits.num_images * limits.image_pixels * 4
        self.max_frame_bytes = SLACK_BYTES + 2 * 12 * limits.output_chars + pixels

    @property
    def is_alive(self) -> bool:
        """Whether it can be called."""
        return self.ending is None

    async def run(self, code: str, *, timeout_s: float | None = None) -> CellOutput:
        """Run one cell and wait for it.

        Args:
            code: Python, IPython's magics included.
            timeout_s: the policy's if None [s].
        """
        if len(code) > self.limits.code_chars:
            return CellOutput(
                error=f"code of {len(code)} characters: want at most {self.limits.code_chars}"
            )
        timeout_s = self.limits.call_timeout_s if timeout_s is None else timeout_s
        start = time.perf_counter()
        reply = await self.call({"op": "run", "code": code}, timeout_s)
        output = self.output_of(reply)
        output.duration_s = time.perf_counter() - start
        return output

    async def put(self, name: str, data: bytes) -> None:
        """Write a file into the worker's folder.

        Raises:
            OSError: if the worker could not, or has ended.
        """
        message = {"op": "put", "name": name, "data": base64.b64encode(data).decode()}
        reply = await self.call(message, self.limits.call_timeout_s)
        if reply.get("error") is not None:
            raise OSError(f"file {name!r}: {reply['error']}")

    async def call(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request and return its reply, or ``{"error": why there is none}``."""
        async with self.one_call:
            if self.ending is not None:
                return {"error": self.ending}
            number = secrets.token_hex(8)
            try:
                self.signal(signal.SIGCONT)
                self.writer.write(pack({**message, "id": number}))
                reply = await self.reply_to(number, timeout_s)
                self.signal(signal.SIGSTOP)
            except (OSError, asyncio.IncompleteReadError):
                await self.end("the worker ended")
            except ProtocolError as broken:
                await self.end(f"the worker broke the protocol ({broken}) and was killed")
            except asyncio.CancelledError:
                await asyncio.shield(self.end("the call was cancelled"))
                raise
            else:
                return reply
            return {"error": self.ending}

    async def reply_to(self, number: str, timeout_s: float) -> dict[str, Any]:
        """Wait for a reply, up the ladder: interrupt, then kill."""
        reply = await self.reply_within(number, timeout_s)
        if reply is not None:
            return reply
        if self.ending is None:
            self.signal(signal.SIGINT)
            reply = await self.reply_within(number, self.limits.interrupt_grace_s)
        if reply is not None:
            return {**reply, "error": f"interrupted after {timeout_s:g} s; the state is kept"}
        if self.ending is None:
            await self.end(f"killed: it ran for {timeout_s:g} s and could not be interrupted")
        return {"error": self.ending}

    async def reply_within(self, number: str, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the reply of one request; None: it did not come, or the worker was ended."""
        deadline = time.perf_counter() + timeout_s
        while (left := deadline - time.perf_counter()) > 0:
            if self.pending is None:
                self.pending = asyncio.create_task(read_frame(self.reader, self.max_frame_bytes))
            pause = left if self.folder_is_bounded else min(left, DISK_CHECK_S)
            await asyncio.wait({self.pending}, timeout=pause)
            if not self.folder_is_bounded and folder_bytes(self.folder) > self.limits.disk_bytes:
                await self.end(f"killed: its files pass {self.limits.disk_bytes} bytes")
                return None
            if self.pending.done():
                frame, self.pending = await self.pending, None
                if frame.get("reply") == number:
                    return frame
                self.num_stray_frames += 1
                if self.num_stray_frames > MAX_STRAY_FRAMES:
                    raise ProtocolError(f"{self.num_stray_frames} replies that answer nothing")
        return None

    def output_of(self, reply: dict[str, Any]) -> CellOutput:
        """Read a reply, believing nothing."""
        try:
            images = reply.get("images", [])[: self.limits.num_images]
            output = CellOutput(
                text=str(reply.get("text", ""))[: 2 * self.limits.output_chars + 1000],
                images=[self.picture(image) for image in images],
                error=None if reply.get("error") is None else str(reply["error"])[:2000],
                state_lost=not self.is_alive,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            return CellOutput(error=f"the worker sent a malformed reply: {error}")
        if left_out := reply.get("images_left_out"):
            output.text += f"\n[{left_out} images left out]"
        if output.state_lost:
            output.error = f"{output.error}; all variables and files are lost"
        return output

    def picture(self, image: dict[str, Any]) -> Image.Image:
        """Read raw pixels."""
        width, height = image["size"]
        if not (type(width) is type(height) is int and width > 0 and height > 0):
            raise ValueError(f"image of size {image['size']!r}")
        if width * height > self.limits.image_pixels:
            raise ValueError(f"image of {width} x {height} pixels")
        return Image.frombytes("RGB", (width, height), base64.b64decode(image["data"]))

    def signal(self, number: int) -> None:
        """Send the process a signal; it may be dead already."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def end(self, why: str) -> None:
        """Kill the worker and all it started; forget its files."""
        if self.ending is not None:
            return
        self.ending = why
        killed_already = why != "the worker ended"
        if killed_already:
            self.signal(signal.SIGKILL)
        status = await self.reap(self.pid)
        if not killed_already:
            self.ending = f"the worker ended with {ending_of(status)}"
        os.close(self.pidfd)
        if self.pending is not None:
            self.pending.cancel()
            await asyncio.gather(self.pending, return_exceptions=True)
        self.writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def close(self) -> None:
        """End the worker; safe to call again."""
        await self.end("closed")


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's files; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it may be gone by now
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def ending_of(status: int) -> str:
    """Say how a process ended."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    return f"signal {signal.Signals(-code).name}"
