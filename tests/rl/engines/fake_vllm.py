"""A server that speaks vLLM's routes around a tiny model of ours, and misbehaves on demand."""

import asyncio
import base64
import json
import socket
import struct
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp import web
from safetensors.torch import load, load_file

from moonlit.batch import PackedMedia
from moonlit.hub.shards import INDEX_FILE
from moonlit.rl.engines.prompt import Prompt
from moonlit.rl.engines.sync import trainer_logprobs
from moonlit.rl.engines.vllm.server import GENERATE, UPDATE
from moonlit.rl.engines.vllm.weights import layout_of
from moonlit.rl.loop_thread import LoopThread
from tests.models.shapes import MEDIA_PAD_ID, packed, tiny_model

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


class FakeVllm:
    """One server; its faults are its public attributes."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.label = "default"
        self.max_model_len = 128
        self.s_per_token = 0.0
        self.errors_to_come = 0
        self.dies_after_tokens: int | None = None
        self.is_stale = False
        self.cannot_fetch = False
        self.told_label: str | None = None
        self.tells_raw_logprobs = False
        self.ends_with: str | None = None
        self.samples_id: int | None = None
        self.without: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.aborted: set[str] = set()
        self.runner: web.AppRunner | None = None
        self.forget()

    def forget(self) -> None:
        """Have the weights of a server that has just been started."""
        self.label = "default"
        self.model = tiny_model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.5)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def handlers(self) -> dict[str, tuple[str, Any]]:
        async def nothing(request: web.Request) -> web.Response:
            return web.json_response({})

        return {
            GENERATE: ("POST", self.generate),
            "/health": ("GET", nothing),
            "/v1/models": ("GET", self.models),
            "/inference/v1/abort_requests": ("POST", self.abort),
            "/weight_info": ("GET", self.weight_info),
            "/collective_rpc": ("POST", self.collective_rpc),
            "/pause": ("POST", nothing),
            "/resume": ("POST", nothing),
            UPDATE[0]: ("POST", nothing),
            UPDATE[1]: ("POST", nothing),
            UPDATE[2]: ("POST", self.update_weights),
            UPDATE[3]: ("POST", self.finish_weight_update),
        }

    def application(self) -> web.Application:
        @web.middleware
        async def note(request: web.Request, handler: Any) -> Any:
            self.calls.append(request.path)
            return await handler(request)

        application = web.Application(middlewares=[note])
        handlers = {k: v for k, v in self.handlers().items() if k not in self.without}

        async def openapi(request: web.Request) -> web.Response:
            return web.json_response({"paths": {route: {} for route in handlers}})

        application.router.add_route("GET", "/openapi.json", openapi)
        for path, (method, handler) in handlers.items():
            application.router.add_route(method, path, handler)
        return application

    async def start(self) -> None:
        self.runner = web.AppRunner(
            self.application(), handler_cancellation=True, shutdown_timeout=0.1
        )
        await self.runner.setup()
        await web.TCPSite(self.runner, HOST, self.port).start()

    async def die(self) -> None:
        """Cut every connection and listen no more; what was loaded is gone."""
        assert self.runner is not None
        assert self.runner.server is not None
        for connection in list(self.runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        runner, self.runner = self.runner, None
        await runner.cleanup()
        self.forget()

    # Routes

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": self.max_model_len}]})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted |= set((await request.json())["request_ids"])
        return web.json_response({})

    async def weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def update_weights(self, request: web.Request) -> web.Response:
        where = (await request.json())["update_info"]
        if self.cannot_fetch:
            return web.json_response({"error": {"message": "no route to trainer"}}, status=500)
        tensors: dict[str, torch.Tensor] = {}
        async with aiohttp.ClientSession(headers=where["headers"]) as client:
            for url in where["urls"]:
                async with client.get(url) as answer:
                    assert answer.status == 200, await answer.text()
                    tensors |= load(await answer.read())
        self.take(tensors)
        return web.json_response({})

    async def finish_weight_update(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["weight_version"]
        return web.json_response({})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "loaded_label":
            return web.json_response({"results": [self.label]})
        folder, label = body["args"]
        index = json.loads((Path(folder) / INDEX_FILE).read_text())
        tensors: dict[str, torch.Tensor] = {}
        for file in set(index["weight_map"].values()):
            tensors |= load_file(Path(folder) / file)
        self.take(tensors)
        self.label = label
        return web.json_response({"results": [None]})

    @torch.no_grad()
    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.is_stale:
            return
        own = self.model.state_dict()
        layout = layout_of(self.model)
        assert {tensor.name for tensor in layout} == set(tensors)
        for tensor in layout:
            tensor.view_in(own[tensor.parameter]).copy_(tensors[tensor.name])

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.errors_to_come > 0 and "prompt_logprobs" not in body["sampling_params"]:
            self.errors_to_come -= 1
            return web.json_response({"error": {"message": "the engine is dead"}}, status=500)
        wanted = body["sampling_params"]
        ids, media = body["token_ids"], read_features(body.get("features"))
        if len(ids) + 1 > self.max_model_len:
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)
        answer: dict[str, Any] = {"prompt_logprobs": None}
        if "prompt_logprobs" in wanted:
            (scores,) = trainer_logprobs(self.model, [Prompt(ids, media, MEDIA_PAD_ID)])
            answer["prompt_logprobs"] = [
                None,
                *(
                    {str(token_id): {"logprob": logprob}}
                    for token_id, logprob in zip(ids[1:], scores.tolist(), strict=True)
                ),
            ]
        tokens, logprobs, reason = await self.sampled(body, media)
        told = self.told_label or self.label
        answer["choices"] = [
            {
                "token_ids": tokens,
                "finish_reason": self.ends_with or reason,
                "logprobs": {
                    "content": [
                        {"token_id": token, "logprob": logprob}
                        for token, logprob in zip(tokens, logprobs, strict=True)
                    ]
                },
                "weight_versions": [{"version": told, "start": 0, "end": len(tokens)}],
            }
        ]
        answer["usage"] = {"prompt_tokens_details": {"cached_tokens": 2}}
        return web.json_response(answer)

    async def sampled(
        self, body: dict[str, Any], media: PackedMedia | None
    ) -> tuple[list[int], list[float], str]:
        wanted = body["sampling_params"]
        if self.samples_id is not None:
            return [self.samples_id], [-1.0], "length"
        name = f"generate-tokens-{body.get('request_id')}"
        generator = torch.Generator().manual_seed(wanted.get("seed", 0) % 2**63)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < wanted["max_tokens"]:
            await asyncio.sleep(self.s_per_token)
            if name in self.aborted:
                return tokens, logprobs, "abort"
            if self.dies_after_tokens is not None and len(tokens) >= self.dies_after_tokens:
                self.dies_after_tokens = None
                dying = asyncio.get_running_loop().create_task(self.die())
                await asyncio.shield(dying)
            token, logprob = self.one([*body["token_ids"], *tokens], media, wanted, generator)
            tokens.append(token)
            logprobs.append(logprob)
            if token in wanted.get("stop_token_ids", ()):
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"

    @torch.no_grad()
    def one(
        self,
        ids: list[int],
        media: PackedMedia | None,
        wanted: dict[str, Any],
        generator: torch.Generator,
    ) -> tuple[int, float]:
        features = None if media is None else self.model.encode_media(media)
        hidden = self.model.eval()(**packed([torch.tensor(ids)]), features=features).hidden_TD
        raw = self.model.logits(hidden[-1:])[0].float()
        temperature = wanted.get("temperature", 1.0)
        logits = raw / (temperature or 1.0)
        for token, bias in wanted.get("logit_bias", {}).items():
            logits[int(token)] += bias
        if allowed := wanted.get("allowed_token_ids"):
            rest = torch.ones(len(logits), dtype=torch.bool)
            rest[allowed] = False
            logits = logits.masked_fill(rest, -torch.inf)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        told = raw if self.tells_raw_logprobs else logits
        return token, float(told.log_softmax(-1)[token])


def read_features(features: dict[str, Any] | None) -> PackedMedia | None:
    """What vLLM would hand to the encoder."""
    if features is None:
        return None
    items = [
        read_msgpack(memoryview(base64.b64decode(item)))[0]
        for item in features["kwargs_data"]["vision_chunk"]
    ]
    pixels, grids = [], []
    for item in items:
        dtype, shape, data = item["pixel_values"]["data"]
        assert dtype == "uint8"
        pixels.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape))
        dtype, shape, data = item["grid_thws"]["data"]
        assert dtype == "int64"
        grids.append(torch.frombuffer(bytearray(data), dtype=torch.int64).reshape(shape))
    return PackedMedia(pixel_values=torch.cat(pixels), grid_thw=torch.stack(grids))


def read_msgpack(data: memoryview) -> tuple[Any, memoryview]:
    """Return the first value, and what comes behind it. Source: the MessagePack specification."""
    kind, data = data[0], data[1:]
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], data
    if kind == 0xD3:
        return struct.unpack(">q", data[:8])[0], data[8:]
    (size,) = struct.unpack(">I", data[:4])
    data = data[4:]
    if kind == 0xDB:
        return bytes(data[:size]).decode(), data[size:]
    if kind == 0xC9:
        assert data[0] == 3
        return bytes(data[1 : size + 1]), data[size + 1 :]
    values: list[Any] = []
    for _ in range(size if kind == 0xDD else 2 * size):
        value, data = read_msgpack(data)
        values.append(value)
    if kind == 0xDD:
        return values, data
    assert kind == 0xDF, hex(kind)
    return dict(zip(values[::2], values[1::2], strict=True)), data


class RunningFake:
    """A fake on a thread of its own."""

    def __init__(self, **faults: Any) -> None:
        self.fake = FakeVllm()
        for name, value in faults.items():
            setattr(self.fake, name, value)
        self.loop = LoopThread("fake vLLM")
        self.loop.run(self.fake.start())

    def restart(self) -> None:
        self.loop.run(self.fake.start())

    def die(self) -> None:
        self.loop.run(self.fake.die())

    def stop(self) -> None:
        if self.fake.runner is not None:
            self.loop.run(self.fake.runner.cleanup())
        self.loop.close()
