"""Every way to run the experts against one token, one expert, one multiplication at a time."""

import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonlit.models.moe import megablocks_experts, megablocks_kernels
from moonlit.models.moe.experts import Experts
from moonlit.models.moe.layer import EXPERTS

needs_megablocks = pytest.mark.skipif(
    find_spec("megablocks") is None, reason="run `make megablocks`"
)
BACKENDS = ["reference", "grouped_mm", pytest.param("megablocks", marks=needs_megablocks)]

UNEVEN = [[0, 3], [3, 0], [3, 4], [0, 3], [4, 3], [3, 0], [0, 4]]  # experts 1 and 2 are idle
ONE_GETS_ALL = [[2]] * 6


def experts_one_token_at_a_time(
    experts: Experts, x: Tensor, weights: Tensor, expert_ids: Tensor
) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], expert_ids[t], strict=True):
            gate, up = x[t] @ experts.w_gate_EDF[e], x[t] @ experts.w_up_EDF[e]
            row = row + weight * ((F.silu(gate) * up) @ experts.w_down_EFD[e])
        rows.append(row)
    return torch.stack(rows)


def output_and_gradients(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    experts: Experts,
    inputs: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    x, weights, expert_ids = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    y = run(x, weights, expert_ids)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)).sum().backward()
    named = {name: p.grad for name, p in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | named


def routed_inputs(routing: list[list[int]], *, model_width: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_ids = torch.tensor(routing)
    return torch.randn(len(routing), model_width), torch.rand(expert_ids.shape), expert_ids


def built(backend: str, *, seed: int = 0, expert_width: int = 12) -> Experts:
    torch.manual_seed(seed)
    experts = EXPERTS[backend](model_width=8, expert_width=expert_width, num_experts=5)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return experts


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_bf16_and_adds_in_fp32(backend: str):
    """As for weights that are bf16 themselves; a CUDA grouped product knows nothing else."""
    experts = built(backend, expert_width=16)  # rows of bf16 products are multiples of 16 bytes
    x, weights, expert_ids = routed_inputs(UNEVEN, model_width=8)

    with torch.autocast("cpu", torch.bfloat16):
        ours = experts(x, weights, expert_ids)
        assert {stack.dtype for stack in experts.stacks} == {torch.bfloat16}
    exact = experts(x, weights, expert_ids)

    assert ours.dtype == torch.float32
    error = (ours - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2  # bf16 has three digits


@pytest.mark.parametrize("routing", [UNEVEN, ONE_GETS_ALL], ids=["uneven", "one gets all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_every_gradient_equal_the_naive_loop(backend: str, routing: list[list[int]]):
    """Catches: rows returned in dispatch order, an idle expert skipped, gate and up swapped."""
    experts = built(backend)
    inputs = routed_inputs(routing, model_width=8)

    ours = output_and_gradients(experts, experts, inputs)
    naive = output_and_gradients(
        lambda *routed: experts_one_token_at_a_time(experts, *routed), experts, inputs
    )

    for name, expected in naive.items():  # float32: only the order of sums differs
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_gives_no_row_and_zero_gradients(backend: str):
    """An expert-parallel rank may receive nothing; its weights still take part in the step."""
    experts = built(backend)
    nothing = torch.empty(0, 8), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64)

    found = output_and_gradients(experts, experts, nothing)

    assert found["y"].shape == (0, 8)
    assert all(found[name].eq(0).all() for name, _ in experts.named_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_the_parameters_of_the_reference(backend: str):
    names = {name: p.shape for name, p in built(backend).state_dict().items()}

    assert names == {n: p.shape for n, p in built("reference").state_dict().items()}
    assert len(list(built(backend).modules())) == 1


@needs_megablocks
def test_megablocks_multiplies_with_our_weights_and_keeps_none():
    """Catches: a copy of the weights, or a layer that still holds those of another."""
    experts, other = built("megablocks"), built("megablocks", seed=1)
    inputs = routed_inputs(UNEVEN, model_width=8)
    before, elsewhere = experts(*inputs), other(*inputs)

    with torch.no_grad():
        experts.w_up_EDF.mul_(2)

    torch.testing.assert_close(experts(*inputs), 2 * before, rtol=1e-5, atol=1e-5)
    assert torch.equal(other(*inputs), elsewhere)


def test_without_megablocks_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(megablocks_experts, "find_spec", lambda package: None)
    megablocks_experts._import_megablocks.cache_clear()

    with pytest.raises(ModuleNotFoundError, match="megablocks and stk: run `make megablocks`"):
        built("megablocks")


@needs_megablocks
def test_on_a_cpu_without_the_interpreter_the_error_names_the_choices(
    monkeypatch: pytest.MonkeyPatch,
):
    experts = built("megablocks")
    monkeypatch.delenv("TRITON_INTERPRET")

    with pytest.raises(RuntimeError, match=r"megablocks needs CUDA.*grouped_mm.*TRITON_INTERPRET"):
        experts(*routed_inputs(UNEVEN, model_width=8))


def test_a_compiled_extension_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    for name in ("megablocks_ops", "grouped_gemm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(
        megablocks_kernels, "find_spec", lambda name: "found" if name == "grouped_gemm" else None
    )

    megablocks_kernels.stand_in_where_not_compiled()

    assert "grouped_gemm" not in sys.modules
    assert sys.modules["megablocks_ops"].histogram is megablocks_kernels.histogram
    monkeypatch.delitem(sys.modules, "megablocks_ops")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped_mm", "megablocks"])
def test_in_bf16_on_a_gpu_the_error_is_that_of_the_reference(backend: str):
    """Both against float64; ours may err as much as the readable experts do, and a quarter more."""
    torch.manual_seed(0)
    sizes = {"model_width": 256, "expert_width": 192, "num_experts": 16}
    exact = Experts(**sizes).double().cuda()
    x, weights = torch.randn(500, 256).cuda(), torch.rand(500, 4).cuda()
    expert_ids = torch.rand(500, 16).square().topk(4).indices.cuda()
    inputs = x.bfloat16(), weights, expert_ids
    truth = output_and_gradients(exact, exact, (inputs[0].double(), weights.double(), expert_ids))

    def errors(name: str) -> dict[str, float]:
        experts = EXPERTS[name](**sizes).cuda()
        experts.load_state_dict(exact.state_dict())
        experts.bfloat16()
        found = output_and_gradients(experts, experts, inputs)
        return {k: ((found[k] - v).norm() / v.norm()).item() for k, v in truth.items()}

    ours, reference = errors(backend), errors("reference")

    for name, error in ours.items():
        assert error < 1.25 * reference[name], (name, error, reference[name])
