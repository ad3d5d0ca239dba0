"""The comparison of context strategies: who remembers what is real, on tasks that do not fit."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "context_strategies.py"


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], list[str]]:
    """F1, answered, critical steps, longest context, by task and strategy; eight people."""
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--people", "8", "--seeds", "0", "--tasks", "2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in ran.stdout.splitlines()[2:]]
    return {(row[0], row[2]): row[3:7] for row in rows}


def test_what_does_not_fit_fails_and_what_forgets_everything_never_ends(table):
    assert table["wide", "none, room for all"][:3] == ["1.00", "100%", "9.0"]
    assert table["wide", "none"][:2] == ["0.00", "0%"]
    assert table["wide", "discard-all"][:3] == ["0.00", "0%", "100.0"]


def test_notes_and_summaries_carry_through_and_sub_agents_need_fewer_steps(table):
    assert table["wide", "hide-tool-result"][:3] == ["1.00", "100%", "9.0"]
    assert table["wide", "summary"][:2] == ["1.00", "100%"]
    assert table["wide", "sharding"][:3] == ["1.00", "100%", "7.0"]


def test_no_context_is_longer_than_there_is_room(table):
    for (_, strategy), row in table.items():
        assert strategy == "none, room for all" or int(row[3].replace(",", "")) <= 2048


def test_who_begins_again_finds_a_needle_by_another_way(table):
    assert table["needle", "discard-all"][:2] == ["1.00", "100%"]
