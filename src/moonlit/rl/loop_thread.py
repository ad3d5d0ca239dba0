"""An event loop on a thread of its own: coroutines live on between the calls that await some."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from moonlit.agents.environment import RunEndingError

Result = TypeVar("Result")


class LoopThread:
    """Runs a loop until it is closed. To be used from one other thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.serve, name=name, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """Run the loop until it is stopped.

        A coroutine that wants to end the program leaves the loop: whoever waits for it gets what
        it raised once the loop goes on.
        """
        while True:
            try:
                return self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine there and wait for what it returns or raises.

        If the wait is interrupted, the coroutine is cancelled.

        Raises:
            RuntimeError: instead of what is no ``Exception`` (``SystemExit``): here it is an error.
        """
        future = self.start(coroutine)
        try:
            wait([future])
        except BaseException:
            future.cancel()
            raise
        error = None if future.cancelled() else future.exception()
        if error is None or isinstance(error, Exception):
            return future.result()
        told = str(error) if isinstance(error, RunEndingError) else repr(error)
        raise RuntimeError(told) from error

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine there; do not wait. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, function: Callable[[], Result]) -> Result:
        """Call a function there: nothing else runs on the loop meanwhile."""

        async def called() -> Result:
            return function()

        return self.run(called())

    def close(self) -> None:
        """Cancel whatever is still running, then end the loop and its thread."""
        self.run(cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def cancel_others() -> None:
    """Cancel every other task of this loop, and wait until each has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
