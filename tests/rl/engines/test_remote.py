"""An engine server over real HTTP is the engine in process: same tokens, same refusals."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest
import torch
from aiohttp import web

from moonlit.models.kimi import Kimi
from moonlit.rl.engines import remote
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.engines.remote import EngineServerError, RemoteEngine
from moonlit.rl.engines.server import EngineServer, serve
from moonlit.rl.engines.sync import WeightSyncError
from moonlit.rl.engines.wire import SECRET
from moonlit.rl.loop_thread import LoopThread
from tests.models.shapes import tiny_model
from tests.rl.engines.asking import ask, pictures, text


@pytest.fixture(autouse=True)
def shared_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "of this job")


class Serving:
    """A server on a thread of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.engine = NativeEngine(tiny_model())
        self.server = EngineServer(self.engine, secret="of this job")
        self.loop = LoopThread("server")
        self.runner = web.AppRunner(self.server.application(), handler_cancellation=True)
        self.loop.run(self.start())

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.loop.run(self.runner.cleanup())
        self.loop.close()
        self.engine.close()


@pytest.fixture
def serving() -> Iterator[Serving]:
    server = Serving()
    yield server
    server.stop()


class Clients:
    """Makes engines, and closes them."""

    def __init__(self) -> None:
        self.engines: list[RemoteEngine] = []

    def connected(self, module: Kimi, *servers: Serving, version: int = 3) -> RemoteEngine:
        names = ",".join(server.address for server in servers)
        engine = RemoteEngine.connect(module, servers=names, version=version, start_timeout_s=5.0)
        self.engines.append(engine)
        return engine

    def silent(self, *servers: Serving, place: int) -> RemoteEngine:
        """One that has sent no weights."""
        names = [server.address for server in servers]
        engine = RemoteEngine(names, place=place, sends_weights=False, start_timeout_s=1.0)
        self.engines.append(engine)
        return engine


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    for engine in made.engines:
        engine.close()


def test_a_server_answers_as_the_engine_in_process(serving: Serving, clients: Clients):
    model = tiny_model()
    see = pictures((1, 4, 4), (2, 2, 4), num_text=6)
    far, near = clients.connected(model, serving), NativeEngine.copy_of(model, version=3)
    for request in (ask(text(5), seed=3), ask(text(9), seed=4, temperature=0.7), ask(*see)):
        assert asyncio.run(far.generate(request)) == asyncio.run(near.generate(request))
    assert far.num_sampled_tokens == near.num_sampled_tokens > 0


def test_weights_are_cut_into_parts_and_arrive_whole(
    serving: Serving, clients: Clients, monkeypatch
):
    monkeypatch.setattr(remote, "MAX_PART_BYTES", 20_000)
    clients.connected(tiny_model(), serving)
    assert serving.engine.version == 3


def test_before_any_weights_a_server_does_not_sample(serving: Serving, clients: Clients):
    engine = clients.silent(serving, place=0)
    with pytest.raises(WeightSyncError, match=f"{serving.address}: no trainer has sent"):
        asyncio.run(engine.generate(ask(text(4))))


def test_weights_that_went_astray_are_noticed(serving: Serving, clients: Clients, monkeypatch):
    """The last tensor of a sync stays the old one."""
    model = tiny_model()
    engine = clients.connected(model, serving)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    old = {k: v.clone() for k, v in serving.engine.model.state_dict().items()}
    save = remote.save
    monkeypatch.setattr(remote, "save", lambda part: save({k: old[k] for k in part}))
    with pytest.raises(WeightSyncError, match=r"version 4 the probe's log-probs differ by"):
        asyncio.run(engine.update_weights(model, 4))
    with pytest.raises(WeightSyncError):
        asyncio.run(engine.generate(ask(text(4))))


def test_a_missing_tensor_is_refused_by_name(serving: Serving, clients: Clients, monkeypatch):
    model = tiny_model()
    engine = clients.connected(model, serving)
    whole = remote.save
    monkeypatch.setattr(
        remote, "save", lambda part: whole({k: v for k, v in part.items() if "lm_head" not in k})
    )
    with pytest.raises(ValueError, match=r"(?s)missing.*lm_head"):
        asyncio.run(engine.update_weights(model, 4))
    assert serving.engine.version == 3


def test_a_request_that_cannot_be_served_is_refused_by_name(serving: Serving, clients: Clients):
    engine = clients.connected(tiny_model(), serving)
    with pytest.raises(ValueError, match="placeholder"):
        asyncio.run(engine.generate(ask([*text(3), tiny_model().decoder_shape.media_pad_id])))


def test_strangers_are_refused(serving: Serving, clients: Clients, monkeypatch):
    monkeypatch.setenv(SECRET, "of another job")
    engine = clients.silent(serving, place=0)
    with pytest.raises(ValueError, match="has another MOONLIT_ENGINE_SECRET"):
        asyncio.run(engine.generate(ask(text(4))))
    with pytest.raises(ValueError, match="has another MOONLIT_ENGINE_SECRET"):  # and at once
        clients.connected(tiny_model(), serving)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(EngineServerError, match=r"engine server http://127\.0\.0\.1:9"):
        RemoteEngine.connect(tiny_model(), servers="127.0.0.1:9", version=0, start_timeout_s=0.2)


def test_a_server_is_held_when_all_its_ranks_have_paused(serving: Serving, clients: Clients):
    first = clients.connected(tiny_model(), serving)
    second = clients.silent(serving, place=1)

    async def turns() -> list[bool]:
        held = []
        for call in (
            first.resume, second.resume, first.pause, second.pause, first.resume,
        ):  # fmt: skip
            await call()
            held.append(serving.engine._is_held)
        return held

    assert asyncio.run(turns()) == [False, False, False, True, False]


def test_the_dialogues_of_a_session_share_their_latents(serving: Serving, clients: Clients):
    engine = clients.connected(tiny_model(), serving)

    async def talk() -> int:
        with engine.session() as session:
            first = await engine.generate(ask(text(6), session=session))
            more = [*text(6), *first.token_ids, *text(2)]
            second = await engine.generate(ask(more, session=session))
        async with asyncio.timeout(10):  # its end is told in the background
            while serving.server.sessions:
                await asyncio.sleep(0.01)
        return second.num_reused_tokens

    assert asyncio.run(talk()) > 0


def test_each_rank_samples_from_its_server_and_the_first_sends_to_all(
    serving: Serving, clients: Clients
):
    other = Serving()
    try:
        clients.connected(tiny_model(), serving, other, version=7)
        assert (serving.engine.version, other.engine.version) == (7, 7)
        servers = [serving.address, other.address]
        places = [clients.silent(serving, other, place=place).server for place in range(3)]
        assert places == [f"http://{s}" for s in (*servers, servers[0])]
    finally:
        other.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_server_well(number: signal.Signals, capsys: pytest.CaptureFixture):
    engine = NativeEngine(tiny_model())

    async def serve_for_a_while() -> None:
        serving = asyncio.create_task(serve(engine, host="127.0.0.1", port=0, secret="a"))
        async with asyncio.timeout(20):
            while "serving" not in capsys.readouterr().out:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), number)
            await serving

    asyncio.run(serve_for_a_while())


def test_no_servers_are_refused():
    with pytest.raises(ValueError, match="want at least one HOST:PORT"):
        RemoteEngine([""], place=0, sends_weights=True, start_timeout_s=1.0)
