"""The worker's side: an IPython shell that answers requests, one at a time."""

import base64
import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from moonlit.agents.sandbox.frames import pack, receive
from moonlit.agents.sandbox.output import CappedText, Pictures

PRELOADED = (
    "IPython.core.interactiveshell",
    "IPython.core.magics",
    "numpy",
    "PIL.Image",
    "PIL.ImageDraw",
    "PIL.ImageFilter",
    "PIL.ImageFont",
    "PIL.ImageOps",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "scipy.ndimage",
    "scipy.signal",
    "scipy.spatial",
    "networkx",
    "matplotlib.pyplot",
)
"""Imported once by the template and shared by all workers."""


class Kernel:
    """An IPython shell, made in the template and used in a worker."""

    def __init__(self) -> None:
        for name in PRELOADED:
            importlib.import_module(name)
        from PIL import Image
        from traitlets.config import Config

        Image.preinit()
        config = Config()
        config.HistoryManager.enabled = False
        config.Shell.colors = "nocolor"
        config.Shell.xmode = "Plain"
        self.shell = shell_class(self).instance(config=config)
        self.pictures = Pictures()
        self.stdout = CappedText(1)
        self.running = False
        self.show_in_replies()

    def show_in_replies(self) -> None:
        """Make every way of showing something end in the reply."""
        import IPython.display
        import matplotlib as mpl
        from IPython.core import display_functions
        from matplotlib import pyplot
        from PIL import Image

        mpl.use("agg")
        pyplot.show = lambda *args, **kwargs: None  # open figures are collected after the call
        IPython.display.display = display_functions.display = self.display
        Image.Image.show = lambda picture, *args, **kwargs: self.display(picture)  # pyright: ignore
        self.shell.user_ns["display"] = self.display

    def display(self, *shown: object, **_: object) -> None:
        """Show pictures and figures as pictures, anything else as text."""
        from IPython.lib.pretty import pretty

        for value in shown:
            caption = self.pictures.add(value)
            print(caption if caption is not None else pretty(value))

    def serve(self, channel: socket.socket, limits: dict[str, Any]) -> None:
        """Answer requests until the trainer closes the channel."""
        operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "run": lambda request: self.run(request["code"], limits),
            "put": self.put,
        }
        while (request := receive(channel)) is not None:
            answer = operations[request["op"]](request)
            channel.sendall(pack({"reply": request["id"], **answer}))

    def put(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write a file into the worker's folder."""
        try:
            with open(os.path.basename(request["name"]), "wb") as file:
                file.write(base64.b64decode(request["data"]))
        except OSError as error:
            return {"error": str(error)}
        return {"error": None}

    def run(self, code: str, limits: dict[str, Any]) -> dict[str, Any]:
        """Run one cell."""
        self.begin(limits)
        try:
            self.running = True
            result = self.shell.run_cell(code, store_history=True)
            self.pictures.add_open_figures()
            self.running = False
            error = result.error_before_exec or result.error_in_exec
        except (Exception, KeyboardInterrupt) as raised:  # by a figure, or just behind the cell
            error = raised
        finally:
            self.running = False
        return {
            "text": self.stdout.text() + written_to_descriptors(limits["output_chars"]),
            "images": self.pictures.as_json(),
            "images_left_out": self.pictures.num_left_out,
            "error": None if error is None else f"{type(error).__name__}: {error}"[:1000],
        }

    def begin(self, limits: dict[str, Any]) -> None:
        """Start a call with empty outputs; threads of earlier calls write into nothing."""
        os.ftruncate(1, 0)
        signal.signal(signal.SIGINT, self.on_interrupt)
        earlier = set(threading.enumerate()) - {threading.main_thread()}
        self.stdout = CappedText(limits["output_chars"], refused=earlier)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = self.stdout  # pyright: ignore
        self.pictures.begin(limits["num_images"], limits["image_pixels"])

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Stop the cell, if there is one."""
        if self.running:
            raise KeyboardInterrupt


def shell_class(kernel: Kernel) -> Any:
    """Return IPython's shell, showing values our way and keeping no output of its own."""
    from IPython.core.displayhook import DisplayHook
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets import Type

    class Hook(DisplayHook):
        """Shows the value of a cell's last expression."""

        def __call__(self, result: object = None) -> None:
            if result is not None and not self.quiet():
                kernel.shell.user_ns["_"] = result
                kernel.display(result)

    class Shell(InteractiveShell):
        displayhook_class = Type(Hook)

        @contextlib.contextmanager
        def _tee(self, channel: str) -> Iterator[None]:
            yield  # IPython's keeps all that was ever printed

        def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
            print("\n".join(stb).rstrip() if etype is SyntaxError else cell_traceback(evalue))

    return Shell


def cell_traceback(error: BaseException) -> str:
    """Return an error with the lines of cells that led to it, without the machine's paths."""
    lines = ["Traceback (most recent call last):"]
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith("<ipython-input"):
            lines += [f"  Cell line {frame.lineno}, in {frame.name}", f"    {frame.line}"]
    return "\n".join([*lines, *traceback.format_exception_only(error)]).rstrip()


def written_to_descriptors(max_chars: int) -> str:
    """Return what was written past Python, to descriptors 1 and 2."""
    num_bytes = os.fstat(1).st_size
    text = os.pread(1, max_chars, 0).decode("utf-8", "replace")
    left_out = num_bytes - max_chars
    return text + (f"\n... {left_out} bytes left out" if num_bytes > max_chars else "")
