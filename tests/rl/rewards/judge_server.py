"""A judge behind a real HTTP server on 127.0.0.1, which behaves as it is told."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from moonlit.rl.rewards.grm.endpoint import Endpoint

Behaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse] | web.Response]
ANSWERS = re.compile(r"First answer: (.*)\nSecond answer: (.*)\Z")


class Server:
    """Answers the first requests as ``behaviours`` say, one each, and all others by ``judge``."""

    def __init__(self, judge: Callable[[str, str], Any], *behaviours: Behaviour) -> None:
        self.judge, self.behaviours = judge, list(behaviours)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.under_way = self.most_under_way = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            body = await request.json()
            self.requests.append(body)
            self.headers.append(request.headers)
            if self.behaviours:
                answer = self.behaviours.pop(0)(request, body)
                return answer if isinstance(answer, web.Response) else await answer
            return says(json.dumps({"preference": self.judge(*answers_in(body))}))
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[Endpoint]:
        """Serve; lend an endpoint that asks it."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        endpoint = Endpoint(**{**SETTINGS, "base_url": f"http://127.0.0.1:{port}/v1", **changes})
        try:
            yield endpoint
        finally:
            await endpoint.aclose()
            await runner.cleanup()


SETTINGS: dict[str, Any] = {
    "base_url": "http://127.0.0.1:9/v1", "model": "referee", "api_key_env": None,
    "timeout_s": 5.0, "max_concurrent": 8, "requests_per_s": None, "max_tokens": 64,
    "temperature": 0.0, "body": {},
}  # fmt: skip


def answers_in(body: dict[str, Any]) -> tuple[str, str]:
    """What is between the quotes: a judge that reads the question as it was written."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    found = ANSWERS.search(text)
    assert found is not None, text
    return json.loads(found[1]), json.loads(found[2])


def says(content: Any, *, reason: str = "stop", status: int = 200) -> web.Response:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return web.json_response({"choices": [choice]}, status=status)


def replies(content: Any, **more: Any) -> Behaviour:
    return lambda request, body: says(content, **more)


def fails(status: int, **headers: str) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, body: web.Response(status=status, text="out of order", headers=named)


def truncated(request: web.Request, body: dict[str, Any]) -> web.Response:
    return web.Response(text='{"choices": [{"message": {"content": "{\\"pref')
