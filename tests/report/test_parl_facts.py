"""Arms side by side: what the numbers of a comparison mean, on answers made by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moonlit.report.arms import arms_of, f1_within, item_f1, read_runs, steps_to
from moonlit.report.charts import Line, chart, ticks
from moonlit.report.parl_facts import curves, write_comparison

BENCHMARK = Path(__file__).parents[2] / "benchmarks/parl_facts.py"


def answer(step: int, task: int, f1: float, steps: float, **more: Any) -> dict[str, Any]:
    metrics = {
        "performance": f1, "critical_steps": steps, "parallelism": 3.0, "tasks_assigned": 6.0,
        "finish_rate": 0.75, "rows_lost": 0.0, "rows_reassigned": 0.0, "rows_mended": 0.0,
    }  # fmt: skip
    record = {"step": step, "set": "s", "task": task, "tags": {"rows": "3"}, "error": None}
    return {**record, "metrics": metrics, **more}


def write(folder: Path, name: str, *answers: dict[str, Any]) -> None:
    (folder / name).mkdir(parents=True)
    lines = "".join(json.dumps(one) + "\n" for one in answers)
    (folder / name / "held_out_answers.jsonl").write_text(lines)


def test_steps_to_a_target_are_the_smallest_budget_that_reaches_it():
    answers = [answer(0, 0, 1.0, 5.0), answer(0, 1, 0.6, 7.0), answer(0, 2, 0.2, 9.0)]
    assert f1_within(answers, 4) == 0
    assert f1_within(answers, 7) == pytest.approx(1.6 / 3)
    assert steps_to(answers, 0.3) == 5
    assert steps_to(answers, 0.5) == 7
    assert steps_to(answers, 0.6) == 9
    assert steps_to(answers, 0.7) is None


def test_of_one_task_the_last_line_counts_and_lost_answers_do_not(tmp_path: Path):
    write(
        tmp_path, "swarm-1",
        answer(10, 0, 0.1, 5.0), answer(10, 0, 0.9, 5.0), answer(0, 0, 0.2, 5.0),
        answer(10, 1, 0.0, 1.0, error="lost"), answer(10, 0, 0.4, 5.0, set="other"),
    )  # fmt: skip
    (run,) = read_runs(tmp_path)
    assert (run.arm, run.seed) == ("swarm", 1)
    assert [one["metrics"]["performance"] for one in run.first] == [0.2]
    assert sorted(one["metrics"]["performance"] for one in run.last) == [0.4, 0.9]


def test_the_page_compares_swarm_and_single_agent_without_a_network(tmp_path: Path):
    for seed, f1 in ((0, 0.8), (1, 1.0)):
        write(tmp_path, f"swarm-{seed}", answer(0, 0, 0.1, 8.0), answer(20, 0, f1, 5.0))
        write(tmp_path, f"single-{seed}", answer(0, 0, 0.2, 9.0), answer(20, 0, f1, 15.0))

    told = write_comparison(tmp_path, tmp_path / "report.html")

    swarm = (
        "| swarm, both rewards annealed | 2 | 0.10 [0.10, 0.10] -> 0.90 [0.80, 1.00] "
        "| 8.00 [8.00, 8.00] -> 5.00 [5.00, 5.00] | 3.00 [3.00, 3.00] -> 3.00 [3.00, 3.00] "
        "| 2.00 [2.00, 2.00] -> 2.00 [2.00, 2.00] | 0.75 [0.75, 0.75] |"
    )
    assert swarm in told
    assert "| 3 | 0.90 | 15.0 | 0.90 | 5.0 | 3.0 |" in told
    assert "| 70% | 15 | 5 | 3.0 |" in told
    page = (tmp_path / "report.html").read_text()
    plot = (tmp_path / "report.svg").read_text()
    assert plot in page
    assert "critical steps to a target" in plot  # which no arm reaches before training
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "<td>3.0</td>" in page


def test_an_arms_curve_is_the_mean_over_its_seeds(tmp_path: Path):
    for seed, f1 in ((0, 0.5), (1, 1.0)):
        write(tmp_path, f"swarm-{seed}", answer(0, 0, 0.25, 8.0), answer(20, 0, f1, 5.0))
    *seeds, whole = curves(arms_of(read_runs(tmp_path)), item_f1)
    assert [list(one.points) for one in seeds] == [[(0, 0.25), (20, 0.5)], [(0, 0.25), (20, 1.0)]]
    assert list(whole.points) == [(0, 0.25), (20, 0.75)]


def losing(step: int, task: int, lost: int, again: int, mended: int) -> dict[str, Any]:
    one = answer(step, task, 0.5, 5.0)
    one["metrics"] |= {"rows_lost": lost, "rows_reassigned": again, "rows_mended": mended}
    one["metrics"]["asked_first"] = 3.0 + mended
    return one


def test_what_became_of_lost_rows_is_told_where_some_were_lost(tmp_path: Path):
    """Shares of all rows that were lost, not means of answers' shares."""
    write(tmp_path, "swarm-0", answer(0, 0, 0.1, 8.0), answer(20, 0, 0.9, 5.0))
    assert "lost" not in write_comparison(tmp_path, tmp_path / "report.html")
    write(
        tmp_path, "dead_agents-0",
        losing(0, 0, 4, 1, 0), losing(20, 0, 1, 1, 1), losing(20, 1, 3, 2, 1),
    )  # fmt: skip
    told = write_comparison(tmp_path, tmp_path / "report.html")
    assert "| 4 -> 4 | 25% -> 75% | 0% -> 50% | 50% -> 67% |" in told
    assert told.count("dead at") == 2  # in the table of all arms, and here


