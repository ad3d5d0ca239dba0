"""Sandboxes that tests share: one event loop in a thread, one pool for each policy."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from moonlit.agents.sandbox.policy import Limits, Policy
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.sandbox.worker import CellOutput, Worker

MIB = 2**20
LIMITS = Limits(
    memory_bytes=256 * MIB, disk_bytes=8 * MIB, call_timeout_s=10.0, interrupt_grace_s=0.3
)
POLICIES = {
    "all": Policy(limits=LIMITS),
    "unprivileged": Policy(limits=LIMITS, use=("landlock", "seccomp")),
}


class Sandbox:
    """A pool used from synchronous tests."""

    def __init__(self, policy: Policy) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.pool = Pool(policy, num_warm=1)
        self.wait(self.pool.__aenter__())

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def with_worker(self, action: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Any:
        async def borrow() -> Any:
            async with self.pool.worker() as worker:
                return await action(worker)

        return self.wait(borrow())

    def run(self, *cells: str, timeout_s: float | None = None) -> list[CellOutput]:
        """Run cells one after another in one fresh worker."""

        async def all_cells(worker: Worker) -> list[CellOutput]:
            return [await worker.run(cell, timeout_s=timeout_s) for cell in cells]

        return self.with_worker(all_cells)

    def close(self) -> None:
        self.wait(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def pytest_configure(config: pytest.Config) -> None:
    """Silence a warning about our shape checks, which sample containers with ``random``."""
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module")


@pytest.fixture(scope="session", params=POLICIES)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """With every layer, and with those that need no namespaces."""
    shared = Sandbox(POLICIES[request.param])
    yield shared
    shared.close()
