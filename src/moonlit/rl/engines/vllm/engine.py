"""The engine on vLLM servers: ids and patches out, ids, log-probs and weight versions back.

Each data-parallel rank samples from one of the servers; the first rank gives all of them the
weights and watches over them. A pause takes requests back with what they have; later they are sent
on from there, as if the server had held them. So any number of trainers may share a server.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import torch.distributed as dist
from torch import nn

from moonlit.chat.tokenizer import Tokenizer
from moonlit.models.kimi import Kimi
from moonlit.models.mixed_precision import autocast_of
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.native import MAX_LOGPROB_GAP, MAX_LOGPROB_GAP_16, media_ids
from moonlit.rl.engines.prompt import require_fit
from moonlit.rl.engines.remote import RETRY_S
from moonlit.rl.engines.sync import Probe, trainer_logprobs
from moonlit.rl.engines.vllm.answering import Answering
from moonlit.rl.engines.vllm.fleet import Fleet
from moonlit.rl.engines.vllm.follower import Follower
from moonlit.rl.engines.vllm.server import ServerDownError, VllmServer
from moonlit.rl.engines.vllm.wire import Answer
from moonlit.rl.engines.wire import secret
from moonlit.rl.loop_thread import LoopThread

Result = TypeVar("Result")


class VllmEngine:
    """Samples on one of several vLLM servers.

    Args:
        module: the trainer's: its shape, and that of the probe.
        servers: ``host:port`` of each.
        place: which of them, counted round and round: the rank.
        keeper: knows whether a server has the trainer's weights.
        normalises: whether the servers take raw pixels, as vLLM does by default.
        request_timeout_s: how long one may take over one answer [s].
        precision: the trainer's, by Lightning's name: of the probe's log-probs.
    """

    def __init__(
        self,
        module: Kimi,
        servers: Sequence[str],
        *,
        place: int,
        keeper: Fleet | Follower,
        normalises: bool,
        request_timeout_s: float,
        precision: str = "32-true",
    ) -> None:
        if not servers or not all(servers):
            raise ValueError(f"engine.servers={list(servers)}: want at least one HOST:PORT")
        self.decoder, self.vision = module.decoder_shape, module.vision_shape
        self.banned_ids = media_ids(self.decoder.media_pad_id)
        self.probe = Probe.for_model(module)
        self.servers = [
            VllmServer(
                f"http://{server}",
                self.client,
                request_timeout_s=request_timeout_s,
                normalises=normalises,
            )
            for server in servers
        ]
        self.server = self.servers[place % len(servers)]
        self.keeper, self.precision = keeper, precision
        self.version = -1
        self.num_sampled = 0
        self.in_flight: dict[str, asyncio.Future[Answer]] = {}
        # Connections outlive the event loops of those who ask: they live on a loop of their own.
        self.thread = LoopThread("vLLM servers")
        self._client: aiohttp.ClientSession | None = None
        self.is_open = asyncio.Event()
        self.is_open.set()

    @classmethod
    def connect(
        cls,
        module: Kimi,
        *,
        version: int,
        servers: str,
        command: str | None,
        folder: str | None,
        tokenizer: str,
        normalises: bool,
        precision: str,
        max_logprob_gap: float | None,
        start_timeout_s: float,
        request_timeout_s: float,
        watch_s: float,
    ) -> "VllmEngine":
        """Start or await the servers and give them a trainer's weights. Every rank must call this.

        Args:
            module: the trainer's, sharded or not.
            version: of its weights.
            servers: ``host:port,host:port``.
            command: starts one of them on this machine, ``{port}`` replaced; None: others do.
            folder: where weights are written for servers without vLLM's update interface, and the
                output of the servers started here.
            tokenizer: as ``tokenizer=`` says, for the folder.
            normalises: whether the servers take raw pixels.
            precision: the trainer's, by Lightning's name.
            max_logprob_gap: largest difference on the probe that a sync may leave [nats]; None:
                0.02, or 0.2 where the trainer computes in 16 bits (our defaults).
            start_timeout_s: how long a server may take to start, and to come back [s].
            request_timeout_s: how long one may take over one answer [s].
            watch_s: between two looks at each server [s].

        Raises:
            ValueError: if a server lacks what is needed; says how to start it.
            EngineServerError: if one cannot be reached.
            WeightSyncError: if one does not compute the trainer's policy.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        if max_logprob_gap is None:
            in_16_bits = precision.startswith(("16", "bf16"))
            max_logprob_gap = MAX_LOGPROB_GAP_16 if in_16_bits else MAX_LOGPROB_GAP
        keeper: Fleet | Follower = Follower(start_timeout_s)
        if rank == 0:
            keeper = Fleet(
                command=command,
                folder=None if folder is None else Path(folder),
                tokenizer=Tokenizer.named(tokenizer),
                secret=secret(),
                max_logprob_gap=max_logprob_gap,
                start_timeout_s=start_timeout_s,
                watch_s=watch_s,
            )
        engine = cls(
            module,
            servers.split(","),
            place=rank,
            keeper=keeper,
            normalises=normalises,
            precision=precision,
            request_timeout_s=request_timeout_s,
        )
        try:
            engine.thread.run(keeper.begin(engine.servers))
            asyncio.run(engine.update_weights(module, version))
        except BaseException:
            engine.close()
            raise
        return engine

    # Sampling

    async def generate(self, request: Request) -> Completion:
        """Continue one prompt.

        Raises:
            ValueError: if the request cannot be served; names what is wrong.
            WeightSyncError: if the server holds other weights than the trainer sent.
            EngineServerError: if the server is gone and does not come back.
        """
        require_fit(
            request,
            self.decoder,
            self.vision,
            max_tokens=None,
            always_banned=self.banned_ids,
        )
        return await self.there(self._generate(request))

    async def _generate(self, request: Request) -> Completion:
        answering = Answering(self, request)
        while not answering.is_done:
            await self.is_open.wait()
            await answering.go_on()
        return answering.completion

    @contextmanager
    def session(self) -> Iterator[None]:
        """Return nothing to name: the servers find common prefixes by themselves."""
        yield None

    @property
    def num_sampled_tokens(self) -> int:
        """Of the answers, and parts of answers, that have come back."""
        return self.num_sampled

    async def pause(self) -> None:
        """Take all requests back with what they have; return when none is on a server."""
        await self.there(self._pause())

    async def _pause(self) -> None:
        self.is_open.clear()
        while self.in_flight:
            asked = list(self.in_flight.values())
            # Again and again: a request that is still on its way there is not known there.
            try:
                await self.server.abort(list(self.in_flight))
            except ServerDownError:  # then its requests end by themselves
                await asyncio.sleep(RETRY_S)
            await asyncio.wait(asked, timeout=RETRY_S)
            await asyncio.sleep(0)

    async def resume(self) -> None:
        """Send them on."""
        await self.there(self._resume())

    async def _resume(self) -> None:
        self.is_open.set()

    def close(self) -> None:
        """Leave the servers, and end those that were started here."""
        self.thread.run(self.keeper.close())
        if self._client is not None:
            self.thread.run(self._client.close())
        self.thread.close()

    # Weights

    async def update_weights(self, module: nn.Module, version: int) -> None:
        """Give all servers new weights; each proves on the probe that it has them.

        Requests under way go on with the new weights. Every rank of a sharded module must call
        this.

        Raises:
            WeightSyncError: if a server's log-probs differ; names it.
            EngineServerError: if one is gone and does not come back.
        """
        assert isinstance(module, Kimi)
        was_open = self.is_open.is_set()
        await self.pause()
        try:
            with autocast_of(self.precision, next(module.parameters()).device):
                trained = trainer_logprobs(module, self.probe.prompts)
            label = f"{version}-{self.run_name}"
            sync = self.keeper.prepared(module, label, self.probe, trained)
            self.version = version
            await self.there(sync())
        finally:
            if was_open:
                await self.resume()

    @property
    def run_name(self) -> str:
        """Name the job's weights apart from another job's: all ranks share the secret."""
        return hashlib.sha256(secret().encode()).hexdigest()[:8]

    # The loop

    async def there(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop of the connections, from any other."""
        future: Future[Result] = self.thread.start(work)
        return await asyncio.wrap_future(future)

    def client(self) -> aiohttp.ClientSession:
        """Return the connections, on their loop."""
        if self._client is None:
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._client
