"""Disputes: pages of a world that contradict each other, decidable or truly open.

What a city's own page no longer says stands in two records that disagree. Which of them counts is
a rule that every question states (``RULE``): registers before travellers' notes, of two registers
the later. Where it decides nothing, the right answer names both values.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from data_modules.world.facts import FactQuestion, Facts, Record, pick
from moonlit.agents.tables import OR
from moonlit.agents.toolsets.library import Page

RULE = (
    "Where records disagree, a register counts and travellers' notes do not; of two registers the "
    "later counts. Where that decides nothing, give both values, as in 12 or 15."
)
BY_DATE, BY_SOURCE, OPEN = "by_date", "by_source", "open"
KINDS = (BY_DATE, BY_SOURCE, OPEN)
SAID = {"population": "has a population of {value}", "founded": "founded in {value}"}
LEFT_OUT = {
    "population": "has a population that records give",
    "founded": "founded in a year that records give",
}
YEARS = (1950, 2020)
"""Of records."""


@dataclass(frozen=True, slots=True)
class Dispute:
    """One contested value of a city."""

    city: str
    key: str
    """``population`` or ``founded``."""
    kind: str
    value: str
    """What counts; ``12 or 15`` where nothing does."""
    pages: tuple[Page, Page]


class Disputes:
    """The contested values of a world.

    Args:
        facts: the world.
        seed: of what is contested.
        share: of the populations and years of foundation that are, in [0, 1].

    Raises:
        ValueError: if the share is none.
    """

    def __init__(self, facts: Facts, seed: int, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: want it in [0, 1]")
        rng = np.random.default_rng([seed, 7])
        self.facts = facts
        self.disputes = {
            (name, key): dispute(rng, name, key, city)
            for name, city in facts.cities.items()
            for key in SAID
            if rng.random() < share
        }

    def pages(self) -> list[Page]:
        """Return the world's pages, contested values left out, and the records."""
        pages = []
        for page in self.facts.pages():
            text = page.text
            for key, said in SAID.items():
                if (page.title, key) in self.disputes:
                    value = self.facts.cities[page.title][key]
                    text = text.replace(said.format(value=value), LEFT_OUT[key])
            pages.append(Page(page.title, text))
        return pages + [page for one in self.disputes.values() for page in one.pages]

    def question(self, rng: np.random.Generator) -> FactQuestion:
        """Ask for a table of a country's cities in which something is contested.

        Raises:
            ValueError: if nothing is.
        """
        if not self.disputes:
            raise ValueError("nothing is contested in this world")
        country = self.facts.cities[pick(rng, self.disputes)[0]]["country"]
        names, columns = self.facts.cities_of(country), list(SAID)
        rows = [[name, *(self.value(name, key) for key in columns)] for name in names]
        records = [
            page for (name, _), one in self.disputes.items() if name in names for page in one.pages
        ]
        return FactQuestion(
            text=f"List every city of {country} with its population and the year it was founded. "
            f"{RULE} Answer with a table whose columns are city, {', '.join(columns)}.",
            kind="disputed",
            truth=rows,
            header=["city", *columns],
            path=[country, *names, *(page.title for page in records)],
            evidence=[
                f"{country} has the cities {', '.join(names)}",
                *(f"{row[0]}: {', '.join(row[1:])}" for row in rows),
                *(page.text for page in records),
            ],
        )

    def value(self, city: str, key: str) -> str:
        """Return what counts."""
        contested = self.disputes.get((city, key))
        return self.facts.cities[city][key] if contested is None else contested.value


def dispute(rng: np.random.Generator, name: str, key: str, city: Record) -> Dispute:
    """Make one value contested: the true one stands where the rule says so, or nowhere."""
    kind, true = pick(rng, KINDS), city[key]
    step = 1000 if key == "population" else 1
    other = str(int(true) + step * int(rng.integers(1, 9)))
    early, late = sorted(int(year) for year in rng.choice(np.arange(*YEARS), 2, replace=False))
    write = partial(record, name, key)
    if kind == BY_DATE:
        records = write(other, "Register", early), write(true, "Register", late)
    elif kind == BY_SOURCE:  # the notes are the later, so that the date alone misleads
        records = write(true, "Register", early), write(other, "Notes", late)
    else:
        records = (
            write(true, "Register", late, " of the north"),
            write(other, "Register", late, " of the south"),
        )
    shuffled = records if rng.random() < 0.5 else (records[1], records[0])
    value = OR.join((true, other)) if kind == OPEN else true
    return Dispute(name, key, kind, value, shuffled)


def record(name: str, key: str, value: str, source: str, year: int, part: str = "") -> Page:
    """Write one record; what it says stands on a line of its own."""
    writer = f"the register{part}" if source == "Register" else "a traveller"
    return Page(
        f"{source}{part} {year} on the {key} of {name}",
        f"Written in {year} by {writer}.\n{key} of {name}: {value}",
    )
