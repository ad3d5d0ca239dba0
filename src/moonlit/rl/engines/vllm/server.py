"""One vLLM server: what it can do, asked at the start; its requests, and its weights."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
import torch
from torch import Tensor

from moonlit.rl.engines.prompt import Prompt
from moonlit.rl.engines.remote import EngineServerError
from moonlit.rl.engines.sync import Probe
from moonlit.rl.engines.vllm.wire import (
    Answer,
    WireError,
    read_answer,
    read_scores,
    scoring_body,
)

GENERATE, HEALTH, MODELS, ROUTES = (
    "/inference/v1/generate",
    "/health",
    "/v1/models",
    "/openapi.json",
)
ABORT = ("/inference/v1/abort_requests", "/abort_requests")
UPDATE = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)
"""vLLM's update interface, in the order of a sync."""
CALL_WORKERS, LABEL, PAUSE, RESUME = "/collective_rpc", "/weight_info", "/pause", "/resume"
SHORT_S = 30.0
"""How long a server may take to say that it lives."""


class ServerDownError(EngineServerError):
    """A vLLM server does not answer, or its engine has died; the message names it."""


class VllmServer:
    """A client of one server.

    Args:
        url: ``http://host:port``.
        client: gives the connections, on the event loop that calls.
        request_timeout_s: how long an answer may take [s].
        normalises: whether it takes raw pixels, as vLLM does by default.
    """

    def __init__(
        self,
        url: str,
        client: Callable[[], aiohttp.ClientSession],
        *,
        request_timeout_s: float,
        normalises: bool,
    ) -> None:
        self.url, self.client = url, client
        self.request_timeout_s, self.normalises = request_timeout_s, normalises
        self.routes: frozenset[str] = frozenset()
        self.max_tokens = 0
        """Of prompt and answer together."""
        self.known_label: str | None = None
        """Of its weights, when they were last looked at."""
        self.life = 0
        """Grows each time it is brought up: who lost it earlier need not bring it up again."""

    # What it can do

    async def ask_what_it_can(self) -> None:
        """Ask for its routes, its longest sequence and the kind of its log-probs.

        Raises:
            ValueError: if it lacks what sampling needs; says how to start it.
        """
        listed = await self.call("GET", ROUTES, timeout_s=SHORT_S)
        self.routes = frozenset(listed["paths"])
        if GENERATE not in self.routes:
            raise ValueError(f"{self} has no {GENERATE}: start it with --enable-scale-out")
        if not any(route in self.routes for route in ABORT):
            raise ValueError(f"{self} has none of {', '.join(ABORT)}: its vLLM is too old")
        models = await self.call("GET", MODELS, timeout_s=SHORT_S)
        self.max_tokens = int(models["data"][0]["max_model_len"])
        if not self.takes_updates and CALL_WORKERS not in self.routes:
            raise ValueError(
                f"{self} has neither {', '.join(UPDATE)} nor {CALL_WORKERS}: start it with"
                " VLLM_SERVER_DEV_MODE=1 and the worker extension"
            )
        await self.require_processed_logprobs()

    @property
    def takes_updates(self) -> bool:
        """Whether it has vLLM's update interface."""
        return self.routes.issuperset(UPDATE)

    async def require_processed_logprobs(self) -> None:
        """Sample where one token only is allowed: its log-prob is 0, or it is not the sampler's."""
        body = {
            "token_ids": [0],
            "sampling_params": {"max_tokens": 1, "logprobs": 0, "allowed_token_ids": [1]},
        }
        answer = await self.generate(body)
        if answer.token_ids != [1] or abs(answer.logprobs[0]) > 1e-3:
            raise ValueError(
                f"{self} tells log-probs of another distribution than it samples from: start it"
                " with --logprobs-mode processed_logprobs"
            )

    # Requests

    async def generate(self, body: Mapping[str, Any]) -> Answer:
        """Sample.

        Raises:
            ServerDownError: if it is down, or goes down.
            ValueError: if it refuses the request; names what it says.
            EngineServerError: if its answer cannot be read.
        """
        value = await self.call("POST", GENERATE, body, timeout_s=self.request_timeout_s)
        try:
            return read_answer(value)
        except WireError as error:
            raise EngineServerError(f"{self}: {error}") from error

    async def abort(self, names: Sequence[str]) -> None:
        """Let requests come back with what they have; names it does not know are no error."""
        route = next(route for route in ABORT if route in self.routes)
        # The name that generate gives a request inside.
        known = [f"generate-tokens-{name}" for name in names]
        await self.call("POST", route, {"request_ids": known}, timeout_s=SHORT_S)

    async def is_up(self) -> bool:
        """Whether it lives."""
        try:
            await self.call("GET", HEALTH, timeout_s=SHORT_S)
        except ServerDownError:
            return False
        return True

    async def label(self) -> str | None:
        """Return its own name of its weights; None: it has none of ours."""
        if LABEL in self.routes:
            told = await self.call("GET", LABEL, timeout_s=SHORT_S)
            return told.get("weight_version")
        told = await self.call_workers("loaded_label")
        return told[0] if told and len(set(told)) == 1 else None

    # Weights

    async def load(self, urls: Sequence[str], headers: Mapping[str, str], label: str) -> None:
        """Let its workers fetch new weights through vLLM's update interface.

        Args:
            urls: of the parts.
            headers: to be sent with each.
            label: names the weights from here on.
        """
        where = {"urls": list(urls), "headers": dict(headers)}
        bodies = (
            {"init_info": {}},
            {},
            {"update_info": where},
            {"weight_version": label},
        )
        async with Held(self):
            for route, body in zip(UPDATE, bodies, strict=True):
                await self.call("POST", route, body, timeout_s=self.request_timeout_s)

    async def reload(self, folder: str, label: str) -> None:
        """Let its workers read new weights from a folder in the released layout."""
        async with Held(self):
            await self.call_workers("reload_released", folder, label)
            if "/update_weight_version" in self.routes:
                body = {"new_version": label}
                await self.call("POST", "/update_weight_version", body, timeout_s=SHORT_S)

    async def call_workers(self, method: str, *arguments: str) -> list[Any]:
        """Call what the worker extension adds, on all workers."""
        body = {"method": method, "args": list(arguments)}
        told = await self.call("POST", CALL_WORKERS, body, timeout_s=self.request_timeout_s)
        return (told or {}).get("results", [])

    async def gap(self, probe: Probe, trained: Sequence[Tensor], salt: str) -> float:
        """Return the largest difference of the probe's log-probs from the trainer's [nats]."""
        gaps = [
            (torch.tensor(await self.score(prompt, salt)) - row.float().cpu()).abs()
            for prompt, row in zip(probe.prompts, trained, strict=True)
        ]
        return float(torch.cat(gaps).nan_to_num(nan=torch.inf).max())

    async def score(self, prompt: Prompt, salt: str) -> list[float]:
        """Return the log-prob of each token behind the first."""
        body = scoring_body(
            prompt, name=f"probe-{uuid.uuid4().hex}", salt=salt, normalised=not self.normalises
        )
        value = await self.call("POST", GENERATE, body, timeout_s=self.request_timeout_s)
        try:
            return read_scores(value, prompt.ids)
        except WireError as error:
            raise EngineServerError(f"{self}: {error}") from error

    # HTTP

    async def call(
        self, method: str, route: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """Call a route; what it refuses is raised here."""
        limit = aiohttp.ClientTimeout(total=timeout_s, sock_connect=SHORT_S)
        try:
            async with self.client().request(
                method, self.url + route, json=body, timeout=limit
            ) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ServerDownError(f"{self} {route}: {error or type(error).__name__}") from error
        if answer.status >= 500:
            raise ServerDownError(f"{self} {route}: {answer.status} {text[:500]}")
        if answer.status >= 400:
            raise ValueError(f"{self} {route} refuses: {answer.status} {text[:500]}")
        try:
            return json.loads(text) if text else None
        except json.JSONDecodeError as error:
            raise EngineServerError(f"{self} {route}: no JSON: {text[:200]!r}") from error

    def __str__(self) -> str:
        return f"vLLM server {self.url}"


class Held:
    """A time in which a server samples nothing, for whoever asks it."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server

    async def __aenter__(self) -> None:
        if PAUSE in self.server.routes:
            route = f"{PAUSE}?mode=keep"
            await self.server.call("POST", route, timeout_s=self.server.request_timeout_s)

    async def __aexit__(self, *_: object) -> None:
        if RESUME in self.server.routes:
            await self.server.call("POST", RESUME, timeout_s=SHORT_S)
