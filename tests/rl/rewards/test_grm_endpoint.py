"""The generative judge over HTTP: a server that misbehaves, refuses, or sets limits."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from moonlit.chat.messages import Message
from moonlit.rl.rewards.grm.comparison import comparison
from moonlit.rl.rewards.grm.endpoint import Endpoint
from moonlit.rl.rewards.grm.retries import Retries, TransientError
from tests.rl.rewards.judge_server import (
    SETTINGS,
    Server,
    fails,
    replies,
    says,
    truncated,
)
from tests.rl.rewards.judging import by_quality, judged, rollout, task

# A server that misbehaves


async def slow(request: web.Request, body: dict[str, Any]) -> web.Response:
    await asyncio.sleep(2)
    return says('{"preference": 10}')


async def dripping(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(20):
        await response.write(b" ")
        await asyncio.sleep(0.1)
    return response


async def hangs_up(request: web.Request, body: dict[str, Any]) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def endless(request: web.Request, body: dict[str, Any]) -> web.Response:
    return web.Response(body=b"[" * (2 << 20))


MISBEHAVIOUR = {
    "slow": slow,
    "dripping": dripping,
    "hangs up": hangs_up,
    "endless": endless,
    "500": fails(500),
    "503": fails(503),
    "429": fails(429, Retry_After="0"),
    "truncated JSON": truncated,
    "HTML": lambda request, body: web.Response(text="<html>", content_type="text/html"),
    "no choices": lambda request, body: web.json_response({"choices": []}),
    "a list": lambda request, body: web.json_response([1]),
    "no content": replies(None),
    "cut verdict": replies('{"preference": 1', reason="length"),
    "words": replies("The first answer is better."),
    "JSON in words": replies('Here: {"preference": 10}'),
    "99": replies('{"preference": 99}'),
    "-1": replies('{"preference": -1}'),
    "7.5": replies('{"preference": 7.5}'),
    "text": replies('{"preference": "10"}'),
    "true": replies('{"preference": true}'),
    "NaN": replies('{"preference": NaN}'),
    "two fields": replies('{"preference": 10, "reason": "good"}'),
    "twice": replies('{"preference": 0, "preference": 10}'),
    "another field": replies('{"score": 10}'),
    "deep": replies("[" * 100_000),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_one_bad_reply_is_asked_again(name: str):
    server = Server(by_quality, MISBEHAVIOUR[name])
    some = [rollout("good"), rollout("poor")]
    judged(server, *some, endpoint={"timeout_s": 0.3})
    assert [one.metrics["grm"] for one in some] == [0.9, pytest.approx(0.1)]
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", ["500", "truncated JSON", "99", "hangs up"])
def test_what_stays_bad_is_an_error_and_no_zero(name: str):
    server = Server(by_quality, *[MISBEHAVIOUR[name]] * 3)
    some = [rollout("good", 1.0), rollout("poor"), rollout("")]
    judged(server, *some)
    for lost in some[:2]:
        assert lost.error is not None
        assert "after 3 attempts" in lost.error
        assert "grm" not in lost.rewards
        assert lost.bonus == 0
    assert some[2].error is None


def test_only_the_answers_of_a_failed_meeting_are_lost():
    def lies_about_two(first: str, second: str) -> Any:
        return "?" if {first, second} == {"poor", "fair"} else by_quality(first, second)

    some = [rollout(name) for name in ("good", "fair", "poor")]
    judged(Server(lies_about_two), *some)
    assert [one.error is None for one in some] == [True, False, False]
    assert some[0].metrics["grm"] > 0.5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_is_not_asked_again(status: int):
    server = Server(by_quality, *[fails(status, Location="/elsewhere")] * 2)
    some = [rollout("good"), rollout("poor")]
    judged(server, *some)
    assert len(server.requests) == 1
    assert f"status {status}" in str(some[0].error)


def test_the_wait_that_is_asked_for_is_kept_within_bounds():
    retries = Retries(max_attempts=5, backoff_s=1.0, max_backoff_s=8.0)
    assert retries.wait_s(0, 3.0) == 3.0
    assert retries.wait_s(0, 3600.0) == 8.0
    assert all(2 <= retries.wait_s(2, None) <= 4 for _ in range(20))
    assert retries.wait_s(30, None) == 8.0


def test_another_try_is_another_draw_and_the_servers_wait_is_read():
    server = Server(by_quality, *[replies("?")] * 2)
    judged(server, rollout("good"), rollout("poor"))
    assert [body["seed"] for body in server.requests] == [0, 1, 2, 0]

    async def refused(**headers: str) -> float | None:
        async with Server(by_quality, fails(429, **headers)).running() as model:
            with pytest.raises(TransientError) as caught:
                await model.ask([Message(role="user", content="?")], seed=0)
        return caught.value.retry_after_s

    assert asyncio.run(refused(Retry_After="7")) == 7.0
    assert asyncio.run(refused(Retry_After="Fri, 31 Dec 1999 23:59:59 GMT")) is None


def test_a_request_says_what_the_settings_say():
    server = Server(by_quality)
    settings = {"max_tokens": 9, "temperature": 0.5, "body": {"response_format": "json"}}
    judged(server, rollout("good"), rollout("poor"), endpoint=settings)
    wanted = {"model": "referee", "max_tokens": 9, "temperature": 0.5, "response_format": "json"}
    assert wanted.items() <= server.requests[0].items()


def test_requests_keep_to_their_limits():
    async def waits(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.02)
        return says('{"preference": 5}')

    server = Server(by_quality, *[waits] * 16)
    judged(server, *(rollout(f"{n}") for n in range(8)), endpoint={"max_concurrent": 2})
    assert server.most_under_way == 2
    assert len(server.requests) == 16


def test_requests_begin_no_faster_than_allowed():
    async def run() -> float:
        server = Server(by_quality)
        async with server.running(requests_per_s=20.0) as model:
            loop = asyncio.get_running_loop()
            began = loop.time()
            question = comparison(task(), "Be good.", "good", "poor")
            await asyncio.gather(*(model.ask(question, seed=n) for n in range(5)))
            return loop.time() - began

    assert asyncio.run(run()) >= 4 / 20


# Keys


def test_an_endpoint_without_a_key_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REFEREE_KEY", raising=False)
    told = "127.0.0.1:9/v1 has no key: the environment variable REFEREE_KEY is not set"
    with pytest.raises(ValueError, match=told):
        Endpoint(**SETTINGS | {"api_key_env": "REFEREE_KEY"})
    monkeypatch.setenv("REFEREE_KEY", " ")
    with pytest.raises(ValueError, match=told):
        Endpoint(**SETTINGS | {"api_key_env": "REFEREE_KEY"})


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REFEREE_KEY", "hush")
    server = Server(by_quality, *[fails(401)] * 2)
    some = [rollout("good"), rollout("poor")]
    judged(server, *some, endpoint={"api_key_env": "REFEREE_KEY"})
    assert server.headers[0]["Authorization"] == "Bearer hush"
    assert "api_key_env=REFEREE_KEY" in str(some[0].error)
    assert "hush" not in str(some[0].error)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_url": "localhost"}, "base_url='localhost'"),
        ({"timeout_s": 0.0}, "timeout_s=0"),
        ({"requests_per_s": 0.0}, "requests_per_s=0"),
    ],
)
def test_an_endpoint_that_makes_no_sense_is_refused(change: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        Endpoint(**SETTINGS | change)
