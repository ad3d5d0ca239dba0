"""The engine on vLLM servers, against a server that speaks vLLM's routes and misbehaves."""

import asyncio
import shlex
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.remote import EngineServerError
from moonlit.rl.engines.sync import WeightSyncError
from moonlit.rl.engines.vllm import weights as vllm_weights
from moonlit.rl.engines.vllm.engine import VllmEngine
from moonlit.rl.engines.vllm.fleet import Fleet
from moonlit.rl.engines.vllm.follower import Follower
from moonlit.rl.engines.vllm.server import UPDATE
from moonlit.rl.engines.wire import SECRET, SECRET_HEADER
from tests.models.shapes import DECODER, MEDIA_PAD_ID, tiny_model
from tests.rl.engines.asking import ask, assert_sampled_from, pictures, text
from tests.rl.engines.fake_vllm import RunningFake, free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "of this job")
    for module in ("engine", "fleet", "follower"):
        monkeypatch.setattr(f"moonlit.rl.engines.vllm.{module}.RETRY_S", 0.05)


class Bench:
    """Makes servers and engines, and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: list[Callable[[], None]] = []

    def server(self, **faults: Any) -> RunningFake:
        running = RunningFake(**faults)
        self.ends.append(running.stop)
        return running

    def engine(self, module: Kimi, *servers: RunningFake | str, **settings: Any) -> VllmEngine:
        names = [s if isinstance(s, str) else s.fake.address for s in servers]
        engine = VllmEngine.connect(
            module,
            version=3,
            servers=",".join(names),
            **{
                "command": None,
                "folder": None,
                "tokenizer": "embedded",
                "normalises": True,
                "precision": "32-true",
                "max_logprob_gap": 1e-4,
                "start_timeout_s": 5.0,
                "request_timeout_s": 30.0,
                "watch_s": 0.0,
                **settings,
            },
        )
        self.ends.insert(0, engine.close)
        return engine

    def other_rank(self, model: Kimi, server: RunningFake, *, patience_s: float) -> VllmEngine:
        """The engine of a rank that the first one gives the weights for."""
        engine = VllmEngine(
            model,
            [server.fake.address],
            place=1,
            keeper=Follower(patience_s),
            normalises=True,
            request_timeout_s=30.0,
        )
        self.ends.insert(0, engine.close)
        return engine


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for end in made.ends:
        end()


@torch.no_grad()
def changed(model: Kimi) -> Kimi:
    for parameter in model.parameters():
        parameter.mul_(1.1)
    return model


def run(engine: VllmEngine, request: Request) -> Completion:
    return asyncio.run(asyncio.wait_for(engine.generate(request), timeout=20))


def within(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, timeout=30))


def test_weights_arrive_and_answers_are_the_models(bench: Bench, monkeypatch):
    """Text and pictures, weights in several parts."""
    monkeypatch.setattr(vllm_weights, "MAX_PART_BYTES", 20_000)
    model, server = tiny_model(), bench.server()
    engine = bench.engine(model, server)
    for request in (ask(text(5), seed=3), ask(*pictures((1, 4, 4), (2, 2, 4), num_text=6))):
        completion = run(engine, request)
        assert_sampled_from(model, request, completion, slice(None))
        assert len(completion.token_ids) == 5
        assert completion.policy_versions == [3] * 5
        assert completion.stop_reason == "length"
        assert completion.untempered_logprobs == completion.behavior_logprobs
        assert (completion.num_reused_tokens, completion.num_prefilled_tokens) == (
            2,
            len(request.input_ids) - 2,
        )
    assert engine.num_sampled_tokens == 10
    assert server.fake.label.startswith("3-")


def test_a_request_says_what_vllm_must_know(bench: Bench):
    server = bench.server()
    engine = bench.engine(tiny_model(), server)
    ids, media = pictures((1, 4, 4), num_text=6)
    request = ask(ids, media, stop_ids=frozenset({7, 9}), temperature=0.5, top_p=0.9, seed=11)
    run(engine, request)
    body = server.fake.bodies[-1]
    wanted = body["sampling_params"]
    assert (wanted["temperature"], wanted["top_p"], wanted["seed"]) == (0.5, 0.9, 11)
    assert (wanted["stop_token_ids"], wanted["ignore_eos"]) == ([7, 9], True)
    assert str(MEDIA_PAD_ID) in wanted["logit_bias"]
    assert body["cache_salt"] == server.fake.label
    first = ids.index(MEDIA_PAD_ID)
    assert body["features"]["mm_placeholders"] == {"vision_chunk": [{"offset": first, "length": 4}]}
    (name,) = body["features"]["mm_hashes"]["vision_chunk"]
    assert name.startswith(server.fake.label)  # cached features of other weights are not found


def test_a_stop_id_and_greedy_sampling(bench: Bench):
    engine = bench.engine(tiny_model(), bench.server())
    greedy = run(engine, ask(text(5), temperature=0.0))
    assert greedy.behavior_logprobs == [0.0] * 5
    assert max(greedy.untempered_logprobs) < 0
    stop = greedy.token_ids[1]
    stopped = run(engine, ask(text(5), temperature=0.0, stop_ids=frozenset({stop})))
    assert stopped.token_ids == greedy.token_ids[: greedy.token_ids.index(stop) + 1]
    assert stopped.stop_reason == "stop"
    assert run(engine, ask(text(5), temperature=0.7)).untempered_logprobs == []


def test_the_last_position_ends_an_answer(bench: Bench):
    engine = bench.engine(tiny_model(), bench.server(max_model_len=40))
    completion = run(engine, ask(text(30), new=50))
    assert (len(completion.token_ids), completion.stop_reason) == (10, "context")
    with pytest.raises(ValueError, match="has room for 40"):
        run(engine, ask(text(40)))


def test_held_requests_go_on_with_the_new_weights(bench: Bench):
    """Each token is of the weights that its version names: the second part is recomputed."""
    old, model = tiny_model(), tiny_model()
    server = bench.server(s_per_token=0.02)
    engine = bench.engine(model, server)
    requests = [ask(text(6), new=30), ask(*pictures((1, 4, 4), num_text=6), new=30)]

    async def talk() -> list[Completion]:
        asked = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.25)
        await engine.pause()
        assert not engine.in_flight
        asked.append(asyncio.create_task(engine.generate(requests[0])))  # comes while all are held
        await engine.update_weights(changed(model), 4)
        await engine.resume()
        return list(await asyncio.gather(*asked))

    first, second, late = within(talk())
    assert set(late.policy_versions) == {4}
    for request, completion in zip(requests, (first, second), strict=True):
        assert sorted(completion.policy_versions) == completion.policy_versions
        assert set(completion.policy_versions) == {3, 4}
        assert len(completion.token_ids) == 30
        begin = completion.policy_versions.index(4)
        assert_sampled_from(old, request, completion, slice(begin))
        assert_sampled_from(model, request, completion, slice(begin, None))


def test_a_cancelled_request_is_taken_off_the_server(bench: Bench):
    engine = bench.engine(tiny_model(), bench.server(s_per_token=0.05))

    async def talk() -> None:
        asked = asyncio.create_task(engine.generate(ask(text(5), new=100)))
        await asyncio.sleep(0.2)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        async with asyncio.timeout(5):
            while engine.in_flight:
                await asyncio.sleep(0.01)

    within(talk())


# Weights that are not the trainer's


def test_a_stale_server_is_named(bench: Bench):
    """It takes the weights and the version, and goes on with the old ones."""
    model, good, stale = tiny_model(), bench.server(), bench.server()
    engine = bench.engine(model, good, stale)
    stale.fake.is_stale = True
    with pytest.raises(
        WeightSyncError, match=f"{stale.fake.address}: after the sync to weights 4-.* differ by"
    ):
        within(engine.update_weights(changed(model), 4))
    run(engine, ask(text(5)))  # this rank's own server has them
    engine.server = engine.servers[1]
    with pytest.raises(WeightSyncError, match=stale.fake.address):
        run(engine, ask(text(5)))


def test_a_server_that_lies_about_its_version_is_named(bench: Bench):
    server = bench.server()
    engine = bench.engine(tiny_model(), server)
    server.fake.told_label = "2-of-somebody-else"
    with pytest.raises(
        EngineServerError, match=f"{server.fake.address} samples with weights .*2-of-somebody-else"
    ):
        run(engine, ask(text(5)))


def test_log_probs_of_another_distribution_are_refused(bench: Bench):
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        bench.engine(tiny_model(), bench.server(tells_raw_logprobs=True))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"samples_id": MEDIA_PAD_ID}, "has sampled banned ids"),
        ({"ends_with": "repetition"}, "has ended with 'repetition'"),
    ],
)
def test_nonsense_is_named(bench: Bench, fault: dict[str, Any], message: str):
    server = bench.server()
    engine = bench.engine(tiny_model(), server)
    for name, value in fault.items():
        setattr(server.fake, name, value)
    with pytest.raises(EngineServerError, match=f"{server.fake.address} {message}"):
        run(engine, ask(text(5)))


def test_a_server_that_cannot_fetch_is_named(bench: Bench):
    server = bench.server(cannot_fetch=True)
    with pytest.raises(EngineServerError, match=f"{server.fake.address}.*no route to trainer"):
        bench.engine(tiny_model(), server)
    assert server.fake.calls.count(UPDATE[2]) == 3
    assert server.fake.calls[-1] == "/resume"  # it is not left held


def test_weights_are_given_to_those_of_the_job_only(bench: Bench):
    engine = bench.engine(tiny_model(), bench.server())
    assert isinstance(engine.keeper, Fleet)
    store = engine.keeper.store
    assert isinstance(store, vllm_weights.ServedWeights)

    async def status(path: str, secret: str) -> int:
        headers = {SECRET_HEADER: secret}
        async with engine.client().get(
            f"http://127.0.0.1:{store.port}/{path}", headers=headers
        ) as answer:
            return answer.status

    paths = [
        (f"{store.label}/0", "of this job"),
        (f"{store.label}/0", "x"),
        ("2-old/0", store.secret),
    ]
    assert [engine.thread.run(status(*path)) for path in paths] == [200, 403, 404]


def test_the_probe_is_computed_in_the_trainers_precision(bench: Bench):
    """16 bits leave more than float32, and are allowed more."""
    shape = replace(DECODER, model_width=32, expert_width=16)  # what bf16's grouped_mm can take
    torch.manual_seed(0)
    model, server = Kimi(decoder=shape, vision=None), bench.server()
    server.fake.model = Kimi(decoder=shape, vision=None)
    with pytest.raises(WeightSyncError, match="at most 1e-05"):
        bench.engine(model, server, precision="bf16-mixed", max_logprob_gap=1e-5)
    bench.engine(model, server, precision="bf16-mixed", max_logprob_gap=None)


# Servers without an update interface


def test_without_an_update_interface_weights_go_through_a_folder(bench: Bench, caplog):
    model, server = embedded_model(), bench.server(without={UPDATE[2]})
    server.fake.model = embedded_model(seed=1)
    server.fake.max_model_len = 128
    engine = bench.engine(model, server, folder=str(bench.folder))
    assert "/update_weights" in caplog.text
    (written,) = bench.folder.iterdir()
    assert written.name == server.fake.label
    within(engine.update_weights(changed(model), 4))
    (after,) = bench.folder.iterdir()  # the last one is gone
    assert after.name == server.fake.label != written.name


def embedded_model(seed: int = 0) -> Kimi:
    """One whose ids are the embedded tokenizer's: a folder holds both."""
    torch.manual_seed(seed)
    return Kimi(decoder=replace(DECODER, vocab_size=2304, media_pad_id=2069), vision=None)


