"""The page: curves and rollouts of one run in a single HTML file that needs no network."""

import base64
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from moonlit.report.curves import read_curves
from moonlit.rl.records import PICTURES, Record, read_records, write_escaped

CURVES_FIRST = ("rl/", "swarm/", "toggle/", "train/", "held_out/")
"""Curves whose names begin so come first, in this order."""


def write_page(run: Path, out: Path, *, max_rollouts: int) -> str:
    """Draw a run's page; return a line that says what is on it.

    Args:
        run: the run's folder.
        out: the file to write.
        max_rollouts: the newest so many tasks' rollouts are shown, sub-agents' beside them.

    Raises:
        FileNotFoundError: if there is no such run, or neither a curve nor a rollout in it.
        ValueError: if a line of its rollouts is no record, naming file and line, unless it is a
            file's last and was cut off; if no rollout is to be shown.
    """
    if not isinstance(max_rollouts, int) or isinstance(max_rollouts, bool) or max_rollouts < 1:
        raise ValueError(f"max_rollouts={max_rollouts!r}: want a whole number, at least 1")
    if not run.is_dir():
        raise FileNotFoundError(f"run={run}: no such folder")
    curves = {name: points for name, points in read_curves(run).items() if points}
    cut: list[str] = []
    rollouts, num_left_out = newest(rollouts_of(read_records(run, cut=cut)), max_rollouts)
    if not curves and not rollouts:
        raise FileNotFoundError(f"run={run}: neither a curve nor a rollout in it")
    num_roots = sum(rollout["parent"] is None for rollout in rollouts)
    summary = f"{run}: {len(curves)} curves, {num_roots} rollouts"
    if num_left_out:
        summary += f" (the newest; {num_left_out} older ones are left out: max_rollouts)"
    if cut:
        summary += f"; left out, as their writing was cut off: {'; '.join(cut)}"
    data = {
        "summary": summary,
        "curves": sorted(curves.items(), key=place_of_curve),
        "rollouts": rollouts,
        "pictures": pictures_in(rollouts, run),
    }
    write_escaped(out, html(f"moonlit: {run.name}", data))
    return summary


def place_of_curve(curve: tuple[str, Any]) -> tuple[int, str]:
    """Order curves by what a reader looks for first."""
    name = curve[0]
    ranks = [rank for rank, prefix in enumerate(CURVES_FIRST) if name.startswith(prefix)]
    return (ranks[0] if ranks else len(CURVES_FIRST), name)


def rollouts_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Gather each rollout's turns under its end."""
    turns: dict[str, list[Record]] = {}
    rollouts: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "turn":
            turns.setdefault(record["rollout"], []).append(record)
        else:
            name = record["rollout"]
            rollouts.append({**record, "name": name, "turns": turns.pop(name, [])})
    return rollouts


def newest(rollouts: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], int]:
    """Keep the last roots and all below them; say how many roots are left out.

    Sub-agents whose root was never written to its end are left out too.
    """
    roots = [rollout["name"] for rollout in rollouts if rollout["parent"] is None]
    kept = set(roots[max(0, len(roots) - most) :])
    parents = {rollout["name"]: rollout["parent"] for rollout in rollouts}

    def root_of(name: str) -> str:
        while (parent := parents.get(name)) is not None:
            name = parent
        return name

    shown = [rollout for rollout in rollouts if root_of(rollout["name"]) in kept]
    return shown, len(roots) - len(kept)


def pictures_in(rollouts: Iterable[Mapping[str, Any]], run: Path) -> dict[str, str]:
    """Return the pictures that turns name, as data URLs."""
    names = {name for rollout in rollouts for turn in rollout["turns"] for name in turn["pictures"]}
    return {
        name: "data:image/png;base64,"
        + base64.b64encode((run / PICTURES / name).read_bytes()).decode()
        for name in sorted(names)
    }


def html(title: str, data: Mapping[str, Any]) -> str:
    """Put the parts into one file; nothing that a model wrote can end the script it stands in."""
    folder = files("moonlit.report")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    parts = {
        "@TITLE@": escaped,
        "@CSS@": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "@SCRIPT@": folder.joinpath("page.js").read_text(encoding="utf-8"),
        "@DATA@": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    for mark, part in parts.items():  # the data last: what stands in them is not looked at again
        page = page.replace(mark, part)
    return page
