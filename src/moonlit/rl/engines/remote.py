"""The engine on other machines: a client of engine servers, with the protocol of every engine.

Each data-parallel rank samples from one of the servers; the first rank sends the weights to all.
"""

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.sync import Probe, WeightSyncError, trainer_logprobs, whole
from moonlit.rl.engines.wire import (
    MAX_PART_BYTES,
    SECRET_HEADER,
    logprobs_as_json,
    read_completion,
    request_as_json,
    secret,
)
from moonlit.rl.loop_thread import LoopThread

ERRORS = {kind.__name__: kind for kind in (ValueError, FloatingPointError, WeightSyncError)}
RETRY_S = 0.5


class EngineServerError(ConnectionError):
    """An engine server cannot be reached, or has failed; the message names it."""


class RemoteEngine:
    """Samples on one of several engine servers.

    Args:
        servers: ``host:port`` of each.
        place: which of them, counted round and round: the rank.
        sends_weights: whether this process sends the weights, to all of them.
        start_timeout_s: how long the servers may take to start [s].
    """

    def __init__(
        self, servers: Sequence[str], *, place: int, sends_weights: bool, start_timeout_s: float
    ) -> None:
        if not servers or not all(servers):
            raise ValueError(f"engine.servers={list(servers)}: want at least one HOST:PORT")
        self.servers = [f"http://{server}" for server in servers]
        self.server = self.servers[place % len(servers)]
        self.sends_weights, self.start_timeout_s = sends_weights, start_timeout_s
        self.trainer = f"{socket.gethostname()}-{os.getpid()}-{place}"
        self.headers = {SECRET_HEADER: secret()}
        self.probe: Probe | None = None
        self._num_sampled = 0
        # Connections outlive the event loops of those who ask: they live on a loop of their own.
        self._thread = LoopThread("engine servers")
        self._client: aiohttp.ClientSession | None = None

    @classmethod
    def connect(
        cls, module: Kimi, *, servers: str, version: int, start_timeout_s: float
    ) -> "RemoteEngine":
        """Wait for the servers and send them a trainer's weights. Every rank must call this.

        Args:
            module: the trainer's, sharded or not.
            servers: ``host:port,host:port``.
            version: of the weights.
            start_timeout_s: how long the servers may take to start [s].
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        engine = cls(
            servers.split(","),
            place=rank,
            sends_weights=rank == 0,
            start_timeout_s=start_timeout_s,
        )

        async def begin() -> None:
            await engine.await_servers()
            await engine.update_weights(module, version)

        try:
            asyncio.run(begin())
        except BaseException:
            engine.close()
            raise
        return engine

    # Sampling

    async def generate(self, request: Request) -> Completion:
        """Continue one prompt.

        Raises:
            ValueError: if the request cannot be served; names what is wrong.
            WeightSyncError: if the server's last sync failed.
            EngineServerError: if the server cannot be reached.
        """
        value = request_as_json(request, request.session)
        completion = read_completion(await self.call("POST", self.server, "/generate", json=value))
        self._num_sampled += len(completion.token_ids)
        return completion

    @contextmanager
    def session(self) -> Iterator[str]:
        """Name a dialogue, so that the server keeps its latents between requests."""
        name = uuid.uuid4().hex
        try:
            yield name
        finally:
            # Nobody waits: a server that is gone is named by the next request to it.
            self._thread.start(self._request("DELETE", self.server, f"/sessions/{name}"))

    @property
    def num_sampled_tokens(self) -> int:
        """Of the completions that have come back."""
        return self._num_sampled

    async def pause(self) -> None:
        """Ask the server to hold this rank's requests: it does when all its ranks ask."""
        await self.call("POST", self.server, "/pause", params={"trainer": self.trainer})

    async def resume(self) -> None:
        """Let the server go on."""
        await self.call("POST", self.server, "/resume", params={"trainer": self.trainer})

    def close(self) -> None:
        """Leave the servers, which go on for others; a job ends them."""
        if self._client is not None:
            self._thread.run(self._client.close())
        self._thread.close()

    # Weights

    async def update_weights(self, module: nn.Module, version: int) -> None:
        """Send the weights to every server, each of which proves on the probe that it has them.

        Every rank of a sharded module must call this.

        Raises:
            WeightSyncError: if a server's log-probs differ; it refuses to sample until a sync
                succeeds.
            EngineServerError: if a server cannot be reached.
        """
        assert isinstance(module, Kimi)
        if self.probe is None:
            self.probe = Probe.for_model(module)
        trained = trainer_logprobs(module, self.probe.prompts)
        part: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            part[name] = whole(tensor).detach().cpu().contiguous()
            if sum(t.nbytes for t in part.values()) >= MAX_PART_BYTES:
                await self._send_part(part)
                part = {}
        await self._send_part(part)
        if self.sends_weights:
            text = logprobs_as_json(trained)
            await self.tell_all("POST", f"/weights/{version}", data=text)

    async def _send_part(self, part: dict[str, Tensor]) -> None:
        if self.sends_weights and part:
            await self.tell_all("PUT", "/weights", data=save(part))

    async def tell_all(self, method: str, path: str, **content: Any) -> None:
        """Call all servers at once."""
        calls = (self.call(method, server, path, **content) for server in self.servers)
        await asyncio.gather(*calls)

    # HTTP

    async def await_servers(self) -> None:
        """Wait until every server answers.

        Raises:
            EngineServerError: naming the first that does not in time.
        """
        deadline = time.monotonic() + self.start_timeout_s
        for server in self.servers:
            while True:
                try:
                    await self.call("GET", server, "/health")
                    break
                except EngineServerError:
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(RETRY_S)

    async def call(self, method: str, server: str, path: str, **content: Any) -> Any:
        """Call a server from any event loop; raise here what it was refused with there."""
        return await asyncio.wrap_future(
            self._thread.start(self._request(method, server, path, **content))
        )

    async def _request(self, method: str, server: str, path: str, **content: Any) -> Any:
        if self._client is None:
            self._client = aiohttp.ClientSession(
                headers=self.headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
                connector=aiohttp.TCPConnector(limit=0),
            )
        try:
            async with self._client.request(method, server + path, **content) as answer:
                value = await answer.json()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineServerError(f"engine server {server}: {error}") from error
        if answer.status == 200:
            return value
        if answer.status == 403:  # not worth waiting for
            raise ValueError(f"engine server {server} has another MOONLIT_ENGINE_SECRET than this")
        kind = ERRORS.get(value.get("kind", ""), EngineServerError)
        raise kind(f"engine server {server}: {value.get('error', answer.status)}")
