"""How many encoded patches may keep their autograd graph until the backbone is done.

``auto`` measures: what a patch's graph holds (bytes that autograd saves beside the weights), and
what the backbone of earlier steps needed on top of what was there before it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SPARED = 0.1
"""Fraction of the free memory that is never planned with; ours."""


class GraphMemory:
    """Decides chunk by chunk whether a graph is kept.

    Until one backbone has been measured ``auto`` recomputes, as ``always`` does.

    Args:
        recompute: ``always``, ``never`` or ``auto``.
        device: where the encoder runs.
    """

    def __init__(self, recompute: str, device: torch.device) -> None:
        self.recompute, self.device = recompute, device
        self.bytes_per_patch: float | None = None
        self.backbone_bytes: float | None = None
        self.left_bytes = 0.0
        self.before_bytes = 0

    def step_begins(self) -> None:
        """Count what is free now, less what the backbone will need."""
        if self.recompute == "auto" and self.backbone_bytes is not None:
            free = free_bytes(self.device)
            self.left_bytes = (1 - SPARED) * free - self.backbone_bytes

    def allows(self, num_patches: int) -> bool:
        """Say whether a chunk of so many patches may keep its graph, and count it if so."""
        if self.recompute != "auto":
            return self.recompute == "never"
        if self.bytes_per_patch is None or self.backbone_bytes is None:
            return False
        needed = num_patches * self.bytes_per_patch
        if needed > self.left_bytes:
            return False
        self.left_bytes -= needed
        return True

    @contextmanager
    def measured(self, num_patches: int, keeps_graph: bool) -> Iterator[None]:
        """Measure the first chunk's graph: built on purpose where it would not be kept."""
        if self.recompute != "auto" or self.bytes_per_patch is not None:
            yield
            return
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not tensor.is_leaf or not tensor.requires_grad:
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            yield
        self.bytes_per_patch = sum(saved.values()) / max(num_patches, 1)

    def backbone_begins(self) -> None:
        """Note the memory in use before the backbone."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before_bytes = torch.cuda.memory_allocated(self.device)

    def backbone_ends(self) -> None:
        """Remember the most that a backbone has needed. A CPU's is not measured: see ``SPARED``."""
        grown = 0
        if self.device.type == "cuda":
            grown = torch.cuda.max_memory_allocated(self.device) - self.before_bytes
        self.backbone_bytes = max(self.backbone_bytes or 0.0, float(grown))


def free_bytes(device: torch.device) -> float:
    """Return what this process may still take [bytes]; on a CPU half its share of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return available_kib * 1024 / processes / 2  # the backbone's need is not measured here
