"""Facts: an invented world of countries, cities, companies and people over many short pages.

Wide questions want a table ("every city of Tavoria with its population"), deep ones a chain of
pages ("in which country was the head of Norvex born?") or several chains that join late ("where was
the oldest of these three heads born?"). Answers are exact, so tables are scored by item-F1 and
row-F1 without a judge (``moonlit.agents.tables``). Names are made of syllables: nothing here can be
known beforehand, only looked up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from moonlit.agents.toolsets.library import Page

ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "h", "k", "kr", "l", "m", "n", "p", "r", "s", "st",
          "t", "tr", "v", "z")  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "ai", "eo")
CODAS = ("", "", "l", "n", "r", "s", "k", "m")
FIRST_NAMES = ("Ada", "Bela", "Cora", "Dino", "Edda", "Falk", "Gita", "Hugo", "Ilse", "Jona",
               "Kira", "Lars", "Mona", "Nils", "Olga", "Pia", "Rolf", "Sina", "Timo",
               "Ulla")  # fmt: skip
TRADES = ("glass", "bicycles", "clocks", "lamps", "paper", "ropes", "sails", "seeds", "tiles")
PROFESSIONS = ("engineer", "chemist", "lawyer", "sailor", "teacher", "architect")
CITIES_PER_COUNTRY = (4, 9)
COMPANIES_PER_CITY = (0, 2)

Record = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactQuestion:
    """A question about the facts and its exact answer."""

    text: str
    kind: str
    """``wide``, ``deep``, ``join`` or ``disputed``."""
    truth: list[list[str]]
    """Rows of the table; for the other questions one row of one cell."""
    header: list[str] = field(default_factory=list)
    """Columns of a wide question's table; the first is the key."""
    path: list[str]
    """Titles of the pages that hold the answer, in the order to read them."""
    evidence: list[str]
    """For each page of ``path`` what it says, in words."""


class Facts:
    """The world of one seed.

    Args:
        seed: of everything.
        num_countries: each has four to nine cities.
        accept: of the names that are made up, those that may be used.
    """

    def __init__(
        self,
        seed: int,
        num_countries: int = 12,
        accept: Callable[[str], bool] = lambda name: True,
    ) -> None:
        rng = np.random.default_rng([seed, 5])
        self.taken: set[str] = set()
        self.accept = accept
        self.countries: dict[str, Record] = {}
        self.cities: dict[str, Record] = {}
        self.companies: dict[str, Record] = {}
        self.people: dict[str, Record] = {}
        for _ in range(num_countries):
            self.add_country(rng)
        for name, company in self.companies.items():
            self.add_head(rng, name, company)
        for name, country in self.countries.items():
            country["capital"] = rng.choice(self.cities_of(name))

    def name(self, rng: Generator, syllables: int, ending: str = "") -> str:
        """Make up a name that nothing has yet."""
        while True:
            parts = [
                ONSETS[rng.integers(len(ONSETS))]
                + VOWELS[rng.integers(len(VOWELS))]
                + CODAS[rng.integers(len(CODAS))]
                for _ in range(syllables)
            ]
            name = "".join(parts).capitalize() + ending
            if name not in self.taken and self.accept(name):
                self.taken.add(name)
                return name

    def add_country(self, rng: Generator) -> None:
        """Add a country, its cities and their companies."""
        country = self.name(rng, 2, "ia")
        self.countries[country] = {"currency": self.name(rng, 1, "o").lower()}
        for _ in range(rng.integers(*CITIES_PER_COUNTRY)):
            city = self.name(rng, 2)
            self.cities[city] = {
                "country": country,
                "population": str(rng.integers(8, 990) * 1000),
                "founded": str(rng.integers(900, 1900)),
                "river": self.name(rng, 1, "a"),
            }
            for _ in range(rng.integers(COMPANIES_PER_CITY[0], COMPANIES_PER_CITY[1] + 1)):
                self.companies[self.name(rng, 1, "ex")] = {
                    "city": city,
                    "makes": rng.choice(TRADES),
                    "founded": str(rng.integers(1900, 2020)),
                }

    def add_head(self, rng: Generator, name: str, company: Record) -> None:
        """Add the person who heads a company."""
        person = f"{rng.choice(FIRST_NAMES)} {self.name(rng, 2)}"
        company["head"] = person
        self.people[person] = {
            "birthplace": rng.choice(list(self.cities)),
            "born": str(rng.integers(1940, 2000)),
            "profession": rng.choice(PROFESSIONS),
            "company": name,
        }

    def cities_of(self, country: str) -> list[str]:
        """Return a country's cities."""
        return [name for name, city in self.cities.items() if city["country"] == country]

    def pages(self) -> list[Page]:
        """Write one page for everything that has a name."""
        pages = []
        for name, one in self.countries.items():
            cities = ", ".join(self.cities_of(name))
            text = f"{name} is a country. Its capital is {one['capital']}; it pays in the "
            pages.append(Page(name, f"{text}{one['currency']}. The cities of {name} are {cities}."))
        for name, one in self.cities.items():
            text = f"{name} is a city in {one['country']} on the river {one['river']}. It was "
            text += f"founded in {one['founded']} and has a population of {one['population']}."
            firms = [firm for firm, company in self.companies.items() if company["city"] == name]
            text += f" Companies of {name}: {', '.join(firms)}." if firms else ""
            pages.append(Page(name, text))
        for name, one in self.companies.items():
            text = (
                f"{name} is a company that makes {one['makes']}. It has its seat in {one['city']}, "
            )
            text += f"was founded in {one['founded']} and is headed by {one['head']}."
            pages.append(Page(name, text))
        for name, one in self.people.items():
            text = f"{name}, {one['profession']} by training, was born in {one['birthplace']} in "
            pages.append(Page(name, f"{text}{one['born']} and heads {one['company']}."))
        return pages

    def question(self, rng: Generator) -> FactQuestion:
        """Ask something, wide or deep as likely."""
        return self.wide(rng) if rng.random() < 0.5 else self.deep(rng)

    def wide(self, rng: Generator) -> FactQuestion:
        """Ask for a table of a country's cities."""
        country = pick(rng, self.countries)
        names = self.cities_of(country)
        chosen = rng.permutation(["population", "founded", "river"])[: rng.integers(1, 4)].tolist()
        columns = " and ".join(COLUMN_WORDS[column] for column in chosen)
        asked = pick(rng, WIDE_WORDS).format(country=country, columns=columns)
        cells = [[self.cities[name][column] for column in chosen] for name in names]
        return FactQuestion(
            text=f"{asked} Answer with a table whose columns are city, {', '.join(chosen)}.",
            kind="wide",
            truth=[[name, *row] for name, row in zip(names, cells, strict=True)],
            header=["city", *chosen],
            path=[country, *names],
            evidence=[
                f"{country} has the cities {', '.join(names)}",
                *(
                    f"{name}: " + ", ".join(f"{c} {v}" for c, v in zip(chosen, row, strict=True))
                    for name, row in zip(names, cells, strict=True)
                ),
            ],
        )

    def join(self, rng: Generator) -> FactQuestion:
        """Ask along three chains whose ends have to be compared before the last step is known."""
        while True:
            chosen = [list(self.companies)[n] for n in rng.permutation(len(self.companies))[:3]]
            heads = [self.companies[name]["head"] for name in chosen]
            years = [self.people[head]["born"] for head in heads]
            if sorted(years)[0] != sorted(years)[1]:
                break
        oldest = heads[years.index(min(years))]
        city = self.people[oldest]["birthplace"]
        key = pick(rng, JOINS)
        asked = JOINS[key].format(companies=f"{', '.join(chosen[:2])} and {chosen[2]}")
        return FactQuestion(
            text=asked,
            kind="join",
            truth=[[self.cities[city][key]]],
            path=[*chosen, *heads, city],
            evidence=[
                *(f"the head of {c} is {head}" for c, head in zip(chosen, heads, strict=True)),
                *(f"{head} was born in {y}" for head, y in zip(heads, years, strict=True)),
                f"the oldest is {oldest}, born in {city}; the {KEY_WORDS[key]} is "
                f"{self.cities[city][key]}",
            ],
        )

    def deep(self, rng: Generator) -> FactQuestion:
        """Ask along a chain that begins at a company: two to four pages."""
        company = pick(rng, self.companies)
        steps, last, asked = pick(rng, CHAINS)
        record: dict[str, Any] = self.companies[company]
        title, path, evidence = company, [company], []
        for key, table in steps:
            evidence.append(f"the {KEY_WORDS[key]} of {title} is {record[key]}")
            title = record[key]
            record = getattr(self, table)[title]
            path.append(title)
        evidence.append(f"the {KEY_WORDS[last]} of {title} is {record[last]}")
        return FactQuestion(
            text=asked.format(company=company),
            kind="deep",
            truth=[[record[last]]],
            path=path,
            evidence=evidence,
        )


