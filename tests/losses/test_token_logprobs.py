"""Log-probabilities in chunks against those of all logits at once."""

import pytest
import torch

from moonlit.losses.token_logprobs import token_logprobs


@pytest.mark.parametrize("chunk_tokens", [2, 100])
@pytest.mark.parametrize(("temperature", "banned_ids"), [(1.0, []), (0.6, [0, 11])])
def test_log_probs_in_chunks_equal_those_of_all_logits(
    chunk_tokens: int, temperature: float, banned_ids: list[int]
):
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 11, (7,))
    mask = torch.tensor([True, False, True, True, False, True, True])
    upstream = torch.randn(7, dtype=torch.float64)

    logprobs, entropy = token_logprobs(
        hidden, weight, targets, mask,
        temperature=temperature, banned_ids=banned_ids, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))

    allowed = [i for i in range(12) if i not in banned_ids]
    all_logprobs = torch.full((7, 12), -torch.inf, dtype=torch.float64)
    all_logprobs[:, allowed] = (hidden @ weight.T / temperature)[:, allowed].log_softmax(-1)
    wanted = all_logprobs.gather(-1, targets[:, None])[:, 0] * mask
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads, wanted_grads, rtol=0, atol=1e-12)
    plain_entropy = -(all_logprobs.exp() * all_logprobs)[:, allowed].sum(-1) * mask
    torch.testing.assert_close(entropy, plain_entropy, rtol=0, atol=1e-12)
    assert not entropy.requires_grad


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, requires_grad=True)
    weight, targets = torch.randn(12, 8), torch.randint(12, (5,))
    mask = torch.ones(5, dtype=torch.bool)

    def gradient(head: torch.Tensor) -> torch.Tensor:
        logprobs, _ = token_logprobs(hidden, head, targets, mask, chunk_tokens=2)
        return torch.autograd.grad(logprobs.sum(), hidden)[0]

    assert gradient(weight).equal(gradient(weight.clone().requires_grad_()))


def test_autocast_takes_the_products_of_both_passes_in_its_dtype():
    """Where the backward pass left autocast, its chunks would have other logits."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 64, requires_grad=True)
    weight = torch.randn(96, 64, requires_grad=True)
    targets, mask = torch.randint(96, (6,)), torch.ones(6, dtype=torch.bool)

    def gradients(chunk_tokens: int) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, _ = token_logprobs(hidden, weight, targets, mask, chunk_tokens=chunk_tokens)
        assert logprobs.dtype == torch.float32
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    # One chunk keeps its probabilities, three make those of two again.
    torch.testing.assert_close(gradients(2)[0], gradients(6)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients(2)[1], gradients(6)[1], rtol=0, atol=0.1)


def test_a_certain_token_has_no_entropy():
    hidden = torch.tensor([[100.0, 0.0]])
    _, entropy = token_logprobs(hidden, torch.eye(2), torch.tensor([0]), torch.tensor([True]))
    assert entropy.item() == 0
