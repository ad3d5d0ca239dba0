"""The servers of a run and their weights: started, watched, given weights again when they return.

The first rank has it. Every server goes through the same door, at each sync and after each death:
it is there, it takes the weights, and its log-probs of the probe are the trainer's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moonlit.chat.tokenizer import Tokenizer
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.remote import RETRY_S, EngineServerError
from moonlit.rl.engines.sync import Probe, WeightSyncError
from moonlit.rl.engines.vllm.process import ServerProcess
from moonlit.rl.engines.vllm.server import UPDATE, ServerDownError, VllmServer
from moonlit.rl.engines.vllm.weights import (
    ServedWeights,
    WrittenWeights,
    is_local,
)

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""How often a server may be lost while it is given its weights."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What every server must have."""

    label: str
    """Names the weights."""
    exchange: Callable[[], None]
    """Puts them into the store, in place of the last."""
    probe: Probe
    trained: Sequence[Tensor]
    """The trainer's log-probs of it."""


class Fleet:
    """Brings servers to the trainer's weights.

    Args:
        command: starts a server on this machine; None: others start and restart them.
        folder: for servers without an update interface, and for the output of those started here.
        tokenizer: goes into the folder with the weights.
        secret: with which workers fetch weights.
        max_logprob_gap: largest difference on the probe that a sync may leave [nats].
        start_timeout_s: how long a server may take to start, and to come back [s].
        watch_s: between two looks at each server [s].
    """

    def __init__(
        self,
        *,
        command: str | None,
        folder: Path | None,
        tokenizer: Tokenizer,
        secret: str,
        max_logprob_gap: float,
        start_timeout_s: float,
        watch_s: float,
    ) -> None:
        if command is not None and folder is None:
            raise ValueError("engine.command wants engine.folder, for the servers' output")
        self.command, self.folder, self.tokenizer = command, folder, tokenizer
        self.secret, self.max_logprob_gap = secret, max_logprob_gap
        self.start_timeout_s, self.watch_s = start_timeout_s, watch_s
        self.servers: Sequence[VllmServer] = ()
        self.processes: dict[VllmServer, ServerProcess] = {}
        self.turns: dict[VllmServer, asyncio.Lock] = {}
        self.errors: dict[VllmServer, Exception] = {}
        self.store: ServedWeights | WrittenWeights | None = None
        self.kept: Kept | None = None
        self.watching: asyncio.Task[None] | None = None

    async def begin(self, servers: Sequence[VllmServer]) -> None:
        """Start the servers where we do, wait for all, and see how they take weights.

        Raises:
            ValueError: if one lacks what is needed.
            EngineServerError: if one does not answer in time.
        """
        self.servers = servers
        for server in servers:
            self.turns[server] = asyncio.Lock()
            if self.command is not None:
                self.processes[server] = self.process_of(server, self.command)
        deadline = time.monotonic() + self.start_timeout_s
        await asyncio.gather(*(self.await_server(server, deadline) for server in servers))
        for server in servers:
            await server.ask_what_it_can()
        self.store = self.store_for(servers)

    def process_of(self, server: VllmServer, command: str) -> ServerProcess:
        """Return what starts a server here."""
        if not is_local(server.url):
            raise ValueError(f"engine.command starts servers on 127.0.0.1 only, not {server.url}")
        assert self.folder is not None
        name = server.url.rsplit(":", 1)[1]
        return ServerProcess(command, server.url, self.folder / f"server-{name}.log")

    def store_for(self, servers: Sequence[VllmServer]) -> ServedWeights | WrittenWeights:
        """Choose the update interface where all servers have it, else the folder."""
        without = [server for server in servers if not server.takes_updates]
        if not without:
            return ServedWeights(self.secret)
        lacking = sorted(set(UPDATE) - without[0].routes)
        if self.folder is None:
            raise ValueError(
                f"{without[0]} has no {', '.join(lacking)}: engine.folder must name a folder that"
                " all servers see, for the weights"
            )
        log.warning("%s has no %s: weights go through %s", without[0], lacking, self.folder)
        return WrittenWeights(self.folder, self.tokenizer)

    # A sync

    @property
    def label(self) -> str:
        """Of the weights that the servers must have."""
        return "" if self.kept is None else self.kept.label

    def prepared(
        self, module: Kimi, label: str, probe: Probe, trained: Sequence[Tensor]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """Gather a trainer's weights; return what brings them to the servers.

        On the trainer's thread; every rank must call its keeper's.

        Args:
            module: the trainer's.
            label: names its weights.
            probe: rows ...
            trained: ... and the trainer's log-probs of them.
        """
        assert self.store is not None
        return partial(self.sync, Kept(label, self.store.made(module, label), probe, trained))

    async def sync(self, kept: Kept) -> None:
        """Bring all servers to new weights.

        Raises:
            WeightSyncError: if one's log-probs differ; names it.
            EngineServerError: if one is gone and does not come back.
        """
        assert self.store is not None
        async with AsyncExitStack() as turns:
            for turn in self.turns.values():  # nobody fetches while they are exchanged
                await turns.enter_async_context(turn)
            kept.exchange()
            self.kept = kept
            self.errors.clear()
        await asyncio.gather(*map(self.require, self.servers))
        if self.watching is None and self.watch_s > 0:
            self.watching = asyncio.create_task(self.watch())

    async def require(self, server: VllmServer) -> None:
        """Return when a server has the weights.

        Raises:
            WeightSyncError: if its last sync failed; it must not be sampled from.
            EngineServerError: if it is gone and did not come back.
        """
        if server in self.errors:
            raise self.errors[server]
        if server.known_label != self.label:
            await self.recover(server, server.life)

    async def recover(self, server: VllmServer, life: int) -> None:
        """Bring a server back that was lost in one of its lives, unless that is done already."""
        async with self.turns[server]:
            if server in self.errors:
                raise self.errors[server]
            if server.life != life:
                return
            server.known_label = None
            try:
                await self.bring_up(server)
            except (EngineServerError, WeightSyncError, ValueError) as error:
                self.errors[server] = error
                raise

    async def bring_up(self, server: VllmServer) -> None:
        """Wait for a server, give it the weights, and let it prove that it has them."""
        assert self.kept is not None
        kept = self.kept
        gap = await self.given(server, kept)
        if not gap <= self.max_logprob_gap:
            raise WeightSyncError(
                f"{server}: after the sync to weights {kept.label} the probe's log-probs differ by"
                f" {gap:.3g} between trainer and server: at most {self.max_logprob_gap} is allowed"
            )
        server.known_label, server.life = kept.label, server.life + 1

    async def given(self, server: VllmServer, kept: Kept) -> float:
        """Give a server the weights, wherever it is in its life; return its gap on the probe."""
        assert self.store is not None
        num_lost = 0
        while True:
            await self.await_server(server, time.monotonic() + self.start_timeout_s)
            try:
                await self.store.into(server)
                return await server.gap(kept.probe, kept.trained, kept.label)
            except ServerDownError as error:
                num_lost += 1
                if num_lost == MAX_TRIES:
                    raise
                log.warning("%s: it is given its weights again", error)
                await asyncio.sleep(RETRY_S)

    # Their lives

    async def await_server(self, server: VllmServer, deadline: float) -> None:
        """Wait until a server lives; start it where we do and it does not run.

        Raises:
            EngineServerError: at the deadline, or if what we start ends at once, again and again.
        """
        process = self.processes.get(server)
        while not await server.is_up():
            if process is not None and process.has_ended:
                process.stop()  # its workers may have outlived it
                process.start()
                log.warning("%s is started: %s", server, process.log)
            if time.monotonic() > deadline:
                said = "" if process is None else f"; its output is in {process.log}"
                raise EngineServerError(
                    f"{server} does not answer for {self.start_timeout_s:.0f} s{said}"
                )
            await asyncio.sleep(RETRY_S)

    async def watch(self) -> None:
        """Look at the servers now and then, and bring back those that are lost."""
        while True:
            await asyncio.sleep(self.watch_s)
            await asyncio.gather(*map(self.look_at, self.servers))

    async def look_at(self, server: VllmServer) -> None:
        """Bring a server back if it is gone or has other weights."""
        if server in self.errors or self.turns[server].locked():
            return
        try:
            if await server.label() == self.label:
                return
        except (EngineServerError, ValueError) as error:
            log.warning("%s", error)
        try:
            await self.recover(server, server.life)
        except (EngineServerError, WeightSyncError, ValueError) as error:
            log.error("%s", error)  # raised to whoever samples there next

    async def close(self) -> None:
        """End the servers that were started here."""
        if self.watching is not None:
            self.watching.cancel()
        for process in self.processes.values():
            await asyncio.to_thread(process.stop)
        if self.store is not None:
            await self.store.close()
