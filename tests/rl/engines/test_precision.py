"""An engine beside a trainer in mixed precision computes what the trainer computes."""

import asyncio
import copy
from dataclasses import replace

import pytest
import torch

from moonlit.models.kimi import Kimi
from moonlit.models.mixed_precision import autocast_of, lower_products
from moonlit.rl.engines.native import NativeEngine
from tests.models.shapes import DECODER, packed, tiny_model
from tests.rl.engines.asking import answers, ask, pictures, text, training_logprobs

MIXED = "bf16-mixed"


def even_model() -> Kimi:
    """Rows of grouped bf16 products are multiples of 16 bytes; no logit so large that it rounds."""
    model = tiny_model(replace(DECODER, model_width=32, expert_width=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)
    return model


@torch.no_grad()
def test_lowered_weights_give_the_bits_of_autocast():
    model = even_model().eval()
    lowered = copy.deepcopy(model)
    lower_products(lowered, MIXED)
    ids, media = pictures((1, 2, 4), num_text=8)
    row = packed([torch.tensor(ids), torch.tensor(text(9))])

    with autocast_of(MIXED, torch.device("cpu")):
        ours, theirs = (
            one.logits(one(**row, features=one.encode_media(media)).hidden_TD)
            for one in (lowered, model)
        )

    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert lowered.language_model.lm_head.weight.dtype == torch.bfloat16
    assert lowered.language_model.model.embed_tokens.weight.dtype == torch.float32


def test_sampled_logprobs_are_those_of_a_trainer_in_mixed_precision():
    """Absorbed and expanded attention round differently; bf16 has three digits."""
    model = even_model()
    ids, media = pictures((1, 2, 4), num_text=8)
    requests = [ask(text(9), new=60, seed=1), ask(ids, media, new=60, seed=2)]

    completions = answers(NativeEngine.copy_of(model, precision=MIXED), requests)

    near, far = [], []
    for request, completion in zip(requests, completions, strict=True):
        with autocast_of(MIXED, torch.device("cpu")):
            expected = training_logprobs(model, request, completion).float()
        exact = training_logprobs(model, request, completion)
        got = torch.tensor(completion.untempered_logprobs)
        near.append((got - expected).abs())
        far.append((got - exact).abs())
    assert torch.cat(near).mean() < 0.01
    assert torch.cat(near).max() < 0.2  # where another expert is chosen
    assert torch.cat(far).max() > 1e-4, "nothing was computed in bf16"


def test_a_sync_is_proved_in_the_trainers_precision():
    model = even_model()
    engine = NativeEngine.copy_of(model, precision=MIXED)
    asyncio.run(engine.update_weights(model, 1))
    assert engine.version == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_engine_has_the_dtype_of_the_trainers_weights(dtype: torch.dtype):
    model = even_model().to(dtype)
    engine = NativeEngine.copy_of(model)
    assert engine.model.language_model.lm_head.weight.dtype == dtype
    assert answers(engine, [ask(text(5))])[0].token_ids
