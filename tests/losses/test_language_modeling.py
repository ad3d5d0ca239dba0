"""The chunked next-token loss against the plain one, values and gradients."""

import pytest
import torch

from moonlit.losses.language_modeling import (
    next_token_loss,
    next_token_loss_reference,
    token_scores,
)


def problem(dtype: torch.dtype = torch.float64):
    """Seven tokens of width 5 over 11 words; four are trained, the other targets are no words."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(7, 5).to(dtype).requires_grad_()
    weight_VD = torch.randn(11, 5).to(dtype).requires_grad_()
    loss_mask = torch.tensor([True, False, True, True, False, False, True])
    target_ids = torch.randint(11, (7,)).where(loss_mask, -100)
    return hidden_TD, weight_VD, target_ids, loss_mask


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 100])
def test_value_and_gradients_equal_the_plain_loss(chunk_tokens: int):
    """Catches: a chunk dropped, an unmasked row trained, the upstream factor forgotten."""
    hidden_TD, weight_VD, target_ids, loss_mask = problem()

    ours = next_token_loss(hidden_TD, weight_VD, target_ids, loss_mask, chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(ours / 3 + ours, [hidden_TD, weight_VD])

    plain = next_token_loss_reference(hidden_TD, weight_VD, target_ids, loss_mask)
    plain_grads = torch.autograd.grad(plain / 3 + plain, [hidden_TD, weight_VD])
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)  # float64: order of sums
    torch.testing.assert_close(grads, plain_grads, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    hidden_TD, weight_VD, target_ids, loss_mask = problem()

    assert torch.autograd.gradcheck(
        lambda h, w: next_token_loss(h, w, target_ids, loss_mask, chunk_tokens=3),
        (hidden_TD, weight_VD),
    )


def test_an_empty_mask_gives_zero_and_zero_gradients():
    hidden_TD, weight_VD, target_ids, loss_mask = problem()

    loss = next_token_loss(hidden_TD, weight_VD, target_ids, torch.zeros_like(loss_mask))
    loss.backward()

    assert loss.item() == 0.0
    assert hidden_TD.grad.count_nonzero() == weight_VD.grad.count_nonzero() == 0


def test_bf16_errs_as_little_as_the_plain_loss_in_bf16():
    """Both against float64 on the same rounded inputs; ours adds the chunks' gradients in fp32."""
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(300, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    target_ids, loss_mask = torch.randint(40, (300,)), torch.rand(300) < 0.8

    def loss_and_grads(loss, dtype):
        leaves = [hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_()]
        value = loss(*leaves, target_ids, loss_mask)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    truth = loss_and_grads(next_token_loss_reference, torch.float64)
    plain = loss_and_grads(next_token_loss_reference, torch.bfloat16)
    ours = loss_and_grads(lambda *args: next_token_loss(*args, chunk_tokens=64), torch.bfloat16)

    assert ours[0].dtype == torch.float32
    for exact, trusted, value in zip(truth, plain, ours, strict=True):
        error, allowed = (value - exact).abs().max(), (trusted - exact).abs().max()
        # twice: ours rounds each chunk's product to bf16 before it is added in fp32
        assert error <= 2 * allowed


def test_autocast_changes_the_products_and_no_dtype():
    torch.manual_seed(0)
    leaves = [torch.randn(30, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)]
    target_ids, loss_mask = torch.randint(40, (30,)), torch.rand(30) < 0.8

    def loss_and_grads():
        value = next_token_loss(*leaves, target_ids, loss_mask)
        return [value, *torch.autograd.grad(value, leaves)]

    exact = loss_and_grads()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_grads()

    for value, expected in zip(ours, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int):
    hidden_TD, weight_VD, target_ids, loss_mask = problem()
    leaves = [hidden_TD, weight_VD]
    leaves[frozen].requires_grad_(False)

    next_token_loss(*leaves, target_ids, loss_mask).backward()

    plain = next_token_loss_reference(*leaves, target_ids, loss_mask)
    (expected,) = torch.autograd.grad(plain, leaves[1 - frozen])
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, expected, rtol=1e-12, atol=1e-14)


def test_no_logits_of_the_whole_microbatch_exist():
    """The largest tensor saved or made is a chunk's logits or the head's gradient."""
    hidden_TD, weight_VD = torch.randn(512, 4), torch.randn(64, 4)
    target_ids, loss_mask = torch.randint(64, (512,)), torch.ones(512, dtype=torch.bool)
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with LargestTensor():
        next_token_loss(*leaves, target_ids, loss_mask, chunk_tokens=16).backward()

    assert largest == 512 * 4  # the hidden states' gradient; all logits would be 512 * 64


def test_scores_add_up_to_the_loss_and_find_the_likeliest_token():
    hidden_TD, weight_VD, target_ids, loss_mask = problem()
    best_T = (hidden_TD @ weight_VD.T).argmax(-1)
    target_ids[3] = best_T[3]
    target_ids[6] = (best_T[6] + 1) % 11

    logprobs_T, is_top1_T = token_scores(
        hidden_TD, weight_VD, target_ids, loss_mask, chunk_tokens=3
    )

    loss = next_token_loss(hidden_TD, weight_VD, target_ids, loss_mask)
    torch.testing.assert_close(-logprobs_T.sum(), loss, rtol=1e-12, atol=0)  # float64
    assert logprobs_T[~loss_mask].count_nonzero() == 0
    assert (is_top1_T[3].item(), is_top1_T[6].item()) == (True, False)
    assert not is_top1_T[~loss_mask].any()
    assert not logprobs_T.requires_grad


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        next_token_loss(*problem(), chunk_tokens=0)
