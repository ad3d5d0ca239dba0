"""A real vLLM server on the CPU: ``make test-vllm``. One server for all; the last test kills it."""

import asyncio
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from moonlit.chat.tokenizer import Tokenizer
from moonlit.hub.writer import save_released
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.sync import Probe, WeightSyncError, trainer_logprobs
from moonlit.rl.engines.vllm import weights as vllm_weights
from moonlit.rl.engines.vllm.engine import VllmEngine
from moonlit.rl.engines.vllm.fleet import Fleet
from moonlit.rl.engines.vllm.server import SHORT_S, VllmServer
from moonlit.rl.engines.wire import SECRET
from tests.hub.tiny_release import DECODER, ENCODER
from tests.phases.policy_run import make_phase, run
from tests.rl.engines.asking import ask, assert_sampled_from, text
from tests.rl.engines.fake_vllm import free_port

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-vllm/bin/python"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: make test-vllm makes it"),
]

# vLLM's attention on a CPU has heads of 32, 64, 80, 96, ... and its MLA latents of 576 only.
SHAPE = replace(DECODER, qk_nope_width=16, qk_rope_width=16)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "src"),
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
ARGUMENTS = [
    "--host=127.0.0.1",
    "--dtype=float32",
    "--enforce-eager",
    "--enable-scale-out",
    "--logprobs-mode=processed_logprobs",
    "--enable-prompt-tokens-details",
    "--max-num-seqs=8",
    "--distributed-executor-backend=uni",  # one process less to start
    "--worker-extension-cls=moonlit.rl.engines.vllm.worker.WeightReceiver",
    '--weight-transfer-config={"backend": "moonlit"}',
]
SETTINGS = {"normalises": True, "request_timeout_s": 600.0}
START_S = 1500.0  # 30 s on an idle machine
VERSIONS = count(1)


def drawn(seed: int) -> Kimi:
    """A model in which no tensor can go unnoticed."""
    model = Kimi(decoder=SHAPE, vision=ENCODER).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        is_gain = name.endswith(("norm.weight", "norm0.weight", "norm1.weight"))
        nn.init.normal_(tensor, mean=float(is_gain), std=0.1, generator=generator)
    return model


class Started:
    """A server on an export, as it was before any weights were sent, and an engine for it."""

    def __init__(self, folder: Path) -> None:
        model, released = drawn(0), folder / "released"
        save_released(model, Tokenizer.embedded(), released, dtype=torch.float32)
        self.folder = folder
        words = [
            "env",
            *(f"{name}={value}" for name, value in ENVIRONMENT.items()),
            str(PYTHON),
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={released}",
            *ARGUMENTS,
        ]
        self.address = f"127.0.0.1:{free_port()}"
        self.fleet = Fleet(
            command=f"{shlex.join(words)} --port={{port}}",
            folder=folder,
            tokenizer=Tokenizer.embedded(),
            secret="of this test",
            max_logprob_gap=1e-4,
            start_timeout_s=START_S,
            watch_s=0.0,
        )
        self.engine = VllmEngine(model, [self.address], place=0, keeper=self.fleet, **SETTINGS)
        try:
            self.engine.thread.run(self.fleet.begin(self.engine.servers))
            self.gaps_of_export = self.gaps(model, "export")
        except BaseException:
            self.engine.close()
            raise

    @property
    def server(self) -> VllmServer:
        return self.engine.server

    def gaps(self, model: Kimi, salt: str) -> list[float]:
        """How far the server is from a model, by row: text, text, picture [nats]."""
        probe = self.engine.probe
        rows = [Probe([prompt]) for prompt in probe.prompts]
        return [
            self.engine.thread.run(self.server.gap(row, trainer_logprobs(model, row.prompts), salt))
            for row in rows
        ]

    def sync(self, model: Kimi) -> int:
        version = next(VERSIONS)
        asyncio.run(self.engine.update_weights(model, version))
        return version


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET, "of this test")
        made = Started(tmp_path_factory.mktemp("vllm"))
        yield made
        made.engine.close()


def prompts(started: Started, **settings) -> list[Request]:
    return [ask(prompt.ids, prompt.media, **settings) for prompt in started.engine.probe.prompts]


def test_an_export_is_served_with_our_log_probs(started: Started):
    """What `moonlit export` writes, read by vLLM: text and a picture."""
    assert len(started.gaps_of_export) == 3
    assert max(started.gaps_of_export) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_are_sampled_from_the_weights_that_were_sent(started: Started, temperature: float):
    model = drawn(1)
    version = started.sync(model)
    for request in prompts(started, new=12, temperature=temperature):
        completion = asyncio.run(started.engine.generate(request))
        assert len(completion.token_ids) == 12
        assert completion.policy_versions == [version] * 12
        assert_sampled_from(model, request, completion, slice(None))


