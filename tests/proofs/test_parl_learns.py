"""PARL in its direction, on pages to be saved: the swarm is used more, and saves more of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from moonlit.report.arms import item_f1, mean, measured, read_evaluations

MOONLIT = Path(sys.executable).with_name("moonlit")
PAGES = ["min_pages=2", "max_pages=5"]


def moonlit(*words: str) -> None:
    done = subprocess.run(
        [MOONLIT, *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_trained_orchestrator_saves_more_within_the_budget(tmp_path: Path):
    """From a warm-up that mostly saves page after page, which a budget of 4 steps cuts off at 3."""
    traces, warm_up, run = (tmp_path / name for name in ("traces", "warm_up", "run"))
    shape = ["model=orchestrator", "model.decoder.vocab_size=636", "model.decoder.media_pad_id=401"]
    ours = [*shape, f"tokenizer={traces}/tokenizer"]
    moonlit(
        "prepare", "source=swarm_traces", f"source.folder={traces}", "source.num_train=400",
        "source.vocabulary=380", "source.parallel_fraction=0.3",
        *(f"source.source.{limit}" for limit in PAGES),
    )  # fmt: skip
    moonlit(
        "train", "phase=zero_vision_sft", *ours, f"data.folder={traces}", f"run_dir={warm_up}",
        f"data.data_dir={tmp_path}/data", "data.world=null", "data.rows_per_step=1",
        "optim.optimizer.lr=8e-3", "trainer.max_steps=140", "trainer.val_check_interval=140",
    )  # fmt: skip
    moonlit(
        "train", "experiment=parl_downloads", *ours, f"run_dir={run}",
        f"init_from={warm_up}/checkpoints/last.ckpt", "optim.optimizer.lr=1e-3",
        "phase.rollouts.groups_per_iteration=4", "phase.rollouts.max_new_tokens=256",
        "phase.environment.reward.parallel_weight=0.3", "phase.environment.reward.cap=2",
        "phase.environment.reward.finish_weight=0.3",
        "phase.environment.limits.max_critical_steps=4",
        "trainer.max_steps=12", "trainer.val_check_interval=12", "trainer.num_sanity_val_steps=-1",
        *(f"data.sources.downloads.{limit}" for limit in PAGES),
    )  # fmt: skip

    evaluations = read_evaluations(run)
    before, after = evaluations[0], evaluations[12]
    numbers = {
        name: (mean(before, value), mean(after, value))
        for name, value in {"f1": item_f1, "at once": measured("parallelism")}.items()
    }
    print(numbers)
    assert numbers["at once"][1] > numbers["at once"][0]
    assert numbers["f1"][1] > numbers["f1"][0] + 0.1
