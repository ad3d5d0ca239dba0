"""Wide-search answers: a table in text, compared with the true one cell by cell and row by row.

The first column is the key. An *item* is a cell named by its row's key and its column; a *row* is
right when all of its cells are. F1 is over sets, so repeating a row gains nothing. A cell that
cannot be decided names all its values, ``12 or 15``, in any order.
Source: WideSearch (arXiv:2508.07999) scores items and rows by F1; here values are compared exactly,
after normalising spaces and case, so that no judge is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Table = Sequence[Sequence[str]]
"""Rows of cells, the header left out."""
OR = " or "
"""Between the values of a cell that cannot be decided."""


@dataclass(frozen=True, slots=True)
class TableScore:
    """How much of a table was found, each in [0, 1]."""

    item_f1: float
    row_f1: float


def score_table(answer: Table, truth: Table) -> TableScore:
    """Compare two tables; the order of rows does not matter.

    Raises:
        ValueError: if the true table is empty.
    """
    if not truth:
        raise ValueError("the true table has no rows")
    answered, true = normalised(answer), normalised(truth)
    return TableScore(f1(items(answered), items(true)), f1(answered, true))


def read_table(text: str, num_columns: int) -> list[list[str]]:
    """Read the Markdown table of an answer: its rows below the line of dashes.

    Rows of another width are left out; a text without a table has no rows.
    """
    _, rows = lines_of(text)
    return [row for row in rows if len(row) == num_columns]


def read_header(text: str) -> list[str]:
    """Read the line above the dashes of an answer's Markdown table; empty where there is none."""
    return lines_of(text)[0]


def lines_of(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a text's first Markdown table, of whatever width."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    rules = [place for place, line in enumerate(lines) if set(line) <= set("|-: ") and "-" in line]
    if not rules:
        return [], []
    cells = [
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        for line in lines
    ]
    header = cells[rules[0] - 1] if rules[0] else []
    return header, cells[rules[0] + 1 :]


def write_table(header: Sequence[str], rows: Table) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def normalised(table: Table) -> set[tuple[str, ...]]:
    """Return rows with single spaces, in lower case, a cell's alternatives in one order."""
    return {tuple(OR.join(alternatives(cell)) for cell in row) for row in table}


def alternatives(cell: str) -> tuple[str, ...]:
    """Return the values that a cell leaves open (``12 or 15``), sorted; most cells have one."""
    return tuple(sorted(set(" ".join(cell.lower().split()).split(OR))))


def items(rows: set[tuple[str, ...]]) -> set[tuple[str, int, str]]:
    """Return every cell with its key and its column; the key is an item too."""
    return {(row[0], column, cell) for row in rows for column, cell in enumerate(row)}


def f1(answered: set, true: set) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * len(answered & true) / (len(answered) + len(true))
