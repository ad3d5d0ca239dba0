"""The ``ipython`` tool: one sandboxed interpreter a rollout, with the task's pictures in it.

Source: technical report (arXiv:2602.02276), Sec. 2.2: every operation on a picture is IPython code.
"""

import contextlib
import io
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.sandbox.worker import Worker
from moonlit.agents.tools import Tool, ToolOutput

DESCRIPTION = (
    "Run Python in a persistent IPython session. numpy, PIL, scipy, networkx and matplotlib are "
    "installed. The pictures of the task are the files image_0.png, image_1.png, ... and the list "
    "`images` of PIL pictures. Returns what is printed, the last expression and shown figures."
)
PARAMETERS = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "Python code"}},
    "required": ["code"],
    "additionalProperties": False,
}
LOAD = """from PIL import Image
images = [Image.open(f"image_{{n}}.png").convert("RGB") for n in range({num_images})]"""
NEW_SESSION = "[a new session was started; only the pictures of the task are in it]\n"


def declaration() -> dict[str, Any]:
    """Return the tool's declaration without a session behind it."""
    function = {"name": "ipython", "description": DESCRIPTION, "parameters": PARAMETERS}
    return {"type": "function", "function": function}


@contextlib.asynccontextmanager
async def ipython(pool: Pool, images: Sequence[Image.Image] = ()) -> AsyncIterator[Tool]:
    """Lend the tool for one rollout; its interpreter ends with it.

    Args:
        pool: where interpreters come from.
        images: the task's pictures, a clip's frames in order.
    """
    async with contextlib.AsyncExitStack() as stack:
        session = Session(pool, images, stack)
        yield Tool(
            name="ipython", description=DESCRIPTION, parameters=PARAMETERS, call=session.call
        )


class Session:
    """An interpreter that is replaced when it is lost."""

    def __init__(
        self, pool: Pool, images: Sequence[Image.Image], stack: contextlib.AsyncExitStack
    ) -> None:
        self.pool, self.images, self.stack = pool, images, stack
        self.worker: Worker | None = None

    async def call(self, arguments: dict[str, Any]) -> ToolOutput:
        """Run one cell."""
        replaced = self.worker is not None and not self.worker.is_alive
        if self.worker is None or replaced:
            self.worker = await self.open()
        output = await self.worker.run(arguments["code"])
        text = NEW_SESSION + output.text if replaced else output.text
        return ToolOutput(text=text, images=output.images, error=output.error)

    async def open(self) -> Worker:
        """Take a worker and put the pictures into it."""
        if self.worker is not None:
            await self.stack.aclose()
        worker = await self.stack.enter_async_context(self.pool.worker())
        for place, image in enumerate(self.images):
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=1)
            await worker.put(f"image_{place}.png", file.getvalue())
        loaded = await worker.run(LOAD.format(num_images=len(self.images)))
        if loaded.error is not None:
            raise RuntimeError(f"the pictures could not be loaded: {loaded.error}")
        return worker
