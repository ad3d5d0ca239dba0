"""Exact resume: at any step, with any workers, on any ranks, after a clean stop or a kill."""

import multiprocessing
import pickle
import signal
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from resume_run import NUM_STEPS, Story, corpora, make_sources, rows_from, run

slow = pytest.mark.slow


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_sources(folder)
    return folder


def on_ranks(pools: dict[int, Ranks], num_ranks: int, *args: Any, **kwargs: Any) -> list[Story]:
    """Run on so many processes, never in this one."""
    if num_ranks > 1:
        return pools[num_ranks](run, *args, num_ranks=num_ranks, **kwargs)
    theirs, process = alone(*args, **kwargs)
    try:
        return [pickle.loads(theirs.recv())]
    finally:
        process.join()


def alone(*args: Any, **kwargs: Any) -> tuple[Connection, Any]:
    """Start a run on one process of its own."""
    theirs, ours = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        ours.send(pickle.dumps(run(*args, num_ranks=1, **kwargs)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    ours.close()
    return theirs, process


@pytest.mark.parametrize(
    ("num_workers", "num_ranks"),
    [
        (0, 1), (2, 1), (0, 2), (0, 4),
        *(pytest.param(w, r, marks=slow) for w in (1, 2, 4) for r in (1, 2, 4) if (w, r) != (2, 1)),
    ],
)  # fmt: skip
def test_the_remaining_rows_are_the_same_wherever_a_run_stopped(
    sources: Path, num_workers: int, num_ranks: int
):
    whole = corpora(sources)
    whole.setup("fit")
    expected = rows_from(whole, 0, 1)
    assert [len(step) for step in expected] == [4] * 6 + [8] * 2
    data = corpora(sources, num_workers)
    data.setup("fit")
    for next_step in range(NUM_STEPS + 1) if num_workers == 0 else (3, 5):
        assert rows_from(data, next_step, num_ranks) == expected[next_step:]


def test_the_run_crosses_the_epochs_of_both_sources(sources: Path):
    """Else the matrix would say nothing of epoch boundaries: steps 1 to 6 hold some."""
    data = corpora(sources)
    data.setup("fit")
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    again: dict[int, int] = {}
    for step in range(NUM_STEPS):
        for row in range(data.plan.num_rows(step)):
            for piece in data.plan.row(step, row):
                source, document = int(piece["source"]), int(piece["document"])
                if piece["start"] == 0 and document in seen[source]:
                    again.setdefault(source, step)
                seen[source].add(document)
    assert all(1 <= step <= 6 for step in again.values())
    assert set(again) == {0, 1}


uninterrupted = cache(on_ranks)


class Pools(dict):
    """Hashable, so that an uninterrupted run is made once for each number of ranks."""

    __hash__ = object.__hash__


@pytest.fixture(scope="session")
def pools(request: pytest.FixtureRequest) -> Any:
    class Lazy(Pools):
        def __missing__(self, num_ranks: int) -> Ranks:
            return request.getfixturevalue("two_ranks" if num_ranks == 2 else "four_ranks")

    return Lazy()


def killed_on(num_ranks: int, *args: Any, **kwargs: Any) -> None:
    """Run until every rank has killed itself; on processes of their own, for none is left.

    Their ends are waited for, not their pipes: orphaned loader workers hold those for some seconds.
    """
    if num_ranks == 1:
        processes = [alone(*args, killed=True, **kwargs)[1]]
    else:
        doomed = Ranks(num_ranks)
        for pipe in doomed.pipes:
            pipe.send((run, args, {"num_ranks": num_ranks, "killed": True, **kwargs}))
        processes = doomed.processes
    for process in processes:
        process.join(timeout=200)
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "step", "killed"),
    [
        (1, 2, 3, True), (2, 0, 3, True),
        *(
            pytest.param(ranks, workers, step, killed, marks=slow)
            for ranks, workers, step, killed in [
                (1, 4, 6, True), (1, 0, 1, False), (2, 1, 5, False), (4, 0, 6, True),
            ]
        ),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_learns_what_it_would_have_learnt(
    sources: Path, pools: Any, tmp_path: Path, num_ranks: int, num_workers: int, step: int,
    killed: bool,
):  # fmt: skip
    """Losses are equal to the last bit: same ranks, same order, on a CPU."""
    whole = uninterrupted(pools, num_ranks, sources, num_workers=0)
    settings = {"save_at": step, "path": tmp_path / "saved.ckpt", "num_workers": num_workers}
    if killed:
        killed_on(num_ranks, sources, **settings)
    else:
        on_ranks(pools, num_ranks, sources, **settings)
    path = tmp_path / "saved.ckpt"
    resumed = on_ranks(pools, num_ranks, sources, num_workers=num_workers, path=path, resume=True)

    assert len(whole) == len(resumed) == num_ranks
    for ours, theirs in zip(resumed, whole, strict=True):
        assert len(ours.losses) == NUM_STEPS - step
        assert ours.rows == theirs.rows[step:]
        assert ours.losses == theirs.losses[step:]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed: 5 then, 6 now"),
        ({"max_epochs": {"texts": 9.0}}, r"max_epochs: \{\} then, .*9\.0. now"),
        ({"row_tokens": 80}, "row_tokens from step 0: 64 then, 80 now"),
        ({"schedule": {}}, "rows_per_step from step 6: 8 then, None now"),
    ],
)
def test_a_changed_plan_is_refused_by_name_or_accepted_on_request(
    sources: Path, change: dict[str, Any], named: str
):
    before = corpora(sources)
    before.setup("fit")
    state = {"next_step": 3, "fingerprint": before.fingerprint}
    changed = corpora(sources, **change)
    changed.setup("fit")
    with pytest.raises(ValueError, match=named):
        changed.load_state_dict(state)

    accepted = corpora(sources, accept_changed_plan=True, **change)
    accepted.setup("fit")
    with pytest.warns(UserWarning, match=named):
        accepted.load_state_dict(state)
    assert accepted.next_step == 3
    assert rows_from(accepted, 3, 1) == rows_from(changed, 3, 1)
