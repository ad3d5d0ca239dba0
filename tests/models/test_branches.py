"""Branches: documents that continue one prefix give what a copy of it for each would."""

import pytest
import torch

from moonlit.batch import PackedBatch
from moonlit.models.attention_logits import max_logits
from moonlit.models.cache import LatentCache
from moonlit.models.segment_attention import block_diagonal_mask, sdpa_attention
from moonlit.models.segments import Segments
from moonlit.models.stages import keep_layers
from tests.models.shapes import DECODER, document, packed, random_media, tiny_model


def dense_attention(q, k, v, seen, scale: float) -> torch.Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def seen_by_branches(segments: Segments) -> torch.Tensor:
    """Who sees whom, from the definition: own segment up to oneself, and all of the prefix."""
    segment = segments.segment_of_token(torch.device("cpu"))
    prefix = torch.tensor(segments.prefixes)[segment]
    return (segment[:, None] == segment).tril() | (prefix[:, None] == segment)


BRANCHES = Segments((3, 4, 2, 2, 5, 3, 9, 3), (-1, -1, 1, 1, 1, -1, 5, -1))


@pytest.mark.parametrize("branch_tokens", [4, 256])
def test_a_branch_sees_its_prefix_and_itself(branch_tokens: int, monkeypatch: pytest.MonkeyPatch):
    """Catches: a branch that sees its sibling, half of the prefix, or another document."""
    monkeypatch.setattr("moonlit.models.segments.BRANCH_TOKENS", branch_tokens)
    q, k = torch.randn(2, 31, 2, 5, dtype=torch.float64)
    v = torch.randn(31, 2, 4, dtype=torch.float64)

    out = sdpa_attention(q, k, v, BRANCHES, causal=True, scale=0.7)

    expected = dense_attention(q, k, v, seen_by_branches(BRANCHES), 0.7)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)  # float64


def test_the_mask_of_xformers_shows_branches_their_prefix():
    pytest.importorskip("xformers", reason="installed with the extra `cuda`")
    mask = block_diagonal_mask(BRANCHES, causal=True, device=torch.device("cpu"))

    num_keys = sum(len(tokens) for tokens in BRANCHES.seen)
    dense = mask.materialize((31, num_keys)) == 0
    gathered = torch.tensor([token for tokens in BRANCHES.seen for token in tokens])
    together = torch.zeros(31, 31, dtype=torch.int64).index_add_(1, gathered, dense.long())
    assert torch.equal(together, seen_by_branches(BRANCHES).long())


def test_max_logits_count_a_branch_and_its_prefix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moonlit.models.attention_logits.BLOCK", 4)
    for _ in range(8):  # the largest lies elsewhere each time
        q, k = torch.randn(2, 31, 3, 5)
        scores = torch.einsum("ihd,jhd->hij", q, k).mul(0.3)
        expected = scores.masked_fill(~seen_by_branches(BRANCHES), -torch.inf).amax((1, 2))
        torch.testing.assert_close(
            max_logits(q, k, BRANCHES, scale=0.3), expected, rtol=0, atol=1e-6
        )


def test_a_prefix_once_gives_the_gradients_of_a_copy_for_each_branch():
    """The whole model, experts and pictures included, in float64."""
    model = tiny_model(experts="reference").double().train()
    prefix, branches = document(6, [(1, 2, 4)]), [document(n, []) for n in (3, 1, 3, 5)]
    media = random_media([(1, 2, 4)])
    weights = [torch.randn(len(b), DECODER.model_width, dtype=torch.float64) for b in branches]

    def outcome(shared: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad()
        features = model.encode_media(media)
        if shared:
            row = packed([prefix, *branches]) | {
                "prefix_of_document": torch.tensor([-1, 0, 0, 0, 0])
            }
            positions = [
                torch.arange(len(prefix)),
                *(len(prefix) + torch.arange(len(b)) for b in branches),
            ]
            row["position_ids"] = torch.cat(positions)
            hidden = model(**row, features=features).hidden_TD.split(
                [len(prefix), *map(len, branches)]
            )[1:]
        else:
            whole = [torch.cat([prefix, b]) for b in branches]
            rows = model(**packed(whole), features=features.repeat(len(branches), 1)).hidden_TD
            hidden = [row[len(prefix) :] for row in rows.split([len(ids) for ids in whole])]
        torch.stack([(h * w).sum() for h, w in zip(hidden, weights, strict=True)]).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [h.detach() for h in hidden], gradients

    hidden, gradients = outcome(shared=True)
    copies, copied_gradients = outcome(shared=False)

    torch.testing.assert_close(hidden, copies, rtol=0, atol=1e-10)
    assert gradients.keys() == copied_gradients.keys()
    assert any(name.startswith("vision_tower") for name in gradients)
    for name, gradient in gradients.items():  # rotations are in fp32
        atol = 1e-7 * float(gradient.abs().max()) + 1e-12
        torch.testing.assert_close(gradient, copied_gradients[name], rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("prefixes", [[0, -1, -1], [-1, 1, -1], [-1, -1, 0], [-1, 0, 1], [-1, 0]])
def test_a_prefix_that_does_not_stand_before_its_branches_is_refused(prefixes: list[int]):
    row = packed([torch.arange(1, 4), torch.arange(1, 3), torch.arange(1, 3)])
    with pytest.raises(ValueError, match="each must name the one right before"):
        tiny_model()(**row, prefix_of_document=torch.tensor(prefixes))


def test_a_cache_takes_no_branches():
    row = packed([torch.arange(1, 4), torch.arange(1, 3)])
    cache = LatentCache(DECODER)
    with pytest.raises(ValueError, match="a latent cache has no branches"):
        tiny_model()(**row, cache=cache, prefix_of_document=torch.tensor([-1, 0]))


def test_a_stage_of_a_pipeline_sees_branches_too():
    model = tiny_model().eval()
    rows = packed([torch.arange(1, 8), torch.arange(3, 5), torch.arange(5, 9)])
    prefixes = torch.tensor([-1, 0, 0])
    whole = model(**rows, prefix_of_document=prefixes).hidden_TD
    batch = PackedBatch(
        **rows,
        target_ids=rows["input_ids"],
        loss_mask=torch.ones(13, dtype=torch.bool),
        prefix_of_document=prefixes,
    )
    (stage,) = keep_layers(model, [range(DECODER.num_layers)])

    hidden, _ = stage(batch, None, None, None)

    assert torch.equal(hidden, whole)
    assert not torch.allclose(whole, model(**rows).hidden_TD)
