"""What ``make train`` promises, on half of its steps: it learns to see, not blindly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MOONLIT = Path(sys.executable).with_name("moonlit")


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Held-out scores of the default run, 260 of its 520 steps."""
    folder = tmp_path_factory.mktemp("default_run")
    words = ["train", f"run_dir={folder}/run", f"data.data_dir={folder}/data"]
    words += ["trainer.max_steps=260", "trainer.val_check_interval=260"]
    done = subprocess.run(
        [MOONLIT, *words], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)  # the closing table, shown by pytest -s
    metrics = json.loads((folder / "run" / "held_out.json").read_text())
    return {name.removeprefix("held_out/"): value for name, value in metrics.items()}


@pytest.mark.slow
def test_counting_is_learnt_and_needs_the_picture(scores: dict[str, float]):
    assert scores["counting/accuracy"] > 0.6
    assert scores["counting_blind/accuracy"] < 0.4  # one of six is 17 %
    assert scores["counting_blind/nll_per_token"] > scores["counting/nll_per_token"] + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colours", "unseen_pairs"])
def test_attributes_are_named_better_than_blind(scores: dict[str, float], name: str):
    assert scores[f"{name}/accuracy"] > scores[f"{name}_blind/accuracy"] + 0.1
    assert scores[f"{name}/nll_per_token"] < scores[f"{name}_blind/nll_per_token"]


@pytest.mark.slow
def test_shapes_begin_to_be_told_apart(scores: dict[str, float]):
    assert scores["shapes/nll_per_token"] < scores["shapes_blind/nll_per_token"] - 0.02


@pytest.mark.slow
def test_text_is_learnt_beside_it(scores: dict[str, float]):
    assert scores["docs/nll_per_token"] < 5.3  # a fresh model gives ln 2304 = 7.74
