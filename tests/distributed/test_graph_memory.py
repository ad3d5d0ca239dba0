"""``recompute: auto``: graphs are kept where the measured memory allows, and nowhere else."""

import pytest
import torch
from parallel_run import exact_model, step_rows
from ranks import Ranks

from moonlit.distributed.decoupled_encoder import DecoupledEncoder
from moonlit.distributed.graph_memory import SPARED, GraphMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("recompute", "keeps"), [("always", False), ("never", True)])
def test_what_is_said_is_done_whatever_is_free(
    recompute: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moonlit.distributed.graph_memory.free_bytes", lambda device: 0.0)
    memory = GraphMemory(recompute, CPU)
    memory.step_begins()
    assert memory.allows(10**9) is keeps


def measured_memory() -> GraphMemory:
    """After one step whose only chunk had eight patches."""
    memory = GraphMemory("auto", CPU)
    first, second = (torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2))
    memory.step_begins()
    assert not memory.allows(8)  # nothing is known yet
    with torch.set_grad_enabled(False), memory.measured(8, keeps_graph=False):
        (torch.randn(8, 16) @ first).relu() @ second
    assert not memory.allows(8)  # nor is what the backbone needs
    memory.backbone_begins()
    memory.backbone_ends()
    return memory


def test_a_patch_costs_what_autograd_saves_beside_the_weights():
    """What goes into both products, 8 x 16 fp32 each, but not the second one's weight."""
    assert measured_memory().bytes_per_patch == 2 * 16 * 4


def test_chunks_keep_their_graphs_until_the_free_memory_is_used(monkeypatch: pytest.MonkeyPatch):
    memory = measured_memory()
    room = 20 * 128 / (1 - SPARED) + 1  # for twenty patches
    monkeypatch.setattr("moonlit.distributed.graph_memory.free_bytes", lambda device: room)
    for _ in range(2):  # each step begins anew
        memory.step_begins()
        assert [memory.allows(patches) for patches in (12, 9, 8, 1)] == [True, False, True, False]


def test_what_the_backbone_has_needed_stays_free(monkeypatch: pytest.MonkeyPatch):
    memory = measured_memory()
    monkeypatch.setattr("moonlit.distributed.graph_memory.free_bytes", lambda device: 2000.0)
    memory.backbone_bytes = 2000.0
    memory.step_begins()
    assert not memory.allows(1)


def encodings() -> dict[str, list[float]]:
    """How often each chunk is encoded in three steps, by setting."""
    counts: dict[str, list[float]] = {}
    for recompute in ("always", "never", "auto"):
        model, rows = exact_model(torch.float32), step_rows(0)[torch.distributed.get_rank() :: 2]
        encoder = DecoupledEncoder(
            model, group=torch.distributed.group.WORLD, holds_rows=True, recompute=recompute,
            patch_budget=20, overlap=False, coming=lambda: None,
        )  # fmt: skip
        calls, encode_media = [], model.encode_media

        def counted(media, calls=calls, encode_media=encode_media):
            calls.append(torch.is_grad_enabled())
            return encode_media(media)

        model.encode_media = counted  # pyright: ignore[reportAttributeAccessIssue]
        counts[recompute] = []
        for _ in range(3):
            calls.clear()
            with encoder.around(rows) as leaves:
                torch.cat([leaf for leaf in leaves if leaf is not None]).sum().backward()
            counts[recompute].append(len(calls))
    never = counts["never"]
    return {
        name: [n / once for n, once in zip(some, never, strict=True)]
        for name, some in counts.items()
    }


def test_a_kept_graph_is_not_encoded_again(two_ranks: Ranks):
    """Automatically from the second step on, once a step has been measured."""
    for counts in two_ranks(encodings):
        assert counts == {"always": [2, 2, 2], "never": [1, 1, 1], "auto": [2, 1, 1]}
