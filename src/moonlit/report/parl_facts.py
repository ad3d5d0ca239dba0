"""``moonlit report experiment=parl_facts``: the proof that PARL learns, as tables and a plot.

Source: technical report (arXiv:2602.02276), Figures 4 (outcome and parallelism rise together) and 8
(critical steps to a target F1).
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from moonlit.report.arms import (
    TARGETS,
    Answer,
    Run,
    arms_of,
    by_tag,
    item_f1,
    mean,
    measured,
    read_runs,
    steps,
    steps_to,
)
from moonlit.report.charts import Line, chart, figure

FAULTS = ("crash", "hang", "loop", "overflow", "garbage")
ARMS = {
    "swarm": "swarm, both rewards annealed",
    "single": "single agent, as many steps as it needs",
    "single_tight": "single agent, the swarm's budget",
    "no_parallel": "swarm, lambda 1 = 0",
    "no_finish": "swarm, lambda 2 = 0",
    "no_both": "swarm, lambda 1 = lambda 2 = 0",
    "swarm_loose": "17 steps: swarm, both rewards annealed",
    "no_parallel_loose": "17 steps: swarm, lambda 1 = 0",
    "no_finish_loose": "17 steps: swarm, lambda 2 = 0",
    "no_both_loose": "17 steps: swarm, lambda 1 = lambda 2 = 0",
    "faults": "swarm, all five faults at 10 % each",
    "dead_agents": "17 steps: swarm, one agent dead at 2 of 3 tasks",
    "dead_agents_tight": "swarm, one agent dead at 2 of 3 tasks",
    **{f"faults_{fault}": f"swarm, {fault} at 10 %" for fault in FAULTS},
    "unlike_agents": "swarm, of two agents one is lost at 7 of 10 tasks",
    "policy_agents": "swarm, a checkpoint plays the sub-agents",
    "policy_agents_small_then_large": "swarm, a small checkpoint, then a larger one",
    "policy_agents_small_longer_then_large": "the same, the small one trained for longer",
}
"""Arms by the name of their runs' folders; others are shown by that name."""
PLOTTED = ("swarm", "single", "no_both", "swarm_loose", "no_both_loose")
"""Arms that are drawn: as many as there are colours."""
SWARM, SINGLE = "swarm", "single"
ROWS = "rows"
Table = list[list[str]]


def write_comparison(folder: Path, out: Path) -> str:
    """Write the page and, beside it, the plot as SVG; return the tables as Markdown.

    Args:
        folder: of the runs, each ``ARM-SEED``.
        out: the page to write.

    Raises:
        FileNotFoundError: if no run in it has been evaluated.
    """
    arms = arms_of(read_runs(folder))
    tables = {
        "Arms: before PARL and after it, held-out tasks": arm_table(arms),
        "Critical steps by the number of rows": size_table(arms),
        "Critical steps to a target item-F1": target_table(arms),
        "Rows that sub-agents were assigned and lost, and who was asked": lost_table(arms),
    }
    plot = draw(arms)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".svg").write_text(plot, encoding="utf-8")
    out.write_text(page(folder, plot, tables), encoding="utf-8")
    return "\n\n".join(f"{title}\n\n{markdown(table)}" for title, table in tables.items() if table)


def in_order(arms: dict[str, list[Run]]) -> list[tuple[str, list[Run]]]:
    """Return the arms in the order of ``ARMS``, unknown ones last."""
    places = list(ARMS)
    return sorted(
        arms.items(), key=lambda arm: places.index(arm[0]) if arm[0] in places else len(places)
    )


def arm_table(arms: dict[str, list[Run]]) -> Table:
    """Lay out every arm: mean over seeds, lowest and highest."""
    head = ["arm", "seeds", "item-F1", "critical steps", "agents at once", "tasks / row",
            "tasks finished"]  # fmt: skip
    rows = [head]
    for arm, runs in in_order(arms):
        cells = [ARMS.get(arm, arm), f"{len(runs)}"]
        cells += [
            f"{spread(runs, value, first=True)} -> {spread(runs, value)}"
            for value in (item_f1, steps, measured("parallelism"), tasks_per_row)
        ]
        rows.append([*cells, spread(runs, measured("finish_rate"))])
    return rows


def tasks_per_row(answer: Answer) -> float:
    """Tasks that were assigned for each row that was asked for: above 1, some were in vain."""
    return answer["metrics"]["tasks_assigned"] / int(answer["tags"][ROWS])


def spread(runs: Sequence[Run], value: Callable[[Answer], float], *, first: bool = False) -> str:
    """Write the mean over seeds of the seeds' means, with the lowest and highest behind it."""
    means = [mean(run.first if first else run.last, value) for run in runs]
    alone = f"{fmean(means):.2f}"
    return alone if len(means) == 1 else f"{alone} [{min(means):.2f}, {max(means):.2f}]"


