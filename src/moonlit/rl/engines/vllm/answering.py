"""One request on its way to a vLLM server, or to several: its answer comes in parts.

A part ends where the answer does, where the requests are held, or where the server dies; the next
goes on from the tokens that have come.
"""

import asyncio
import uuid
from typing import Protocol, runtime_checkable

from moonlit.models.shapes import DecoderShape
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.prompt import Prompt
from moonlit.rl.engines.remote import EngineServerError
from moonlit.rl.engines.vllm.fleet import Fleet
from moonlit.rl.engines.vllm.follower import Follower
from moonlit.rl.engines.vllm.server import ServerDownError, VllmServer
from moonlit.rl.engines.vllm.wire import Answer, generate_body

MAX_TRIES = 3
"""How often a request may lose its server without a token in between."""


@runtime_checkable
class Asker(Protocol):
    """What an answer needs of the engine that asks for it."""

    decoder: DecoderShape
    banned_ids: frozenset[int]
    server: VllmServer
    keeper: Fleet | Follower
    version: int
    num_sampled: int
    in_flight: dict[str, asyncio.Future[Answer]]
    """Requests that can be taken back, by name."""


class Answering:
    """A request and what has come of its answer.

    Args:
        engine: whose server answers.
        request: fits the model.
    """

    def __init__(self, engine: Asker, request: Request) -> None:
        self.engine, self.request = engine, request
        self.prompt = Prompt(list(request.input_ids), request.media, engine.decoder.media_pad_id)
        self.banned_ids = engine.banned_ids | request.sampling.banned_ids
        self.completion = Completion()
        self.is_done = False
        self.num_tries = 0

    async def go_on(self) -> None:
        """Get the next part; where the server is lost, wait until it is back.

        Raises:
            ServerDownError: if it is lost again and again.
            ValueError: if the server refuses the request.
            WeightSyncError: if the server holds other weights than the trainer sent.
            EngineServerError: if it does not come back, or answers nonsense.
        """
        keeper, server = self.engine.keeper, self.engine.server
        await keeper.require(server)
        life = server.life
        try:
            answer = await self.part()
        except ServerDownError:
            self.num_tries += 1
            if self.num_tries >= MAX_TRIES:
                raise
            await keeper.recover(server, life)
            return
        if answer.token_ids:
            self.num_tries = 0
        self.take(answer)

    async def part(self) -> Answer:
        """Sample on from what has come."""
        engine, server, label = self.engine, self.engine.server, self.engine.keeper.label
        name = uuid.uuid4().hex
        body = generate_body(
            self.request,
            self.prompt,
            self.completion.token_ids,
            banned_ids=self.banned_ids,
            max_tokens=self.max_tokens(),
            name=name,
            salt=label,
            normalised=not server.normalises,
        )
        asked = asyncio.ensure_future(server.generate(body))
        engine.in_flight[name] = asked
        try:
            answer = await asked
        finally:
            del engine.in_flight[name]
        if strange := {told for told in answer.labels if told is not None} - {label}:
            # Another process under the same address, or one that somebody else gave weights.
            raise ServerDownError(f"{server} samples with weights {sorted(strange)}, not {label}")
        return answer

    def max_tokens(self) -> int:
        """Return how long the answer may become.

        Raises:
            ValueError: if the server has no room for the prompt and one token.
        """
        server = self.engine.server
        room = min(self.engine.decoder.max_positions, server.max_tokens) - len(self.prompt.ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(self.prompt.ids)} tokens: {server} has room for"
                f" {server.max_tokens}, and one is needed for an answer"
            )
        return min(self.request.sampling.max_new_tokens, room)

    def take(self, answer: Answer) -> None:
        """Append what was sampled.

        Raises:
            EngineServerError: if it is not what was asked for.
        """
        completion, sampling, server = self.completion, self.request.sampling, self.engine.server
        if bad := self.banned_ids.intersection(answer.token_ids):
            raise EngineServerError(f"{server} has sampled banned ids: {sorted(bad)}")
        if answer.finish_reason not in ("stop", "length", "abort"):
            raise EngineServerError(f"{server} has ended with {answer.finish_reason!r}")
        is_greedy = sampling.temperature == 0
        is_first = not completion.token_ids
        completion.token_ids += answer.token_ids
        completion.behavior_logprobs += [0.0 if is_greedy else p for p in answer.logprobs]
        if is_greedy or (sampling.temperature, sampling.top_p) == (1, 1):
            completion.untempered_logprobs += answer.logprobs
        completion.policy_versions += [self.engine.version] * len(answer.token_ids)
        self.engine.num_sampled += len(answer.token_ids)
        if is_first:
            completion.num_reused_tokens = answer.num_cached or 0
            completion.num_prefilled_tokens = len(self.prompt.ids) - completion.num_reused_tokens
        if completion.token_ids and completion.token_ids[-1] in sampling.stop_ids:
            self.is_done, completion.stop_reason = True, "stop"
        elif len(completion.token_ids) >= self.max_tokens():
            is_whole = len(completion.token_ids) >= sampling.max_new_tokens
            self.is_done, completion.stop_reason = True, "length" if is_whole else "context"
        elif answer.finish_reason != "abort":
            raise EngineServerError(
                f"{server} has ended with {answer.finish_reason!r} after"
                f" {len(completion.token_ids)} of {self.max_tokens()} tokens"
            )
