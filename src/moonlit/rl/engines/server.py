"""An engine behind HTTP: ``moonlit serve``. Trainers on other machines sample from it.

It starts with random weights and refuses to sample until a trainer has sent its own.
"""

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from aiohttp import web
from safetensors.torch import load
from torch import Tensor

from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.engines.sync import WeightSyncError
from moonlit.rl.engines.wire import (
    MAX_PART_BYTES,
    SECRET_HEADER,
    completion_as_json,
    read_logprobs,
    read_request,
)

REFUSED = (ValueError, WeightSyncError, FloatingPointError)
"""What a request may be refused with: the message goes back to the trainer."""

ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""SLURM's srun hands the second one on; at the first it kills."""


class EngineServer:
    """Serves one native engine.

    Args:
        engine: whose weights trainers replace.
        secret: that every call must bear.
    """

    def __init__(self, engine: NativeEngine, *, secret: str) -> None:
        self.engine, self.secret = engine, secret
        engine.sync_error = WeightSyncError("no trainer has sent its weights yet")
        self.arrived: dict[str, Tensor] = {}
        self.sessions: dict[str, ExitStack] = {}
        self.session_of: dict[str, Any] = {}
        self.trainers: set[str] = set()
        self.held_by: set[str] = set()

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application(
            client_max_size=2 * MAX_PART_BYTES, middlewares=[self.answer_errors]
        )
        application.add_routes(
            [
                web.get("/health", self.health),
                web.post("/generate", self.generate),
                web.delete("/sessions/{name}", self.end_session),
                web.post("/pause", self.pause),
                web.post("/resume", self.resume),
                web.put("/weights", self.take_part),
                web.post("/weights/{version}", self.take_weights),
            ]
        )
        return application

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Callable[..., Any]) -> Any:
        """Refuse strangers; send back what a request is refused with."""
        if request.headers.get(SECRET_HEADER) != self.secret:
            return web.json_response({"error": "not of this job: wrong secret"}, status=403)
        try:
            return await handler(request)
        except REFUSED as error:
            kind = type(error).__name__
            return web.json_response({"error": str(error), "kind": kind}, status=422)

    async def health(self, request: web.Request) -> web.Response:
        """Say which weights sample here."""
        return web.json_response({"version": self.engine.version})

    async def generate(self, request: web.Request) -> web.Response:
        """Continue one prompt; a trainer that hangs up cancels it."""
        value = await request.json()
        completion = await self.engine.generate(
            read_request(value, self.session_for(value["session"]))
        )
        return web.json_response(completion_as_json(completion))

    def session_for(self, name: str | None) -> Any:
        """Return the session of a name, a new one for a new name."""
        if name is None:
            return None
        if name not in self.sessions:
            self.sessions[name] = ExitStack()
            self.session_of[name] = self.sessions[name].enter_context(self.engine.session())
        return self.session_of[name]

    async def end_session(self, request: web.Request) -> web.Response:
        """Forget a dialogue's latents."""
        name = request.match_info["name"]
        if name in self.sessions:
            del self.session_of[name]
            self.sessions.pop(name).close()
        return web.json_response({})

    async def pause(self, request: web.Request) -> web.Response:
        """Hold all requests once every trainer that uses this server has asked for it."""
        self.held_by.add(request.query["trainer"])
        if self.held_by >= self.trainers:
            await self.engine.pause()
        return web.json_response({})

    async def resume(self, request: web.Request) -> web.Response:
        """Go on as soon as one trainer asks for it."""
        self.trainers.add(request.query["trainer"])
        self.held_by.discard(request.query["trainer"])
        await self.engine.resume()
        return web.json_response({})

    async def take_part(self, request: web.Request) -> web.Response:
        """Keep some of the next weights."""
        self.arrived |= load(await request.read())
        return web.json_response({})

    async def take_weights(self, request: web.Request) -> web.Response:
        """Sample with the weights that have arrived, if the probe agrees with the trainer's."""
        trained = read_logprobs(await request.text())
        weights, self.arrived = self.arrived, {}
        await self.engine.take_weights(
            lambda: weights, int(request.match_info["version"]), trained=lambda: trained
        )
        return web.json_response({"version": self.engine.version})


async def serve(engine: NativeEngine, *, host: str, port: int, secret: str) -> None:
    """Serve until cancelled, or until the process is sent one of ``ENDING``."""
    server = EngineServer(engine, secret=secret)
    runner = web.AppRunner(server.application(), handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        print(json.dumps({"serving": f"{host}:{port}"}), flush=True)
        ended = asyncio.Event()
        for number in ENDING:
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await ended.wait()
    finally:
        await runner.cleanup()
        engine.close()