@pytest.mark.parametrize("line", [b'{"step": 20, "set', b"\xff\n", b"[1]\n", b'{"step": 20}\n'])
def test_a_line_that_is_no_answer_is_named(line: bytes, tmp_path: Path):
    write(tmp_path, "swarm-0", answer(0, 0, 0.1, 8.0, tags={"rows": "3", "said": "a\u2028b"}))
    with (tmp_path / "swarm-0/held_out_answers.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"held_out_answers\.jsonl, line 2: no answer"):
        read_runs(tmp_path)


def test_the_benchmark_names_what_there_is_and_says_when_nothing_is_left(tmp_path: Path):
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, BENCHMARK, "--out", tmp_path, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    wrong = ran("--runs", "swarmm-0")
    assert wrong.returncode == 2
    last = wrong.stderr.splitlines()[-1]
    assert "argument --runs: 'swarmm-0': want ARM-SEED or a stage; arms: swarm, " in last
    assert "stages: warmup_1, " in last
    (tmp_path / "swarm-0").mkdir()
    (tmp_path / "swarm-0/held_out.json").write_text("{}")
    done = ran("--runs", "swarm-0")
    assert done.stdout == f"nothing to do: {tmp_path} has the results of swarm-0\n"


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no ARM-SEED"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    ("most", "expected"), [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (17.0, [0, 5, 10, 15])]
)
def test_ticks_are_round(most: float, expected: list[float]):
    assert ticks(most) == pytest.approx(expected)


def test_a_chart_keeps_its_points_inside_and_its_words_harmless():
    drawn = chart("a < b", [Line("<b>", [(0.0, 0.0), (10.0, 4.0)], 0)], x_name="x", y_name="y")
    assert "a &lt; b" in drawn
    assert "&lt;b&gt;" in drawn
    assert "M46.0 210.0L348.0 28.0" in drawn


def test_the_legend_names_means_and_not_their_seeds():
    lines = [Line("seed", [(0.0, 1.0)], 0, faint=True), Line("mean", [(0.0, 1.0)], 0)]
    drawn = chart("t", lines, x_name="x", y_name="y")
    assert ">mean<" in drawn
    assert ">seed<" not in drawn


def test_the_command_as_it_is_printed(tmp_path: Path):
    """Catches: Hydra taking experiment= for the group of that name."""
    write(tmp_path, "swarm-0", answer(0, 0, 0.1, 8.0), answer(20, 0, 0.9, 5.0))
    moonlit = Path(sys.executable).with_name("moonlit")
    words = ["report", "experiment=parl_facts", f"run={tmp_path}", f"out={tmp_path}/a.html"]
    done = subprocess.run([moonlit, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.10 -> 0.90" in done.stdout
    assert (tmp_path / "a.svg").is_file()
