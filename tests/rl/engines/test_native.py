"""The engine says what the training forward says, whatever is batched with what."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlit.batch import PackedMedia
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Engine, Request
from moonlit.rl.engines.native import NativeEngine
from tests.models.shapes import DECODER, MEDIA_PAD_ID, random_media, tiny_model
from tests.rl.engines.asking import answers, ask, pictures, text, training_logprobs, with_engine

FP32 = 1e-4


@pytest.fixture(scope="module")
def model() -> Kimi:
    return tiny_model()


def engine_of(model: Kimi, **settings: int) -> NativeEngine:
    return NativeEngine.copy_of(model, **settings)


def requests_of_all_kinds() -> list[Request]:
    picture, its_media = pictures((1, 2, 4), num_text=7)
    clip, its_frames = pictures((3, 4, 2), (1, 4, 4), num_text=9)
    return [
        ask(text(1), seed=1),
        ask(text(70), seed=2, new=9),
        ask(picture, its_media, seed=3),
        ask(text(9), seed=4, temperature=0.6, top_p=0.95),
        ask(clip, its_frames, seed=5, new=3),
        ask(picture, its_media, seed=6),
        ask(text(63), seed=7),  # its answer begins a new page
    ]


REQUESTS = requests_of_all_kinds()


def test_the_native_engine_is_an_engine(model: Kimi):
    assert isinstance(engine_of(model), Engine)


@settings(max_examples=12, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=9),
    max_sequences=st.integers(1, 5),
    max_prefill_tokens=st.sampled_from([1, 64, 4096]),
    spare_tokens=st.sampled_from([0, 200, None]),
)
def test_logprobs_are_those_of_the_training_forward_in_any_batch(
    model: Kimi,
    chosen: list[int],
    max_sequences: int,
    max_prefill_tokens: int,
    spare_tokens: int | None,
):
    """Catches: a wrong position, page, feature or version of the latents, at any time."""
    engine = engine_of(
        model,
        max_sequences=max_sequences,
        max_prefill_tokens=max_prefill_tokens,
        max_cache_tokens=None if spare_tokens is None else 128 + spare_tokens,
    )
    requests = [REQUESTS[place] for place in chosen]

    for request, completion in zip(requests, answers(engine, requests), strict=True):
        assert len(completion.token_ids) == request.sampling.max_new_tokens
        torch.testing.assert_close(
            torch.tensor(completion.untempered_logprobs),
            training_logprobs(model, request, completion),
            rtol=0,
            atol=FP32,
        )
    assert engine.batch.cache.num_pages_in_use == 0
    engine.close()


def test_a_sample_does_not_depend_on_the_batch_but_on_the_seed(model: Kimi):
    together = answers(engine_of(model), REQUESTS)
    alone = [answers(engine_of(model), [request])[0] for request in REQUESTS]
    crowded = answers(engine_of(model, max_sequences=2), REQUESTS[::-1])[::-1]

    expected = [completion.token_ids for completion in alone]
    assert [completion.token_ids for completion in together] == expected
    assert [completion.token_ids for completion in crowded] == expected
    assert alone[2].token_ids != alone[5].token_ids[:5]  # the same prompt, another seed


def test_at_temperature_1_the_behavior_differs_only_by_what_is_banned(model: Kimi):
    requests = [ask(text(5), seed=seed, new=20) for seed in range(3)]
    bans = torch.arange(MEDIA_PAD_ID - 3, MEDIA_PAD_ID + 1)

    for request, completion in zip(requests, answers(engine_of(model), requests), strict=True):
        ids = torch.tensor([*request.input_ids, *completion.token_ids])
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden_TD
        banned_mass = model.logits(hidden).softmax(-1)[4:-1][:, bans].sum(-1)
        torch.testing.assert_close(
            torch.tensor(completion.behavior_logprobs),
            torch.tensor(completion.untempered_logprobs) - torch.log1p(-banned_mass),
            rtol=0,
            atol=FP32,
        )


def test_equal_prompts_are_computed_once(model: Kimi):
    """Also where not all fit into the batch at once."""
    picture, media = pictures((1, 4, 4), num_text=8)
    engine = engine_of(model, max_sequences=3)
    group = [ask(picture, media, seed=seed) for seed in range(8)]
    other_picture = ask(picture, random_media([(1, 4, 4)]), seed=8)

    *completions, other = answers(engine, [*group, other_picture])

    assert sum(completion.num_prefilled_tokens for completion in completions) == len(picture)
    assert sum(completion.num_reused_tokens for completion in completions) == 7 * len(picture)
    assert other.num_prefilled_tokens == len(picture)
    assert len({tuple(completion.token_ids) for completion in completions}) > 1
    for request, completion in zip(group, completions, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.untempered_logprobs),
            training_logprobs(model, request, completion),
            rtol=0,
            atol=FP32,
        )


def joined(*media: PackedMedia) -> PackedMedia:
    return PackedMedia(
        pixel_values=torch.cat([one.pixel_values for one in media]),
        grid_thw=torch.cat([one.grid_thw for one in media]),
    )


def test_a_session_computes_only_what_is_new(model: Kimi):
    """A tool result with a picture arrives; then a turn that rewrites history."""
    first_ids, first_media = pictures((1, 2, 4), num_text=40)
    result_ids, result_media = pictures((2, 4, 4), num_text=6)

    async def talk(engine: NativeEngine) -> None:
        with engine.session() as session:
            first = ask(first_ids, first_media, new=30, session=session)
            answer = await engine.generate(first)
            ids = [*first_ids, *answer.token_ids, *result_ids]
            second = ask(ids, joined(first_media, result_media), seed=1, session=session)
            continued = await engine.generate(second)
            rewritten = ask([*first_ids, *text(5)], first_media, seed=2, session=session)
            shorter = await engine.generate(rewritten)
            other_media = joined(first_media, random_media([(2, 4, 4)]))
            third = ask(ids, other_media, seed=3, session=session)
            other = await engine.generate(third)

        assert answer.num_prefilled_tokens == len(first_ids)
        assert continued.num_reused_tokens == len(first_ids) + 30 - 1
        assert continued.num_prefilled_tokens == len(result_ids) + 1
        assert shorter.num_reused_tokens == len(first_ids)
        assert other.num_reused_tokens == len(first_ids)
        for request, got in ((second, continued), (rewritten, shorter), (third, other)):
            torch.testing.assert_close(
                torch.tensor(got.untempered_logprobs),
                training_logprobs(model, request, got),
                rtol=0,
                atol=FP32,
            )

    with_engine(engine_of(model), talk)


def test_another_picture_at_the_same_ids_is_computed_again(model: Kimi):
    ids, media = pictures((1, 2, 4), num_text=12)

    async def talk(engine: NativeEngine) -> None:
        with engine.session() as session:
            await engine.generate(ask(ids, media, session=session))
            request = ask(ids, random_media([(1, 2, 4)]), session=session)
            completion = await engine.generate(request)
        assert completion.num_reused_tokens == ids.index(MEDIA_PAD_ID)
        torch.testing.assert_close(
            torch.tensor(completion.untempered_logprobs),
            training_logprobs(model, request, completion),
            rtol=0,
            atol=FP32,
        )

    with_engine(engine_of(model), talk)


def test_a_session_serves_one_request_at_a_time(model: Kimi):
    async def talk(engine: NativeEngine) -> None:
        with engine.session() as session:
            requests = [ask(text(3), session=session), ask(text(4), session=session)]
            results = await asyncio.gather(
                *(engine.generate(request) for request in requests), return_exceptions=True
            )
            assert isinstance(results[1], ValueError)
            assert "in use by another request" in str(results[1])
        with pytest.raises(ValueError, match="session is closed"):
            await engine.generate(ask(text(3), session=session))

    with_engine(engine_of(model), talk)


def test_idle_sessions_give_way_when_the_cache_is_full(model: Kimi):
    async def talk(engine: NativeEngine) -> None:
        with engine.session() as session:
            await engine.generate(ask(text(60), session=session))
            await engine.generate(ask(text(120)))
            again = await engine.generate(ask(text(60), session=session))
        assert again.num_reused_tokens == 0

    with_engine(engine_of(model, max_cache_tokens=128), talk)


def test_stop_ids_end_an_answer_and_bans_hold(model: Kimi):
    free = answers(engine_of(model), [ask(text(6), new=30, seed=3)])[0].token_ids
    stop = free[4]
    banned = frozenset(free[:2])

    stopped, restrained, lone = answers(
        engine_of(model),
        [
            ask(text(6), new=30, seed=3, stop_ids=frozenset({stop})),
            ask(text(6), new=30, seed=3, banned_ids=banned),
            ask(text(6), new=9, banned_ids=frozenset(range(61)) - {7}),
        ],
    )

    assert stopped.token_ids == free[: free.index(stop) + 1]
    assert stopped.stop_reason == "stop"
    assert not banned & set(restrained.token_ids)
    assert restrained.stop_reason == "length"
    assert lone.token_ids == [7] * 9
    assert lone.behavior_logprobs == [0.0] * 9


def test_media_ids_are_never_sampled():
    """The policy itself can want one: then no feature would be there."""
    model = tiny_model()
    with torch.no_grad():
        model.language_model.model.norm.weight.zero_()  # uniform over the vocabulary
    requests = [ask(text(3), new=60, seed=seed) for seed in range(8)]

    sampled = {i for one in answers(engine_of(model), requests) for i in one.token_ids}

    assert sampled == set(range(61)) - set(range(MEDIA_PAD_ID - 3, MEDIA_PAD_ID + 1))


def test_the_last_position_ends_an_answer(model: Kimi):
    last = DECODER.max_positions - 2
    completion = answers(engine_of(model), [ask(text(last), new=9)])[0]
    assert (len(completion.token_ids), completion.stop_reason) == (2, "context")


def test_greedy_is_the_most_likely_token(model: Kimi):
    completion = answers(engine_of(model), [ask(text(8), new=6, temperature=0.0)])[0]
    ids = torch.tensor([*text(8), *completion.token_ids])
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden_TD
    logits = model.logits(hidden)[7:-1]
    logits[:, MEDIA_PAD_ID - 3 : MEDIA_PAD_ID + 1] = -torch.inf
    assert completion.token_ids == logits.argmax(-1).tolist()
    assert completion.behavior_logprobs == [0.0] * 6


def bad_requests() -> dict[str, Request]:
    ids, media = pictures((1, 2, 4), num_text=6)
    uneven = random_media([(1, 2, 4)])
    uneven.pixel_values = uneven.pixel_values[:-1]
    return {
        "prompt is empty": ask([]),
        "128 tokens: the model has 128 positions": ask(text(128)),
        "2 media placeholder tokens but its 0 items make 0": ask(ids),
        "0 media placeholder tokens but its 1 items make 2": ask(text(4), media),
        "grid .5, 4, 2.: want 1 to 4 frames": ask(ids, random_media([(5, 4, 2)])),
        "7 patches but its grids say 8": ask(ids, uneven),
        "id 61: the vocabulary has 61": ask([3, 61]),
        "leave no token": ask(text(4), banned_ids=frozenset(range(61))),
        "max_new_tokens=200 do not fit the cache: max_cache_tokens=192": ask(text(4), new=200),
    }


@pytest.mark.parametrize("message", bad_requests())
def test_a_request_that_cannot_be_served_is_refused_and_the_others_are_served(
    model: Kimi, message: str
):
    async def talk(engine: NativeEngine) -> None:
        good = [engine.generate(ask(text(5), seed=seed)) for seed in range(3)]
        refused = engine.generate(bad_requests()[message])
        *completions, error = await asyncio.gather(*good, refused, return_exceptions=True)
        with pytest.raises(ValueError, match=message):
            raise error
        assert [len(completion.token_ids) for completion in completions] == [5, 5, 5]

    with_engine(engine_of(model, max_cache_tokens=192), talk)


def test_text_only_models_refuse_media():
    blind = Kimi(decoder=DECODER, vision=None)
    ids, media = pictures((1, 2, 4), num_text=6)
    with pytest.raises(ValueError, match="this model has no encoder"):
        answers(NativeEngine(blind), [ask(ids, media)])
    assert len(answers(NativeEngine(blind), [ask(text(3))])[0].token_ids) == 5


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.5), ("new", 0)]
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: float):
    name = "max_new_tokens" if key == "new" else key
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        ask(text(3), **{key: value})


def test_a_request_whose_logits_are_not_finite_fails_alone():
    """Catches: a nan that stays in a page and spreads to whoever gets the page next."""
    model = tiny_model()
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[60] = torch.nan

    async def talk(engine: NativeEngine) -> None:
        requests = [ask(text(9), seed=1, new=80), ask([60, 1]), ask(text(12), seed=2, new=80)]
        requests = [
            ask(r.input_ids, new=r.sampling.max_new_tokens, banned_ids=frozenset({60}))
            for r in requests
        ]
        first, error, last = await asyncio.gather(
            *(engine.generate(request) for request in requests), return_exceptions=True
        )
        assert isinstance(error, FloatingPointError)
        assert "position 2" in str(error)
        assert len(first.token_ids) == len(last.token_ids) == 80
        after = await engine.generate(ask(text(5), banned_ids=frozenset({60})))
        assert len(after.token_ids) == 5

    with_engine(NativeEngine.copy_of(model), talk)


class FailsOnce(Kimi):
    """Its encoder refuses black pictures; its decoder fails in the first step of four tokens."""

    failures = 0

    def encode_media(self, media: PackedMedia) -> torch.Tensor:
        num_patches = media.grid_thw.prod(dim=1).tolist()
        if not all(bool(item.any()) for item in media.pixel_values.split(num_patches)):
            raise RuntimeError("a black picture")
        return super().encode_media(media)

    def forward(self, input_ids: torch.Tensor, *rest: object) -> object:
        if len(input_ids) == 4 and self.failures == 0:
            self.failures += 1
            super().forward(input_ids, *rest)  # latents are written and counted
            raise MemoryError("no room")
        return super().forward(input_ids, *rest)


def test_a_failing_step_or_prompt_is_tried_one_by_one(model: Kimi):
    ids, media = pictures((1, 2, 4), num_text=6)
    black = PackedMedia(pixel_values=torch.zeros_like(media.pixel_values), grid_thw=media.grid_thw)
    twin = FailsOnce(decoder=DECODER, vision=model.vision_shape)
    twin.load_state_dict(model.state_dict())
    requests = [ask(text(3), seed=0), ask(ids, media, seed=1), ask(text(9)), ask(text(11))]
    expected = answers(engine_of(model), requests)

    async def talk(engine: NativeEngine) -> None:
        *completions, error = await asyncio.gather(
            *(engine.generate(request) for request in [*requests, ask(ids, black)]),
            return_exceptions=True,
        )
        assert isinstance(error, RuntimeError)
        assert str(error) == "a black picture"
        assert twin.failures == 1
        assert [one.token_ids for one in completions] == [one.token_ids for one in expected]

    with_engine(NativeEngine(twin), talk)


def test_a_cancelled_request_frees_what_it_holds_and_the_others_go_on(model: Kimi):
    async def talk(engine: NativeEngine) -> None:
        long = [
            asyncio.create_task(engine.generate(ask(text(9), new=100, seed=seed)))
            for seed in range(4)
        ]
        await engine.generate(ask(text(4), new=2))
        for task in (long[0], long[3]):  # one runs, one waits
            task.cancel()
        results = await asyncio.gather(*long, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert isinstance(results[3], asyncio.CancelledError)
        assert len(results[1].token_ids) == len(results[2].token_ids) == 100

    with_engine(engine_of(model, max_sequences=3), talk)


def test_a_message_stands_in_the_inbox_until_it_is_done(model: Kimi):
    """Else the driver, which looks at any time, sees neither it nor its work, and goes home."""
    engine, seen = engine_of(model), []
    engine._inbox += [lambda: seen.append(len(engine._inbox))] * 2
    engine._read_inbox()
    assert seen == [2, 1]
    assert not engine._inbox
