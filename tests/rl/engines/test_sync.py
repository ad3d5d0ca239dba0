"""New weights are proved, stamped, and never mixed with what old ones computed."""

import asyncio

import pytest
import torch

from moonlit.models.kimi import Kimi
from moonlit.rl.engines import native
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.engines.sync import WeightSyncError
from tests.models.shapes import DECODER, DIRECT_QUERIES, tiny_model
from tests.rl.engines.asking import ask, pictures, text, training_logprobs, with_engine

FP32 = 1e-4


def moved(model: Kimi, *, by: float = 0.05) -> Kimi:
    """The same network some optimizer steps later."""
    twin = tiny_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + by * torch.randn(ours.shape, generator=generator))
    return twin.train()


def test_running_requests_go_on_with_the_new_weights_and_every_token_is_stamped():
    """Catches: latents of old weights under new ones, stale session or group prompts."""
    old = tiny_model()
    new = moved(old)
    ids, media = pictures((1, 2, 4), num_text=8)
    requests = [ask(text(9), new=60, seed=1), ask(ids, media, new=60, seed=2)]

    async def talk(engine: NativeEngine) -> None:
        with engine.session() as session:
            await engine.generate(ask(text(7), session=session))
            tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
            await engine.generate(ask(text(3), new=4))
            await engine.update_weights(new, 7)
            after = ask(text(7), session=session)
            again = await engine.generate(after)
            completions = [await task for task in tasks]
        assert again.num_reused_tokens == 0
        for request, completion in zip([after, *requests], [again, *completions], strict=True):
            versions = torch.tensor(completion.policy_versions)
            assert versions.tolist() == sorted(versions.tolist())
            got = torch.tensor(completion.untempered_logprobs)
            for version, model in ((0, old), (7, new)):
                expected = training_logprobs(model, request, completion)
                same = versions == version
                torch.testing.assert_close(got[same], expected[same], rtol=0, atol=FP32)
        for completion in completions:
            assert set(completion.policy_versions) == {0, 7}

    with_engine(NativeEngine.copy_of(old), talk)


def test_training_the_trainer_does_not_move_the_engine():
    model = tiny_model()
    engine = NativeEngine.copy_of(model)
    request = ask(text(5), seed=3)
    before = asyncio.run(engine.generate(request))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert asyncio.run(engine.generate(request)) == before


def stale(weights: dict[str, torch.Tensor], target: torch.nn.Module) -> None:
    """Take over nothing."""


def without_biases(weights: dict[str, torch.Tensor], target: torch.nn.Module) -> None:
    """Take over all but the routers' selection biases, which are no parameters."""
    names = dict(target.named_parameters())
    target.load_state_dict({name: weights[name] for name in names}, strict=False)


@pytest.mark.parametrize("copy", [stale, without_biases])
def test_a_sync_that_leaves_something_behind_is_noticed(
    copy: object, monkeypatch: pytest.MonkeyPatch
):
    """The probe knows the trainer's forward, not how weights travel."""
    model = tiny_model()
    new = moved(model, by=0.02)
    with torch.no_grad():
        for layer in new.language_model.model.layers[DECODER.num_dense_layers :]:
            bias = layer.mlp.gate.e_score_correction_bias
            bias.copy_(bias.roll(1))

    async def talk(engine: NativeEngine) -> None:
        await engine.update_weights(model, 1)
        with monkeypatch.context() as patch:
            patch.setattr(native, "copy_weights", copy)
            with pytest.raises(WeightSyncError, match=r"version 2 .* differ by \d"):
                await engine.update_weights(new, 2)
        with pytest.raises(WeightSyncError, match=r"at most 0\.02 is allowed"):
            await engine.generate(ask(text(4)))
        await engine.update_weights(new, 3)
        completion = await engine.generate(ask(text(4)))
        assert completion.policy_versions == [3] * 5

    with_engine(NativeEngine.copy_of(model), talk)


def test_the_probe_decodes_token_by_token(monkeypatch: pytest.MonkeyPatch):
    """Catches: a probe of prompts only, which never reads the cache."""
    engine = NativeEngine.copy_of(tiny_model())

    def forgetful(q: torch.Tensor, *_: object, latent_width: int, scale: float) -> torch.Tensor:
        return torch.zeros(*q.shape[:2], latent_width)

    monkeypatch.setattr("moonlit.models.absorbed.attend_to_pages", forgetful)
    with pytest.raises(WeightSyncError, match=r"version 1 .* differ by"):
        asyncio.run(engine.update_weights(tiny_model(), 1))


def test_a_module_of_another_shape_is_refused_by_name():
    other = tiny_model(DIRECT_QUERIES)
    engine = NativeEngine.copy_of(tiny_model())
    with pytest.raises(ValueError, match="q_proj"):
        asyncio.run(engine.update_weights(other, 1))
    assert engine.version == 0