COLUMN_WORDS = {"population": "its population", "founded": "the year it was founded",
                "river": "its river"}  # fmt: skip
WIDE_WORDS = (
    "List every city of {country} with {columns}.",
    "Which cities does {country} have? Give for each {columns}.",
    "I need all cities of {country}, and for each of them {columns}.",
)
KEY_WORDS = {"head": "head", "birthplace": "birthplace", "country": "country", "city": "seat",
             "river": "river", "currency": "currency", "capital": "capital",
             "born": "year of birth", "population": "population",
             "profession": "profession"}  # fmt: skip
JOINS = {
    "country": "Of the heads of {companies}: in which country was the oldest born?",
    "river": "On which river was the oldest of the heads of {companies} born?",
    "population": "How many people live where the oldest of the heads of {companies} was born?",
}
Chain = tuple[tuple[tuple[str, str], ...], str, str]
CHAINS: tuple[Chain, ...] = (
    ((("head", "people"),), "profession", "What did the head of {company} learn?"),
    ((("head", "people"),), "born", "In which year was the head of {company} born?"),
    ((("city", "cities"),), "river", "On which river lies the town where {company} has its seat?"),
    ((("head", "people"), ("birthplace", "cities")), "country",
     "In which country was the head of {company} born?"),
    ((("head", "people"), ("birthplace", "cities")), "population",
     "How many people live where the head of {company} was born?"),
    ((("city", "cities"), ("country", "countries")), "currency",
     "In which currency are people paid at the seat of {company}?"),
    ((("head", "people"), ("birthplace", "cities"), ("country", "countries")), "capital",
     "What is the capital of the country where the head of {company} was born?"),
)  # fmt: skip
"""Which records to pass through from a company, what to ask of the last one, and in which words."""


def pick(rng: Generator, options: Any) -> Any:
    """Draw one of a sequence, or of a mapping's keys."""
    options = list(options)
    return options[rng.integers(len(options))]