def test_without_a_folder_the_missing_routes_are_named(bench: Bench):
    server = bench.server(without={UPDATE[2]})
    with pytest.raises(ValueError, match=r"has no /update_weights: engine\.folder must name"):
        bench.engine(tiny_model(), server)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ({"/inference/v1/generate"}, "start it with --enable-scale-out"),
        ({"/inference/v1/abort_requests"}, "its vLLM is too old"),
        ({UPDATE[0], "/collective_rpc"}, "start it with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_what_a_server_lacks_is_said_at_the_start(bench: Bench, without: set[str], message: str):
    with pytest.raises(ValueError, match=message):
        bench.engine(tiny_model(), bench.server(without=without))


# Servers that fail


def test_an_answer_survives_an_error_of_the_server(bench: Bench):
    server = bench.server()
    engine = bench.engine(tiny_model(), server)
    server.fake.errors_to_come = 1
    assert len(run(engine, ask(text(5))).token_ids) == 5


def test_a_request_that_kills_its_server_again_and_again_is_given_up(bench: Bench):
    server = bench.server()
    engine = bench.engine(tiny_model(), server)

    server.fake.errors_to_come = 100
    with pytest.raises(EngineServerError, match=f"{server.fake.address}.*the engine is dead"):
        run(engine, ask(text(5)))
    assert 100 - server.fake.errors_to_come == 3


def test_a_server_that_dies_in_a_request_gets_its_weights_again(bench: Bench):
    """It comes back under the same address with other weights, started by somebody else."""
    model, server = tiny_model(), bench.server(s_per_token=0.01)
    engine = bench.engine(model, server)
    server.fake.dies_after_tokens = 3

    async def talk() -> Completion:
        asked = asyncio.create_task(engine.generate(ask(text(5), new=12)))
        await asyncio.sleep(0.5)
        assert server.fake.runner is None
        assert not asked.done()
        await asyncio.to_thread(server.restart)
        return await asked

    completion = within(talk())
    assert len(completion.token_ids) == 12
    assert set(completion.policy_versions) == {3}
    assert_sampled_from(model, ask(text(5)), completion, slice(None))


def test_a_server_that_stays_away_is_named(bench: Bench):
    server = bench.server()
    engine = bench.engine(tiny_model(), server, start_timeout_s=0.3)
    server.die()
    with pytest.raises(EngineServerError, match=f"{server.fake.address} does not answer for 0 s"):
        run(engine, ask(text(5)))


def test_an_idle_server_that_was_restarted_is_found_and_given_its_weights(bench: Bench):
    model, own, other = tiny_model(), bench.server(), bench.server()
    bench.engine(model, own, other, watch_s=0.05)
    other.die()
    other.restart()

    async def wait() -> None:
        while not other.fake.label.startswith("3-"):
            await asyncio.sleep(0.02)

    within(wait())


RELAY = """
import asyncio, sys
async def relay(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
async def accept(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(relay(reader, there[1]), relay(there[0], writer), return_exceptions=True)
async def main():
    server = await asyncio.start_server(accept, "127.0.0.1", int(sys.argv[2]))
    await server.serve_forever()
asyncio.run(main())
"""
"""A process that starts in no time: hands on to a fake in this one, and dies in its place."""


def test_a_server_that_we_started_is_started_again(bench: Bench):
    """A real process, killed in the middle of an answer."""
    behind, port = bench.server(s_per_token=0.01), free_port()
    words = [sys.executable, "-c", RELAY, str(behind.fake.port)]
    engine = bench.engine(
        tiny_model(),
        f"127.0.0.1:{port}",
        command=f"{shlex.join(words)} {{port}}",
        folder=str(bench.folder),
        start_timeout_s=20.0,
    )
    assert isinstance(engine.keeper, Fleet)
    running = engine.keeper.processes[engine.server]
    first = running.process
    assert first is not None

    async def talk() -> Completion:
        asked = asyncio.create_task(engine.generate(ask(text(5), new=30)))
        await asyncio.sleep(0.2)
        first.kill()
        behind.fake.forget()
        return await asked

    completion = within(talk())
    assert len(completion.token_ids) == 30
    assert running.process is not first
    assert behind.fake.label.startswith("3-")
    engine.close()
    assert running.has_ended
    bench.ends.remove(engine.close)


# Other ranks


def test_another_rank_waits_until_the_first_has_given_the_weights(bench: Bench):
    model, server = tiny_model(), bench.server()
    other = bench.other_rank(model, server, patience_s=5.0)

    async def talk() -> Completion:
        await other.update_weights(model, 3)
        asked = asyncio.create_task(other.generate(ask(text(5))))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await asyncio.to_thread(bench.engine, model, server)
        return await asked

    assert within(talk()).policy_versions == [3] * 5


def test_another_rank_says_what_it_waits_for(bench: Bench):
    server = bench.server()
    other = bench.other_rank(tiny_model(), server, patience_s=0.2)
    within(other.update_weights(tiny_model(), 3))
    with pytest.raises(EngineServerError, match=f"{server.fake.address} is not ready"):
        run(other, ask(text(5)))


def test_no_servers_are_refused():
    with pytest.raises(ValueError, match="want at least one HOST:PORT"):
        VllmEngine(
            tiny_model(),
            [""],
            place=0,
            keeper=Follower(1.0),
            normalises=True,
            request_timeout_s=1.0,
        )
