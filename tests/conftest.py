import os

import pytest
import torch

SECOND_PASS = "shape checks are on; run: pytest -m compile -o addopts=--strict-markers"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
torch.set_num_threads(1)  # a second thread spins at every tiny op: 60x slower on a busy machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here: GPU tests without one, torch.compile while jaxtyping is on."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--jaxtyping-packages"):
        return
    for item in items:
        if item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.skip(reason=SECOND_PASS))
