"""The GPU benchmark runs from end to end, with tiny sizes where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_gpu_benchmark_fills_every_table():
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--rounds", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    for expected in ("| kimi_k2_5, 2 layers |", "| skewed | grouped_mm |", "| sdpa |"):
        assert expected in ran.stdout
    assert "not run" not in ran.stdout
