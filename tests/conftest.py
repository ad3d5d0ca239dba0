import os
import time
from datetime import date

import pytest
import torch

SECOND_PASS = "shape checks are on; run: pytest -m compile -o addopts=--strict-markers"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
torch.set_num_threads(1)  # a second thread spins at every tiny op: 60x slower on a busy machine


BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget", type=float, metavar="S",
        help="start no slow or slurm test after so many seconds; begin with other files each day",
    )  # fmt: skip


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget_s = item.config.getoption("--budget")
    is_slow = item.get_closest_marker("slow") or item.get_closest_marker("slurm")
    if budget_s is not None and is_slow and time.monotonic() - BEGAN > budget_s:
        pytest.skip(f"not begun: --budget={budget_s:g} is spent")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here: GPU tests without one, torch.compile while jaxtyping is on."""
    if config.getoption("--budget") is not None:
        files = sorted({item.path for item in items})
        first = date.today().toordinal() % max(1, len(files))
        order = {path: (n - first) % len(files) for n, path in enumerate(files)}
        items.sort(key=lambda item: order[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--jaxtyping-packages"):
        return
    for item in items:
        if item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.skip(reason=SECOND_PASS))
