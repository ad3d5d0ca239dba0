"""Shuffled, mixed reads of image-text documents: our plan, WebDataset, LitData; and start-up.

    python benchmarks/data.py read               # documents a second, three loaders, interleaved
    python benchmarks/data.py waiting            # share of a tiny training step that waits for data
    python benchmarks/data.py plan               # start-up time and memory, 10^4 to 10^7 documents

``read``: every side gets the same JPEG pictures and captions from the page cache, decodes with
Pillow, cuts patches with the same function and gives token ids; the same number of workers. Ours
also packs rows, at the declared vision share, in an order that can be resumed; its captions were
tokenised when they were prepared, the others tokenise as they read. WebDataset shuffles through a
buffer of 1,000; LitData mixes two datasets with ``CombinedStreamingDataset``.
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
import webdataset
from litdata.streaming import Cache
from PIL import Image

from data_modules.components.chunk_cache import CacheSettings
from data_modules.components.document import INDEX_DTYPE
from data_modules.components.mixture import Geometry, Stage
from data_modules.components.plan import plan_stages
from data_modules.components.plan_checks import corpus_digest
from data_modules.corpora import Corpora
from data_modules.sources.prepare import PrepareSource
from data_modules.sources.web_dataset import WebDataset
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import image_patches, open_image

SIDE_PX, CAPTION_WORDS, DOCUMENTS_PER_TAR = 224, 24, 500
SOURCES = {"pairs": 0.7, "others": 0.3}
TOKENIZER = Tokenizer.embedded()


def jpeg(rng: np.random.Generator) -> bytes:
    """A picture that is neither flat nor noise."""
    small = Image.fromarray(rng.integers(0, 255, (14, 14, 3), np.uint8))
    file = io.BytesIO()
    small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_tars(folder: Path, num_documents: int) -> None:
    """Write both sources as tars."""
    rng = np.random.default_rng(0)
    for name in SOURCES:
        for start in range(0, num_documents, DOCUMENTS_PER_TAR):
            with tarfile.open(folder / f"{name}-{start:06d}.tar", "w") as tar:
                for n in range(start, min(start + DOCUMENTS_PER_TAR, num_documents)):
                    words = " ".join(f"word{w}" for w in rng.integers(0, 999, CAPTION_WORDS))
                    for suffix, data in (("jpg", jpeg(rng)), ("txt", words.encode())):
                        info = tarfile.TarInfo(f"{n:06d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))


def make_ours(folder: Path) -> None:
    """Prepare both sources, and a text source that fills the rows."""
    for name in SOURCES:
        reader = WebDataset(
            files=str(folder / f"{name}-*.tar"), columns={}, max_document_bytes=10**8
        )
        prepare(folder / name, reader)
    with tarfile.open(folder / "text-0.tar", "w") as tar:
        data = b"and then there was some more text " * 2000
        info = tarfile.TarInfo("0.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    reader = WebDataset(files=str(folder / "text-0.tar"), columns={}, max_document_bytes=10**8)
    prepare(folder / "text", reader)


def prepare(folder: Path, reader: WebDataset) -> None:
    """Prepare one source."""
    PrepareSource(
        folder=str(folder),
        reader=reader,
        tokenizer="embedded",
        max_document_tokens=4096,
        sound=False,
        num_processes=None,
    ).prepare_data()


def pair_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """Read a picture and its caption."""
    picture, caption = (tar.extractfile(member.name[:-3] + suffix) for suffix in ("jpg", "txt"))
    assert picture is not None
    assert caption is not None
    return {"jpg": picture.read(), "txt": caption.read().decode()}


def make_litdata(folder: Path) -> None:
    """Write both sources as LitData datasets of files."""
    for name in SOURCES:
        cache = Cache(str(folder / f"lit_{name}"), chunk_bytes="64MB")
        number = 0
        for path in sorted(folder.glob(f"{name}-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.name.endswith("jpg"):
                        cache[number] = pair_of(tar, member)
                        number += 1
        cache.done()
        cache.merge()


def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, torch.Tensor]:
    """What a step needs of a document: ids and patches."""
    text = sample["txt"].decode() if isinstance(sample["txt"], bytes) else sample["txt"]
    item = image_patches(open_image(sample["jpg"], "picture"))
    return np.array(TOKENIZER.encode(text)), item.pixel_values


def as_is(batch: Any) -> Any:
    """Collate nothing."""
    return batch


def ours(folder: Path, num_workers: int, num_documents: int) -> Iterable[int]:
    """Yield how many documents each step brings."""
    data = Corpora(
        data_dir=str(folder),
        tokenizer="embedded",
        seed=0,
        sources={name: str(folder / name) for name in (*SOURCES, "text")},
        held_out=[],
        row_tokens=4096,
        rows_per_step=4,
        num_steps=num_documents // 80 + 1,
        vision_share=0.3,
        text_mixture={"text": 1},
        vision_mixture=SOURCES,
        max_epochs={},
        schedule={},
        max_held_out=0,
        accept_changed_plan=False,
        cache=CacheSettings(
            folder=str(folder / "cache"),
            max_bytes=10**9,
            max_requests_per_s=1.0,
            max_attempts=1,
            first_pause_s=0.0,
        ),
        num_workers=num_workers,
        max_corrupt_fraction=0.0,
    )
    data.setup("fit")
    for rows in data.train_dataloader():
        yield sum(len(row.media.grid_thw) for row in rows if row.media is not None)


def theirs_webdataset(folder: Path, num_workers: int, num_documents: int) -> Iterable[int]:
    """Yield 1 for each document."""
    sides = [
        webdataset.WebDataset(  # pyright: ignore[reportCallIssue]
            sorted(str(path) for path in folder.glob(f"{name}-*.tar")),
            shardshuffle=100,
            workersplitter=webdataset.split_by_worker,
            nodesplitter=webdataset.split_by_node,
            repeat=True,
        )
        .shuffle(1000)
        .map(decoded)
        for name in SOURCES
    ]
    mixed = webdataset.RandomMix(sides, list(SOURCES.values()))
    loader = torch.utils.data.DataLoader(
        mixed,  # pyright: ignore[reportArgumentType]
        batch_size=16,
        num_workers=num_workers,
        collate_fn=as_is,
    )
    for batch in loader:
        yield len(batch)


def theirs_litdata(folder: Path, num_workers: int, num_documents: int) -> Iterable[int]:
    """Yield 1 for each document."""
    sides = [
        litdata.StreamingDataset(str(folder / f"lit_{name}"), shuffle=True, transform=decoded)
        for name in SOURCES
    ]
    mixed = litdata.CombinedStreamingDataset(
        sides, seed=0, weights=list(SOURCES.values()), iterate_over_all=False
    )
    loader = litdata.StreamingDataLoader(
        mixed, batch_size=16, num_workers=num_workers, collate_fn=as_is
    )
    while True:
        for batch in loader:
            yield len(batch)


def rate(make: Callable[[], Iterable[int]], num_documents: int, warm_up: int) -> float:
    """Return documents a second, from the first batches on."""
    done, begun = 0, time.perf_counter()
    for num in make():
        done += num
        if done - num < warm_up <= done:
            begun, first = time.perf_counter(), done
        if done >= num_documents + warm_up:
            return (done - first) / (time.perf_counter() - begun)
    raise RuntimeError(f"the loader ended after {done} documents")


def read(args: argparse.Namespace) -> None:
    """Compare the three, round after round."""
    sides = {"ours": ours, "WebDataset": theirs_webdataset, "LitData": theirs_litdata}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tars(folder, args.documents)
        make_ours(folder)
        make_litdata(folder)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, load in sides.items():
                make = partial(load, folder, args.workers, args.documents + 200)
                rates[side].append(rate(make, args.documents, 100))
    print(f"{args.documents} documents, {SIDE_PX} px JPEG, {args.workers} workers")
    for side, values in rates.items():
        low, high = min(values), max(values)
        print(f"{side:12} {statistics.median(values):8.0f} documents/s  {low:.0f} - {high:.0f}")


def synthetic(num_documents: int, folder: Path) -> dict[str, np.ndarray]:
    """An index on disk: half texts, half pairs."""
    rng = np.random.default_rng(0)
    index = {}
    for name in ("text", "pairs"):
        rows = np.zeros(num_documents // 2, INDEX_DTYPE)
        rows["num_tokens"] = rng.integers(100, 2000, len(rows))
        if name == "pairs":
            rows["num_vision_tokens"] = rng.integers(64, 256, len(rows))
            rows["num_tokens"] = rows["num_vision_tokens"] + rng.integers(20, 60, len(rows))
            rows["num_patches"] = 4 * rows["num_vision_tokens"]
        np.save(folder / f"{name}.npy", rows)
        del rows
        index[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return index


def plan_of(folder: Path, num_steps: int) -> None:
    """In a process of its own: plan over an index on disk, and say what it took."""
    before = resident_mib()
    begun = time.perf_counter()
    index = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("text", "pairs")}
    starts = {n: np.append(np.arange(0, len(rows), 5000), len(rows)) for n, rows in index.items()}
    stage = Stage(
        first_step=0,
        text={"text": 1.0},
        vision={"pairs": 1.0},
        vision_share=0.1,
        geometry=Geometry(row_tokens=4096, rows_per_step=64),
    )
    corpus_digest(index, ["text", "pairs"])
    plan = plan_stages(index, starts, [stage], seed=0, num_steps=num_steps)
    seconds = time.perf_counter() - begun
    print(json.dumps([seconds, resident_mib() - before, len(plan.pieces)]))


def resident_mib() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan(args: argparse.Namespace) -> None:
    """Measure start-up time and memory of plans, each in a process of its own."""
    print(f"{args.steps} steps of 64 x 4,096 tokens")
    for power in range(4, args.largest + 1):
        with tempfile.TemporaryDirectory() as name:
            synthetic(10**power, Path(name))
            command = [sys.executable, __file__, "plan-of", name, "--steps", str(args.steps)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, mib, pieces = json.loads(told.splitlines()[-1])
        print(f"10^{power} documents: {seconds:7.2f} s, {mib:7.0f} MiB, {pieces:,} pieces")


def waiting(args: argparse.Namespace) -> None:
    """Train tiny on the embedded world and say how long it waited for data."""
    from hydra import compose, initialize_config_dir
    from lightning import Callback

    from moonlit.train import build, quieten

    class Wait(Callback):
        ended, waited, worked = 0.0, 0.0, 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()
            if self.ended:
                self.waited += self.began - self.ended

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.perf_counter()
            if self.ended:
                self.worked += now - self.began
            self.ended = now

    quieten()
    with initialize_config_dir(version_base="1.3", config_dir=str(Path("conf").resolve())):
        chosen = [f"trainer.max_steps={args.steps}", "run_dir=/tmp/waiting", "~callbacks.progress"]
        run = build(compose("train", overrides=[*chosen, f"data.num_workers={args.workers}"]))
    wait = Wait()
    run.trainer.callbacks.append(wait)  # pyright: ignore[reportAttributeAccessIssue]
    run.trainer.fit(run.phase, datamodule=run.data)
    share = wait.waited / (wait.waited + wait.worked)
    print(f"waited {wait.waited:.1f} s of {wait.waited + wait.worked:.1f} s: {share:.1%}")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["read", "waiting", "plan", "plan-of"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--largest", type=int, default=7, help="power of ten")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if args.what == "plan-of":
        plan_of(args.folder, args.steps)
    else:
        {"read": read, "waiting": waiting, "plan": plan}[args.what](args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