def size_table(arms: dict[str, list[Run]]) -> Table:
    """Lay out F1 and steps of the trained swarm and single agent by how much was asked for."""
    if not {SWARM, SINGLE} <= set(arms):
        return []
    swarm, single = (by_tag(last_answers(arms[arm]), ROWS) for arm in (SWARM, SINGLE))
    rows = [["rows", "single: F1", "steps", "swarm: F1", "steps", "times fewer"]]
    for num in sorted(set(swarm) & set(single)):
        ratio = mean(single[num], steps) / mean(swarm[num], steps)
        rows.append(
            [f"{num}", f"{mean(single[num], item_f1):.2f}", f"{mean(single[num], steps):.1f}",
             f"{mean(swarm[num], item_f1):.2f}", f"{mean(swarm[num], steps):.1f}", f"{ratio:.1f}"]
        )  # fmt: skip
    return rows


def target_table(arms: dict[str, list[Run]]) -> Table:
    """Lay out the steps that trained arms need for each target."""
    if not {SWARM, SINGLE} <= set(arms):
        return []
    rows = [["item-F1", "single agent", "swarm", "times fewer"]]
    for target in TARGETS:
        single, swarm = (steps_to(last_answers(arms[arm]), target) for arm in (SINGLE, SWARM))
        ratio = f"{single / swarm:.1f}" if single and swarm else ""
        rows.append([f"{target:.0%}", said(single), said(swarm), ratio])
    return rows


def lost_table(arms: dict[str, list[Run]]) -> Table:
    """Lay out what became of the rows that sub-agents lost, in the arms that lost some."""
    rows = [["arm", "rows lost", "assigned again", "filled in the end", "tasks given to w1"]]
    for arm, runs in in_order(arms):
        before = fates([answer for run in runs for answer in run.first])
        after = fates(last_answers(runs))
        if (before[0], after[0]) != ("0", "0"):
            told = (f"{one} -> {other}" for one, other in zip(before, after, strict=True))
            rows.append([ARMS.get(arm, arm), *told])
    return rows if len(rows) > 1 else []


def fates(answers: Sequence[Answer]) -> list[str]:
    """Count rows that were lost, the share assigned again and filled, and of tasks the first's."""

    def total(name: str, some: Sequence[Answer] = answers) -> float:
        return float(sum(one["metrics"][name] for one in some))

    lost = total("rows_lost")
    asked = [one for one in answers if "asked_first" in one["metrics"]]  # older runs do not tell
    parts = [
        (total("rows_reassigned"), lost),
        (total("rows_mended"), lost),
        (total("asked_first", asked), total("tasks_assigned", asked)),
    ]
    return [f"{lost:.0f}", *(f"{part / whole:.0%}" if whole else "" for part, whole in parts)]


def said(value: int | None) -> str:
    """Write a number of steps."""
    return "not reached" if value is None else f"{value}"


def last_answers(runs: Sequence[Run]) -> list[Answer]:
    """Return the answers after training, of all seeds."""
    return [answer for run in runs for answer in run.last]


def draw(arms: dict[str, list[Run]]) -> str:
    """Draw F1, critical steps and agents at once over training, and the steps to targets.

    Raises:
        ValueError: if none of the arms is one that is drawn.
    """
    arms = {arm: runs for arm, runs in arms.items() if arm in PLOTTED}
    panels = {
        "item-F1": item_f1,
        "critical steps": steps,
        "agents at once": measured("parallelism"),
    }
    charts = [
        chart(f"held-out {name}", curves(arms, value), x_name="iteration", y_name=name)
        for name, value in panels.items()
    ]
    reached = {
        arm: [(t * 100, float(s)) for t in TARGETS
              if (s := steps_to(last_answers(arms[arm]), t)) is not None]
        for arm in (SINGLE, SWARM) if arm in arms
    }  # fmt: skip
    places = [arm for arm, _ in in_order(arms)]
    lines = [
        Line(ARMS[arm], points, places.index(arm)) for arm, points in reached.items() if points
    ]
    if lines:
        charts.append(
            chart(
                "critical steps to a target", lines, x_name="item-F1 [%]", y_name="critical steps"
            )
        )
    return figure(charts)


def curves(arms: dict[str, list[Run]], value: Callable[[Answer], float]) -> list[Line]:
    """Return each arm's mean over seeds, and each seed faintly."""
    lines = []
    for place, (arm, runs) in enumerate(in_order(arms)):
        seeds = [
            {float(step): mean(some, value) for step, some in run.evaluations.items()}
            for run in runs
        ]
        lines += [Line(arm, sorted(one.items()), place, faint=True) for one in seeds]
        shared = sorted(set.intersection(*map(set, seeds)))
        means = [(step, fmean(one[step] for one in seeds)) for step in shared]
        lines.append(Line(ARMS.get(arm, arm), means, place))
    return lines


def markdown(table: Table) -> str:
    """Write a table."""
    head, *rows = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(folder: Path, plot: str, tables: dict[str, Table]) -> str:
    """Put plot and tables on one page."""
    parts = [f"<h1>{escape(folder.name)}</h1>", plot]
    for title, table in tables.items():
        if table:
            head, *rows = ("".join(cell_of(cell, row is table[0]) for cell in row) for row in table)
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem;color:#1d2230;background:#fff}"
        "svg{max-width:100%;height:auto}table{border-collapse:collapse}"
        "td,th{border:1px solid #d5d9e0;padding:.2rem .6rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>moonlit: {escape(folder.name)}</title><style>{style}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def cell_of(words: str, is_head: bool) -> str:
    """Write a cell."""
    kind = "th" if is_head else "td"
    return f"<{kind}>{escape(words)}</{kind}>"
