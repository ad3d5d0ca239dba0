"""One real cluster for all tests of this folder, and jobs small enough for it."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).parents[2]
PICTURES = {
    "counting": 40, "attributes": 20, "captions": 8, "grounding": 8, "digits": 8, "puzzles": 8,
    "clips": 4, "pages": 2,
}  # fmt: skip
SMALL = [
    "trainer=cpu", "trainer.log_every_n_steps=1", "trainer.val_check_interval=1000",
    "model.decoder.num_layers=2", "model.vision.num_layers=1", "data.max_text_files=2",
    "data.num_held_out=16", "data.row_tokens=256", "data.vision_mixture.pages=0.0",
    "data.text_mixture.code=0", "data.text_mixture.prose=1.0", "data.num_workers=0",
    "callbacks.heartbeat.every_s=0.2",
    *(f"data.num_pictures.{name}={number}" for name, number in PICTURES.items()),
]  # fmt: skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder, num_nodes=2, cpus=4, gpus=2)
    cluster.env |= {"MIN_FREE_GB": "1", "OMP_NUM_THREADS": "1"}
    cluster.env["PATH"] = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the corpus is made by the first job and found by all others."""
    return tmp_path_factory.mktemp("data")


class Submitter:
    """Submits ``slurm/train.sbatch`` and reads what became of it."""

    def __init__(self, cluster: Cluster, folder: Path, data_dir: Path) -> None:
        self.cluster, self.folder, self.data_dir = cluster, folder, data_dir

    def train(self, name: str, *words: str, options: Sequence[str] = ()) -> str:
        """Submit a run; its folder is ``name``. Options of sbatch replace the template's."""
        return self.sbatch(
            "train", *SMALL, f"run_dir={self.folder / name}", f"data.data_dir={self.data_dir}",
            *words, options=options,
        )  # fmt: skip

    def sbatch(self, template: str, *words: str, options: Sequence[str] = ()) -> str:
        here = [
            "--partition=debug", "--account=test", f"--chdir={ROOT}", "--cpus-per-task=1",
            f"--output={self.folder}/%x_%j.out", "--exclusive=user",
        ]  # fmt: skip
        script = str(ROOT / "slurm" / f"{template}.sbatch")
        return self.cluster.run("sbatch", "--parsable", *here, *options, script, *words).strip()

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*_{job}.out")))


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, data_dir: Path) -> Submitter:
    return Submitter(cluster, tmp_path, data_dir)