def test_a_nucleus_is_sampled_from(started: Started):
    started.sync(drawn(1))
    wide, narrow = (
        asyncio.run(started.engine.generate(ask(text(5), new=40, top_p=top_p, seed=1)))
        for top_p in (1.0, 0.05)
    )
    # The log-probs are the nucleus': far above those of 2,304 tokens.
    assert max(wide.behavior_logprobs) < min(narrow.behavior_logprobs)


def test_held_requests_go_on_with_the_new_weights(started: Started):
    """Each token's log-prob is that of the weights its version names, in both parts."""
    old, new = drawn(1), drawn(2)
    before = started.sync(old)
    engine, after = started.engine, next(VERSIONS)
    requests = prompts(started, new=400)

    async def talk() -> list[Completion]:
        began_at = engine.num_sampled_tokens
        asked = [asyncio.create_task(engine.generate(request)) for request in requests]
        while engine.num_sampled_tokens < began_at + 10 * len(requests):  # told at a pause only
            await engine.resume()
            await asyncio.sleep(0.3)
            await engine.pause()
        await engine.update_weights(new, after)
        await engine.resume()
        return list(await asyncio.gather(*asked))

    for request, completion in zip(requests, asyncio.run(talk()), strict=True):
        assert len(completion.token_ids) == 400
        assert completion.policy_versions == sorted(completion.policy_versions)
        assert set(completion.policy_versions) == {before, after}
        begin = completion.policy_versions.index(after)
        assert_sampled_from(old, request, completion, slice(begin))
        assert_sampled_from(new, request, completion, slice(begin, None))


def test_a_stale_server_is_caught(started: Started, monkeypatch: pytest.MonkeyPatch):
    """It has the new version and the old weights."""
    old, new = drawn(1), drawn(2)
    started.sync(old)
    parts_of, stale = vllm_weights.parts_of, old.state_dict()
    monkeypatch.setattr(
        vllm_weights, "parts_of", lambda layout, _, dtype: parts_of(layout, stale, dtype)
    )
    with pytest.raises(WeightSyncError, match=f"{started.address}.* log-probs differ by"):
        started.sync(new)
    with pytest.raises(WeightSyncError, match=started.address):
        asyncio.run(started.engine.generate(ask(text(5))))
    monkeypatch.undo()
    monkeypatch.setenv(SECRET, "of this test")
    started.sync(new)


def test_the_fall_back_reads_a_folder_and_packs_the_experts(started: Started):
    """vLLM's own reload leaves a CPU's routed experts unpacked, behind HTTP 200."""
    model, folder = drawn(3), started.folder / "reloaded"
    save_released(model, Tokenizer.embedded(), folder, dtype=torch.float32)
    run_there, server = started.engine.thread.run, started.server
    by_itself = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    run_there(server.call("POST", "/collective_rpc", by_itself, timeout_s=SHORT_S))
    assert min(started.gaps(model, "unpacked")) > 0.1
    run_there(server.reload(str(folder), "of-the-folder"))
    assert max(started.gaps(model, "packed")) < 1e-4
    assert run_there(server.label()) == "of-the-folder"


@pytest.mark.parametrize("rollouts", [{}, {"groups_ahead": 4, "max_staleness": 2}])
def test_rl_iterations_sample_on_the_server(started: Started, rollouts: dict[str, int]):
    """Two of them; with groups ahead, some requests are held while the weights are pushed."""
    model = drawn(4)
    phase = make_phase(max_new_tokens=24, groups_per_iteration=4, **rollouts)
    phase.build_model = lambda: model
    phase.build_engine = partial(
        VllmEngine.connect,
        servers=started.address,
        command=None,
        folder=None,
        tokenizer="embedded",
        precision="32-true",
        max_logprob_gap=1e-4,
        start_timeout_s=60.0,
        watch_s=0.0,
        **SETTINGS,
    )
    logged = run(phase, max_steps=2)
    assert len(logged) == 2
    rows = [
        row for group in phase.last_groups for one in group.trajectories for row in one.segments
    ]
    versions = {v for row in rows for v in row.policy_versions if v >= 0}
    assert versions <= {0, 1}
    assert 1 in versions
    if not rollouts:
        assert versions == {1}
        for one in logged:  # on policy, server and trainer agree
            assert one["rl/log_ratio_abs_mean"] < 1e-4
            assert one["rl/staleness"] == 0


def test_a_killed_server_is_started_again_with_the_weights(started: Started):
    model = drawn(5)
    version = started.sync(model)
    process = started.fleet.processes[started.server]
    first, request = process.process, ask(text(5), new=300)
    assert first is not None

    async def talk() -> Completion:
        asked = asyncio.create_task(started.engine.generate(request))
        await asyncio.sleep(1.0)
        assert not asked.done()
        first.kill()
        return await asked

    completion = asyncio.run(talk())
    assert process.process is not first
    assert completion.policy_versions == [version] * 300
    assert_sampled_from(model, request, completion, slice(None))
