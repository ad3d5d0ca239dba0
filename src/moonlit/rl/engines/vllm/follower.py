"""What every rank but the first has in place of the fleet: it waits for the first rank's work."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moonlit.models.kimi import Kimi
from moonlit.rl.engines.remote import RETRY_S, EngineServerError
from moonlit.rl.engines.sync import Probe
from moonlit.rl.engines.vllm.server import ServerDownError, VllmServer
from moonlit.rl.engines.vllm.weights import gather_all


class Follower:
    """Asks the servers themselves which weights they have.

    Args:
        timeout_s: how long that may take [s].
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.label = ""

    async def begin(self, servers: Sequence[VllmServer]) -> None:
        """Do nothing: a server is asked what it can when it is first needed."""

    def prepared(
        self, module: Kimi, label: str, probe: Probe, trained: Sequence[Tensor]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """Take part in the gathering of the first rank; return what expects the weights."""
        gather_all(module)
        return partial(self.sync, label)

    async def sync(self, label: str) -> None:
        """Expect new weights."""
        self.label = label

    async def require(self, server: VllmServer) -> None:
        """Return when a server has the weights.

        Raises:
            EngineServerError: if it has not, in time; names it.
        """
        deadline = time.monotonic() + self.timeout_s
        why = "it has other weights than the first rank has sent"
        while server.known_label != self.label:
            try:
                if not server.routes:
                    await server.ask_what_it_can()
                server.known_label = await server.label()
            except ServerDownError as error:
                why = str(error)
            if server.known_label != self.label:
                if time.monotonic() > deadline:
                    raise EngineServerError(
                        f"{server} is not ready in {self.timeout_s:.0f} s: {why}"
                    )
                await asyncio.sleep(RETRY_S)

    async def recover(self, server: VllmServer, life: int) -> None:
        """Wait until the first rank has brought a server back."""
        if server.life == life:
            server.known_label, server.life = None, life + 1
        await self.require(server)

    async def close(self) -> None:
        """Leave the servers to the first rank."""
