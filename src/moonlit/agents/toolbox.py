"""Toolboxes: what lends every rollout tools of its own."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from moonlit.agents.environment import close
from moonlit.agents.tools import Toolset
from moonlit.batch import Task

Toolbox = Callable[[Task], AbstractAsyncContextManager[Toolset]]
"""Lends the tools of one rollout of a task; they end with it. One that holds something that all
rollouts share, such as a pool of sandboxes, has an ``aclose``."""


class Toolboxes:
    """Several toolboxes as one, such as a library and an interpreter.

    Args:
        boxes: by a name for ``conf/``; no two may lend tools of one name.
    """

    def __init__(self, *, boxes: Mapping[str, Toolbox]) -> None:
        self.boxes = dict(boxes)

    @asynccontextmanager
    async def __call__(self, task: Task) -> AsyncIterator[Toolset]:
        """Lend the tools of all, in the order of the boxes.

        Raises:
            ValueError: if two tools have one name.
        """
        async with AsyncExitStack() as stack:
            lent = [await stack.enter_async_context(box(task)) for box in self.boxes.values()]
            yield Toolset([tool for toolset in lent for tool in toolset.tools])

    async def aclose(self) -> None:
        """Let go of what the boxes share."""
        for box in self.boxes.values():
            await close(box)
