"""The engine in this process: an asyncio surface over a continuous batch on a thread of its own.

The thread is the only one that touches the model and the cache; coroutines talk to it through an
inbox that it reads between steps. So tools can run while tokens are sampled.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moonlit.chat.special_tokens import SpecialTokens
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.continuous_batch import ContinuousBatch
from moonlit.rl.engines.generation import Generation
from moonlit.rl.engines.prompt import Session, require_fit
from moonlit.rl.engines.runner import Runner
from moonlit.rl.engines.sync import (
    Probe,
    WeightSyncError,
    copy_weights,
    logprob_gap,
    trainer_logprobs,
)

MAX_LOGPROB_GAP, MAX_LOGPROB_GAP_16 = 0.02, 0.2


class NativeEngine:
    """Samples from a model of its own, whose weights follow a trainer's.

    Args:
        model: belongs to the engine from now on; put into evaluation mode.
        version: of its weights.
        max_sequences: that run at the same time; further requests wait (our default).
        max_prefill_tokens: of prompts computed in one row; bounds the memory of a step.
        max_cache_tokens: room of the latent cache; None: it grows as needed.
        max_logprob_gap: largest difference between trainer and engine that a sync may leave on the
            probe [nats]; None: 0.02, or 0.2 where products are in 16 bits. Float32 leaves less than
            1e-4, bf16 some hundredths, stale weights far more (our defaults).
        precision: the trainer's, by Lightning's name: both mean the same distribution.
    """

    def __init__(
        self,
        model: Kimi,
        *,
        version: int = 0,
        max_sequences: int = 128,
        max_prefill_tokens: int = 4096,
        max_cache_tokens: int | None = None,
        max_logprob_gap: float | None = None,
        precision: str = "32-true",
    ) -> None:
        self.model, self.shape = model, model.decoder_shape
        self.max_cache_tokens = max_cache_tokens
        self.runner = Runner(model, max_cache_tokens=max_cache_tokens, precision=precision)
        if max_logprob_gap is None:
            in_16_bits = model.language_model.lm_head.weight.itemsize == 2
            max_logprob_gap = MAX_LOGPROB_GAP_16 if in_16_bits else MAX_LOGPROB_GAP
        self.max_logprob_gap = max_logprob_gap
        self.batch = ContinuousBatch(
            self.runner,
            always_banned=media_ids(self.shape.media_pad_id),
            max_sequences=max_sequences,
            max_prefill_tokens=max_prefill_tokens,
            version=version,
        )
        self.probe = Probe.for_model(model)
        self.sync_error: WeightSyncError | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._waiters: dict[Generation, asyncio.Future[Completion]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._is_held = False

    @classmethod
    def copy_of(cls, module: Kimi, **settings: object) -> "NativeEngine":
        """Return an engine with a full copy of a trainer's weights, sharded or not."""
        weight = module.language_model.lm_head.weight
        dtype = weight.dtype if weight.itemsize == 2 else torch.float32
        with torch.device(weight.device):
            model = Kimi(decoder=module.decoder_shape, vision=module.vision_shape).to(dtype)
        copy_weights(module.state_dict(), model)
        return cls(model, **settings)  # pyright: ignore[reportArgumentType]

    @property
    def version(self) -> int:
        """Of the weights that sample now."""
        return self.batch.version

    async def generate(self, request: Request) -> Completion:
        """Continue one prompt.

        Cancelling the call frees what the request holds.

        Raises:
            ValueError: if the request cannot be served; names what is wrong.
            FloatingPointError: if its logits are not finite.
            WeightSyncError: if the last sync failed: its weights must not be sampled from.
        """
        if self.sync_error is not None:
            raise self.sync_error
        require_fit(
            request,
            self.shape,
            self.model.vision_shape,
            max_tokens=self.max_cache_tokens,
            always_banned=self.batch.always_banned,
        )
        generation = Generation(request, self.shape.max_positions, self.shape.media_pad_id)
        with busy(request.session):
            future = self._waiters[generation] = asyncio.get_running_loop().create_future()
            self._tell(lambda: self.batch.enqueue(generation))
            try:
                return await future
            finally:
                if self._waiters.pop(generation, None) is not None:  # cancelled
                    self._tell(lambda: self.batch.cancel(generation))

    async def update_weights(self, module: nn.Module, version: int) -> None:
        """Take over a trainer's weights and prove it on the probe.

        Running requests go on with the new weights: their latents are computed again, and each
        token carries the version that sampled it. Every rank of a sharded module must call this.

        Raises:
            WeightSyncError: if the probe's log-probs differ by more than ``max_logprob_gap``. The
                engine then refuses to sample until a sync succeeds.
            ValueError: if the module is not this model's twin.
        """
        await self.take_weights(
            module.state_dict, version, trained=lambda: trainer_logprobs(module, self.probe.prompts)
        )

    async def take_weights(
        self,
        weights: Callable[[], Mapping[str, Tensor]],
        version: int,
        *,
        trained: Callable[[], Sequence[Tensor]],
    ) -> None:
        """Take over weights by name; as ``update_weights``, from wherever they come.

        Args:
            weights: gives them, on the engine's thread.
            version: stamps the tokens from here on.
            trained: gives the trainer's log-probs of the probe, on the engine's thread.
        """
        done = asyncio.get_running_loop().create_future()
        loop = done.get_loop()

        def sync() -> None:
            try:
                self._sync(weights(), version, trained)
            except Exception as error:
                loop.call_soon_threadsafe(settle, done, None, error)
            else:
                loop.call_soon_threadsafe(settle, done, None, None)

        self._tell(sync)
        await done

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Keep the latents of a dialogue between its requests (``Request.session``)."""
        session = Session()
        try:
            yield session
        finally:
            session.is_closed = True
            self._inbox.append(lambda: self.batch.forget(session))
            self._thread.submit(self._read_inbox)  # the driver may end with its loop before

    @property
    def num_sampled_tokens(self) -> int:
        """Of all requests, those under way too."""
        return self.batch.num_sampled_tokens

    async def pause(self) -> None:
        """Hold all requests; their latents stay until the weights change."""
        self._is_held = True  # ends the thread's turn after the step under way
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)

    async def resume(self) -> None:
        """Go on with the requests that were held."""
        self._is_held = False
        self._tell(lambda: None)

    def close(self) -> None:
        """End the thread; the engine serves no more."""
        self._thread.shutdown(wait=True)

    def _sync(
        self,
        weights: Mapping[str, Tensor],
        version: int,
        trained: Callable[[], Sequence[Tensor]],
    ) -> None:
        copy_weights(weights, self.model)  # refuses before it changes anything
        self.batch.change_weights(version)
        with self.runner.autocast():
            trained_logprobs = trained()
        gap = logprob_gap(self.runner, trained_logprobs, self.probe)
        self.sync_error = None
        if not gap <= self.max_logprob_gap:
            self.sync_error = WeightSyncError(
                f"after the sync to version {version} the probe's log-probs differ by {gap:.3g}"
                f" between trainer and engine: at most {self.max_logprob_gap} is allowed"
            )
            raise self.sync_error

    def _tell(self, message: Callable[[], None]) -> None:
        """Leave a message for the thread, and see that it reads it."""
        self._inbox.append(message)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    async def _drive(self) -> None:
        """Run the thread while there is something to do, and hand out what it finishes."""
        loop = asyncio.get_running_loop()
        try:
            while self._inbox or (self.batch.has_work and not self._is_held):
                for generation in await loop.run_in_executor(self._thread, self._work):
                    if (future := self._waiters.pop(generation, None)) is not None:
                        settle(future, generation.completion, generation.error)
        except Exception as error:  # a fault of ours: nobody may wait for ever
            while self._waiters:
                settle(self._waiters.popitem()[1], None, error)
            raise

    def _work(self) -> list[Generation]:
        """Step until something ends or a message comes."""
        self._read_inbox()
        finished: list[Generation] = []
        while self.batch.has_work and not (finished or self._inbox or self._is_held):
            finished = self.batch.step()
        return finished

    def _read_inbox(self) -> None:
        while self._inbox:
            try:
                self._inbox[0]()
            finally:
                # Once it is done: the driver, which looks at any time, sees it or the work it left.
                self._inbox.popleft()


def media_ids(media_pad_id: int) -> frozenset[int]:
    """Ids that promise visual features: none may be sampled, for none would follow."""
    num_base_ranks = media_pad_id - SpecialTokens(0).media_pad_id
    return frozenset(i for i in SpecialTokens(num_base_ranks).media_ids if i >= 0)


@contextmanager
def busy(session: Session | None) -> Iterator[None]:
    """Hold a session for one request.

    Raises:
        ValueError: if another request of the same session is under way, or it is closed.
    """
    if session is None:
        yield
        return
    if session.is_busy or session.is_closed:
        state = "closed" if session.is_closed else "in use by another request"
        raise ValueError(f"the request's session is {state}")
    session.is_busy = True
    try:
        yield
    finally:
        session.is_busy = False


def settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Give a future its outcome, unless nobody waits any more."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
