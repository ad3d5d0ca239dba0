"""Sources in an object store: the same documents, whatever the store and the disk do meanwhile."""

import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import TABLE, json_lines, prepared
from object_store import Store, running

from data_modules.components.chunk_cache import CacheSettings, FetchError
from data_modules.components.corpus import Corpus, CorruptDocumentError
from data_modules.sources.json_lines import JSONLines

NUM_CHUNKS = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of six chunks, of two documents of a few kilobytes each."""
    folder = tmp_path_factory.mktemp("source")
    letters = np.random.default_rng(0).integers(97, 123, (2 * NUM_CHUNKS, 4000), np.uint8)
    rows = [{"text": bytes(row).decode()} for row in letters]
    file = json_lines(folder / "c.jsonl", rows)
    shard_bytes = file.stat().st_size // NUM_CHUNKS + 1
    prepared(folder / "out", JSONLines(files=str(file), shard_bytes=shard_bytes, **TABLE))
    assert len(list((folder / "out").glob("chunk-*"))) == NUM_CHUNKS
    return folder / "out"


@pytest.fixture(scope="module")
def shared_store(local: Path) -> Iterator[tuple[Store, str]]:
    with running() as store:
        yield store, store.upload(local, "corpora", "letters")


@pytest.fixture
def store(shared_store: tuple[Store, str]) -> Store:
    shared_store[0].fault = lambda key: None
    shared_store[0].gets.clear()
    return shared_store[0]


def opened(
    store: Store, folder: Path, x: str = "s3://corpora/letters", also: str | None = None,
    **changes: Any,
) -> Corpus:  # fmt: skip
    settings: dict[str, Any] = {
        "folder": str(folder),
        "max_bytes": 10**9,
        "max_requests_per_s": 1000.0,
        "max_attempts": 4,
        "first_pause_s": 0.02,
        "storage_options": store.options,
    }
    sources = {"x": x} | ({} if also is None else {"also": also})
    return Corpus(sources, CacheSettings(**settings | changes))


def ids_of(corpus: Corpus, numbers: Any = range(2 * NUM_CHUNKS)) -> list[bytes]:
    return [corpus.read("x", n).input_ids.tobytes() for n in numbers]


def chunks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/chunk-*.bin"))


def test_documents_are_those_on_disk_and_each_chunk_comes_once(
    local: Path, store: Store, tmp_path: Path
):
    expected = ids_of(Corpus({"x": str(local)}))
    corpus = opened(store, tmp_path)
    assert not chunks_in(tmp_path), "chunks come when they are read"
    assert ids_of(corpus) == expected
    assert ids_of(opened(store, tmp_path), reversed(range(12))) == expected[::-1]
    gets = {key: num for key, num in store.gets.items() if key.startswith("chunk-")}
    assert gets == dict.fromkeys((path.name for path in local.glob("chunk-*")), 1)


def test_the_cache_stays_within_its_size(local: Path, store: Store, tmp_path: Path):
    size = max(path.stat().st_size for path in local.glob("chunk-*"))
    corpus = opened(store, tmp_path, max_bytes=2 * size)
    expected, most = ids_of(Corpus({"x": str(local)})), 0
    for number in [*range(12), 0, 7, 3, 11]:
        assert ids_of(corpus, [number]) == expected[number : number + 1]
        most = max(most, sum(path.stat().st_size for path in chunks_in(tmp_path)))
    assert size < most <= 2 * size


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_a_store_that_fails_for_a_while_costs_nothing(
    fault: Any, local: Path, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    store.fault = lambda key: fault if store.gets[key] <= 2 else None
    assert ids_of(opened(store, tmp_path)) == ids_of(Corpus({"x": str(local)}))
    if fault != "cut":  # a body that breaks off is asked for again inside LitData's client
        assert "s3://corpora/letters/index.json: " in capfd.readouterr().err


def test_a_store_that_stays_broken_is_named_and_its_documents_are_not_corrupt(
    store: Store, tmp_path: Path
):
    corpus = opened(store, tmp_path, max_attempts=2)
    store.fault = lambda key: 404
    with pytest.raises(FetchError, match=r"s3://corpora/letters/chunk-2-0\.bin .* 2 attempts"):
        corpus.read("x", 5)
    assert not issubclass(FetchError, CorruptDocumentError | ValueError | OSError)
    store.fault = lambda key: None
    assert corpus.read("x", 5).input_ids.size


def test_no_source_at_the_place(store: Store, tmp_path: Path):
    settings = CacheSettings(
        folder=str(tmp_path), max_bytes=9, max_requests_per_s=99.0, max_attempts=1,
        first_pause_s=0.0, storage_options=store.options,
    )  # fmt: skip
    with pytest.raises(FetchError, match=r"s3://corpora/nothing/index\.json"):
        Corpus({"x": "s3://corpora/nothing"}, settings)
    with pytest.raises(ValueError, match="needs a cache"):
        Corpus({"x": "s3://corpora/nothing"})


def test_requests_keep_their_pace_over_processes(store: Store, tmp_path: Path):
    corpus = opened(store, tmp_path, max_requests_per_s=8.0)
    begun = time.time()
    fork = multiprocessing.get_context("fork")
    readers = [
        fork.Process(target=lambda part=part: ids_of(corpus, range(part, 12, 4))) for part in (0, 2)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    # Six chunks at eight a second: the last one starts five eighths of a second after the first.
    assert time.time() - begun >= 5 / 8


def test_a_full_disk_is_named_loses_nothing_and_can_be_mended(
    local: Path, store: Store, tmp_path: Path
):
    corpus = opened(store, tmp_path, max_attempts=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(OSError, match=rf"no room left for chunk-0.* in the cache {tmp_path}"):
            corpus.read("x", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not chunks_in(tmp_path)
    assert ids_of(corpus) == ids_of(Corpus({"x": str(local)}))


def test_a_cache_without_room_for_one_chunk_is_refused(store: Store, tmp_path: Path):
    with pytest.raises(ValueError, match=r"cache\.max_bytes=100 has no room for s3://corpora"):
        opened(store, tmp_path, max_bytes=100)
    with pytest.raises(ValueError, match=r"cache\.max_attempts=0"):
        opened(store, tmp_path, max_attempts=0)


def test_sources_share_the_size_of_the_cache(local: Path, store: Store, tmp_path: Path):
    """Catches: a limit that each source has to itself."""
    store.upload(local, "corpora", "more")
    size = max(path.stat().st_size for path in local.glob("chunk-*"))
    corpus = opened(store, tmp_path, max_bytes=2 * size, also="s3://corpora/more")
    for number in range(0, 2 * NUM_CHUNKS, 2):
        corpus.read("x", number)
        corpus.read("also", number)
        assert sum(path.stat().st_size for path in chunks_in(tmp_path)) <= 2 * size


def test_another_source_at_the_same_place_is_read_anew(local: Path, store: Store, tmp_path: Path):
    """Catches: chunks of the source that stood there before."""
    store.upload(local, "corpora", "moving")
    before = opened(store, tmp_path / "cache", x="s3://corpora/moving").read("x", 0).input_ids

    file = json_lines(tmp_path / "c.jsonl", [{"text": "another"}])
    prepared(tmp_path / "out", JSONLines(files=str(file), shard_bytes=99, **TABLE))
    store.upload(tmp_path / "out", "corpora", "moving")
    corpus = opened(store, tmp_path / "cache", x="s3://corpora/moving")

    assert len(corpus.index["x"]) == 1
    after = corpus.read("x", 0).input_ids.tolist()
    assert after == Corpus({"x": str(tmp_path / "out")}).read("x", 0).input_ids.tolist()
    assert after != before.tolist()
