"""MuonClip on the real model: every parameter has its algorithm, and QK-Clip its attentions."""

import re

import torch

from moonlit.losses.language_modeling import next_token_loss
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape, EncoderShape
from moonlit.optim.muon_clip import MuonClip

DECODER = DecoderShape(
    vocab_size=40, media_pad_id=39, num_layers=1, num_dense_layers=0, model_width=16,
    dense_width=24, num_experts=4, top_k=2, num_shared_experts=1, expert_width=12,
    routed_scale=1.4, num_heads=3, q_lora_rank=10, kv_lora_rank=8, qk_nope_width=6,
    qk_rope_width=4, v_width=5, max_positions=64,
)  # fmt: skip
ENCODER = EncoderShape(
    num_layers=1, width=16, mlp_width=20, num_heads=2, table_height=4, table_width=4
)


def kimi() -> Kimi:
    torch.manual_seed(0)
    return Kimi(decoder=DECODER, vision=ENCODER).train()


def backward(model: Kimi) -> float:
    """Two documents of 5 and 7 tokens; returns the summed loss."""
    torch.manual_seed(1)
    input_ids, cu_seqlens = torch.randint(39, (12,)), torch.tensor([0, 5, 12])
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])
    output = model(input_ids, position_ids, cu_seqlens)
    loss = next_token_loss(
        output.hidden_TD,
        model.language_model.lm_head.weight,
        input_ids.roll(-1),
        torch.ones(12, dtype=torch.bool),
    )
    loss.backward()
    return loss.item()


def test_every_parameter_of_the_model_has_the_algorithm_of_the_recipe():
    model = kimi()
    optimizer = MuonClip(model, lr=0.1, weight_decay=0.1, qk_clip_threshold=100.0)
    by_adamw = [
        name
        for group in optimizer.param_groups
        if group["algorithm"] == "adamw"
        for name in group["param_names"]
    ]

    others = [name for name in by_adamw if not re.search(r"norm\d?\.weight$|\.bias$", name)]

    assert sorted(others) == [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "vision_tower.patch_embed.pos_emb.weight",
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_a_real_attention_lands_on_the_threshold():
    """Catches: attributes that drift apart between the attention and QK-Clip."""
    model = kimi()
    attention = model.language_model.model.layers[0].self_attn
    attention.measure_logits = "exact"
    backward(model)
    before_H = attention.max_logits_H.clone()
    threshold = float(before_H.sort().values[1]) * (1 + 1e-6)
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip_threshold=threshold)

    optimizer.step()
    assert attention.max_logits_H.count_nonzero() == 0
    backward(model)

    assert optimizer.clipped_heads.sum() == 1
    # float32: a dot product's rounding
    torch.testing.assert_close(
        attention.max_logits_H, before_H.clamp(max=threshold), rtol=1e-5, atol=0
    )


def test_steps_lower_the_loss_on_their_own_batch():
    model = kimi()
    optimizer = MuonClip(model, lr=0.02, weight_decay=0.1, qk_clip_threshold=100.0)

    losses = []
    for _ in range(5):
        losses.append(backward(model))
        optimizer.step()
        optimizer.zero_grad()

    assert losses[-1] < 0.8 * losses[0]


def test_the_encoder_is_told_of_before_the_decoder_moves():
    """What reads the new encoder may begin while the rest is updated."""
    model = kimi()
    optimizer = MuonClip(model, lr=0.1, weight_decay=0.1, qk_clip_threshold=100.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder = {n: p for n, p in model.named_parameters() if not n.startswith("language_model")}
    moved_by_then: list[set[str]] = []

    def note() -> None:
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        moved_by_then.append(moved)

    optimizer.when_updated(encoder.values(), note)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    assert moved_by_then == [set(encoder)]
