"""The router and what balances it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moonlit.models.kimi import Kimi
from moonlit.models.moe.layer import sequence_balance_loss
from moonlit.models.moe.router import Router, Routing
from moonlit.models.segments import Segments
from tests.models.shapes import DECODER, ENCODER, MEDIA_PAD_ID, document, packed, tiny_model


def router(seed: int = 0) -> Router:
    torch.manual_seed(seed)
    built = Router(model_width=12, num_experts=7, top_k=3, routed_scale=2.5)
    torch.nn.init.normal_(built.weight)
    return built


def text(num_tokens: int) -> Tensor:
    return torch.zeros(num_tokens, dtype=torch.int64)


def test_routing_is_computed_in_fp32_whatever_the_model_is_in():
    """Catches: scores in bf16, where experts tie and selection flips."""
    built, x = router().bfloat16(), torch.randn(400, 12).bfloat16()

    routing = built(x, text(400))

    logits = x.double() @ built.weight.double().T
    expected = logits.sigmoid().topk(3).indices.sort().values
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.expert_ids_TK.sort().values, expected)


def test_autocast_leaves_the_scores_alone():
    built, x = router(), torch.randn(400, 12)

    with torch.autocast("cpu", torch.bfloat16):
        routing = built(x, text(400))

    assert torch.equal(routing.scores_TE, built(x, text(400)).scores_TE)


def test_the_bias_moves_the_selection_and_never_the_weights():
    built, x = router(), torch.randn(50, 12)
    scores = torch.sigmoid(x @ built.weight.T)
    built.e_score_correction_bias[5] = 9.0

    routing = built(x, text(50))

    assert (routing.expert_ids_TK == 5).any(dim=1).all()
    chosen = scores.gather(1, routing.expert_ids_TK)
    expected = 2.5 * chosen / chosen.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK, expected)
    assert not built.e_score_correction_bias.requires_grad


def test_the_bias_stays_in_fp32_and_exact_when_the_model_changes_dtype():
    built = router()
    built.e_score_correction_bias.fill_(1.001)  # bf16 would round it to 1

    built.bfloat16().double()

    assert built.e_score_correction_bias.dtype == torch.float32
    assert built.e_score_correction_bias[0].item() == pytest.approx(1.001, abs=1e-6)


def test_the_bias_update_follows_the_rule():
    built = Router(model_width=2, num_experts=4, top_k=1, routed_scale=1.0)
    built.tokens_per_expert_ME.copy_(torch.tensor([[5, 0, 1, 2], [0, 0, 3, 1]]))  # sum 5 0 4 3

    built.update_selection_bias(0.1)

    # mean load 3: signs -1, +1, -1, 0, their mean -1/4
    expected = torch.tensor([-0.075, 0.125, -0.075, 0.025])
    torch.testing.assert_close(built.e_score_correction_bias, expected)


def test_repeated_updates_balance_a_skewed_router():
    built = router()
    x = torch.randn(500, 12) + 0.7 * built.weight[2].detach()  # everybody likes expert 2
    violations = []
    for _ in range(60):
        built.reset_load()
        built(x, text(500))
        load = built.tokens_per_expert_ME.sum(0).float()
        violations.append((load.max() / load.mean() - 1).item())
        built.update_selection_bias(0.02)

    assert violations[0] > 0.8
    assert min(violations[-5:]) < 0.1


def test_load_is_counted_by_modality_over_microbatches_and_only_in_training():
    model = tiny_model().train()
    gate = model.language_model.model.layers[1].mlp.gate
    grids = [(1, 2, 4)]
    rows = [packed([document(6, grids)]), packed([document(4, grids), torch.arange(3)])]
    features = torch.randn(2, DECODER.model_width)

    for row in rows:
        model(**row, features=features)
    model.eval()(**rows[0], features=features)

    assert (rows[0]["input_ids"] == MEDIA_PAD_ID).sum() == 2
    assert gate.tokens_per_expert_ME.sum(dim=1).tolist() == [2 * (6 + 7), 2 * (2 + 2)]
    gate.reset_load()
    assert gate.tokens_per_expert_ME.sum() == 0


def test_the_balance_loss_equals_its_formula_segment_by_segment():
    lengths, num_experts, top_k = (4, 9, 2), 5, 2
    scores = torch.rand(15, num_experts, dtype=torch.float64)
    routing = Routing(scores[:, :top_k], scores.topk(top_k).indices, scores)

    loss = sequence_balance_loss(routing, Segments(lengths))

    expected = 0.0
    for ids, s in zip(routing.expert_ids_TK.split(lengths), scores.split(lengths), strict=True):
        for expert in range(num_experts):
            fraction = num_experts / (top_k * len(s)) * (ids == expert).sum()
            affinity = (s[:, expert] / s.sum(dim=1)).mean()
            expected += len(s) * fraction * affinity
    torch.testing.assert_close(15 * loss, expected)


def test_the_balance_loss_is_one_at_perfect_balance():
    ids = torch.arange(12).view(6, 2) % 4
    routing = Routing(torch.ones(6, 2), ids, torch.full((6, 4), 0.3))

    assert sequence_balance_loss(routing, Segments((6,))).item() == pytest.approx(1.0)


def test_the_models_balance_loss_is_the_weighted_sum_over_layers():
    row = packed([torch.arange(9), torch.arange(4)])
    losses = []
    for alpha in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        model = Kimi(decoder=replace(DECODER, aux_loss_alpha=alpha), vision=ENCODER)
        losses.append(model(**row).load_balance_loss)

    assert losses[0].item() == 0
    torch.testing.assert_close(2 * losses[1], losses[2])
    assert losses[2].item() == pytest.approx(2, rel=0.2)  # two layers, near balance
    losses[2].backward()
    assert model.language_model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_a_model_materialised_from_the_meta_device_starts_like_any_other():
    """Catches: a module whose parameters or buffers nobody initialises."""
    with torch.device("meta"):
        model = Kimi(decoder=DECODER, vision=ENCODER)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(77)

    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    built = Kimi(decoder=DECODER, vision=ENCODER)
    fresh = dict(built.named_parameters()) | dict(built.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.abs().max() <= 1, name
        if fresh[name].abs().max() in (0, 1):  # biases, gains, counters
            assert torch.equal(tensor, fresh[name]), name
