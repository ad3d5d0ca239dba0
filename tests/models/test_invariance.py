"""What must not change a result: packing, batching, the choice of experts, of attention mode."""

import pytest
import torch

from moonlit.batch import PackedMedia
from moonlit.models.attention_logits import max_logits
from moonlit.models.segment_attention import (
    attention_named,
    block_diagonal_mask,
    sdpa_attention,
)
from moonlit.models.segments import Segments
from tests.models.shapes import (
    DECODER,
    ENCODER,
    MEDIA_PAD_ID,
    document,
    packed,
    random_media,
    tiny_model,
)

FP32 = 1e-5  # the same sums, grouped otherwise
GRIDS = [[(1, 2, 4), (3, 4, 2)], [], [(1, 6, 2)]]


def test_packed_equals_one_by_one():
    """Catches: attention or positions that leak over a boundary, features given to another item."""
    model = tiny_model()
    documents = [
        document(num_text, grids) for num_text, grids in zip((9, 5, 9), GRIDS, strict=True)
    ]
    media = [random_media(grids) for grids in GRIDS]
    together = PackedMedia(
        pixel_values=torch.cat([item.pixel_values for item in media]),
        grid_thw=torch.cat([item.grid_thw for item in media]),
    )

    hidden = model(**packed(documents), features=model.encode_media(together)).hidden_TD

    alone = [
        model(**packed([ids]), features=model.encode_media(item) if grids else None).hidden_TD
        for ids, item, grids in zip(documents, media, GRIDS, strict=True)
    ]
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=0, atol=FP32)


def test_no_gradient_flows_from_later_tokens_or_other_documents():
    model = tiny_model()
    row = packed([torch.arange(4), torch.arange(10, 16)])  # all ids differ: rows = tokens

    model.logits(model(**row).hidden_TD)[6].sum().backward()  # third token of the second document

    gradient = model.language_model.model.embed_tokens.weight.grad.norm(dim=1)
    assert gradient[[10, 11, 12]].min() > 0
    assert gradient[[0, 1, 2, 3, 13, 14, 15]].max() == 0


def test_grouped_experts_equal_the_reference():
    """Catches: rows returned in dispatch order, a weight on the wrong copy, an idle expert."""
    grouped, reference = tiny_model(), tiny_model(experts="reference")
    row = packed([torch.randint(0, MEDIA_PAD_ID, (19,))])
    for model in (grouped, reference):
        for layer in model.language_model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[3] = -9.0  # nobody goes there

    hidden = [model(**row).hidden_TD for model in (grouped, reference)]
    for output in hidden:
        output.square().sum().backward()

    torch.testing.assert_close(*hidden, rtol=0, atol=FP32)
    for (name, ours), theirs in zip(
        grouped.named_parameters(), reference.parameters(), strict=True
    ):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    for name, parameter in grouped.named_parameters():
        if "experts.w_" in name:
            assert parameter.grad[3].abs().max() == 0


def test_recomputed_layers_equal_kept_ones_and_count_once():
    """Catches: a load or a largest logit counted twice, another routing the second time."""
    kept, recomputed = tiny_model(), tiny_model()
    row = packed([torch.randint(0, MEDIA_PAD_ID, (length,)) for length in (7, 12)])
    for model in (kept, recomputed):
        model.train()
        for layer in model.language_model.model.layers:
            layer.self_attn.measure_logits = "exact"
            layer.recompute = model is recomputed
        output = model(**row)
        (output.hidden_TD.square().sum() + output.load_balance_loss).backward()

    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(recomputed.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_recomputation_keeps_less_for_the_backward_pass():
    def kept_bytes(*, recompute: bool) -> int:
        model = tiny_model().train()
        for layer in model.language_model.model.layers:
            layer.recompute = recompute
        sizes: list[int] = []
        row = packed([torch.randint(0, MEDIA_PAD_ID, (200,))])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            model(**row)
        return sum(sizes)

    assert kept_bytes(recompute=True) < kept_bytes(recompute=False) / 5


@pytest.mark.parametrize("causal", [True, False])
def test_segment_attention_equals_the_naive_formula(causal: bool):
    """Catches: a wrong run of equal lengths, a leak, the padded value columns."""
    lengths = (3, 3, 7, 1, 3)
    q, k = torch.randn(2, 17, 2, 5, dtype=torch.float64)
    v = torch.randn(17, 2, 4, dtype=torch.float64)

    out = sdpa_attention(q, k, v, Segments(lengths), causal=causal, scale=0.7)

    segment = Segments(lengths).segment_of_token(q.device)
    seen = segment[:, None] == segment
    seen = seen.tril() if causal else seen
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(0.7).masked_fill(~seen, -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_of_xformers_keeps_tokens_inside_their_segment(causal: bool):
    pytest.importorskip("xformers", reason="installed with the extra `cuda`")
    segments = Segments((3, 1, 5))

    mask = block_diagonal_mask(segments, causal=causal, device=torch.device("cpu"))

    segment = segments.segment_of_token(torch.device("cpu"))
    seen = segment[:, None] == segment
    assert torch.equal(mask.materialize((9, 9)) == 0, seen.tril() if causal else seen)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_xformers_equals_sdpa(causal: bool, dtype: torch.dtype, atol: float):
    """Tolerance: TF32 is off; bf16 outputs are below 2, where its step is 2^-7."""
    segments = Segments((130, 64, 64, 7))
    q, k = torch.randn(2, 265, 4, 48, device="cuda", dtype=dtype)
    v = torch.randn(265, 4, 32, device="cuda", dtype=dtype)
    settings = {"segments": segments, "causal": causal, "scale": 0.2}

    out = attention_named("xformers")(q, k, v, **settings)

    torch.testing.assert_close(out, sdpa_attention(q, k, v, **settings), rtol=0, atol=atol)


def test_max_logits_equal_the_full_score_matrix(monkeypatch: pytest.MonkeyPatch):
    """Catches: a block edge, a future key, another document's key, the scale."""
    monkeypatch.setattr("moonlit.models.attention_logits.BLOCK", 4)
    lengths = (11, 1, 6)
    q, k = torch.randn(2, 18, 3, 5)

    largest = max_logits(q, k, Segments(lengths), scale=0.3)

    segment = Segments(lengths).segment_of_token(q.device)
    seen = (segment[:, None] == segment).tril()
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(0.3).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(largest, scores.amax((1, 2)), rtol=0, atol=1e-6)  # fp32 dot products


def test_bounded_measurement_is_exact_above_the_threshold_and_a_bound_below():
    model = tiny_model().train()
    attention = model.language_model.model.layers[0].self_attn
    rows = [packed([torch.randint(0, MEDIA_PAD_ID, (length,))]) for length in (8, 5)]

    def measured(mode: str, threshold: float) -> torch.Tensor:
        attention.measure_logits, attention.logit_threshold = mode, threshold
        attention.reset_max_logits()
        for row in rows:
            model(**row)
        return attention.max_logits_H.clone()

    assert measured("off", 0.0).max() == 0
    exact, bounds = measured("exact", 0.0), measured("bounded", torch.inf)
    threshold = exact.sort().values[1].item()
    bounded = measured("bounded", threshold)

    assert (bounds > exact).all()
    above = exact > threshold
    assert above.tolist().count(True) == 1
    assert torch.equal(bounded[above], exact[above])
    assert (bounded[~above] <= threshold).all()


def test_media_is_refused_where_it_does_not_fit():
    model = tiny_model()
    ids = document(5, [(1, 2, 4)])

    with pytest.raises(ValueError, match="2 media placeholder tokens but got 3 vision features"):
        model(**packed([ids]), features=torch.randn(3, DECODER.model_width))
    with pytest.raises(ValueError, match=r"2 media placeholder tokens but got 0"):
        model(**packed([ids]))
    with pytest.raises(ValueError, match=r"multiples of 2, got \(1, 3, 4\)"):
        model.encode_media(random_media([(1, 3, 4)]))
    with pytest.raises(ValueError, match=r"1 to 4 frames .* got \(5, 2, 2\)"):
        model.encode_media(random_media([(5, 2, 2)]))
    row = packed([torch.arange(7)]) | {"cu_seqlens": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the row's 7 tokens"):
        model(**row)


def test_attention_is_chosen_by_name():
    q = torch.randn(4, ENCODER.num_heads, 8)

    with pytest.raises(ValueError, match="attention must be one of"):
        attention_named("flash")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        attention_named("xformers")(q, q, q, Segments((4,)), causal=True, scale=1.0)
