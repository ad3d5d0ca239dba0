"""The invented world: unique answers, pages that hold them, tables scored exactly."""

import asyncio

import numpy as np
import pytest

from data_modules.world.facts import Facts
from moonlit.agents.tables import read_table, score_table, write_table
from moonlit.agents.toolsets.library import Library, Page

FACTS = Facts(seed=3)
LIBRARY = Library(FACTS.pages())
TRUTH = [["Brun", "12000"], ["Kela", "9000"]]


def test_a_search_by_name_finds_its_page_first():
    names = [*FACTS.countries, *FACTS.cities, *FACTS.companies, *FACTS.people]

    found = [LIBRARY.search(name)[0].title for name in names]

    assert found == names


@pytest.mark.parametrize("number", range(40))
def test_the_answer_stands_on_the_pages_of_the_path(number: int):
    question = FACTS.question(np.random.default_rng(number))

    pages = [LIBRARY.pages[title].text for title in question.path]

    assert len(pages) == len(question.evidence)
    for row in question.truth:
        assert all(any(cell in page for page in pages) for cell in row)
    asked_for = "country" if question.kind == "wide" else "company"
    assert question.path[0] in question.text, asked_for


def test_the_same_seed_makes_the_same_world():
    assert Facts(seed=3).pages() == FACTS.pages()
    assert Facts(seed=4).pages() != FACTS.pages()


def test_search_and_open_answer_in_words():
    search, read = LIBRARY.tools()
    city = next(iter(FACTS.cities))

    found = asyncio.run(search.call({"query": city}))
    page = asyncio.run(read.call({"title": city}))
    missing = asyncio.run(read.call({"title": "Nowhere"}))
    nothing = asyncio.run(search.call({"query": "qqqq"}))

    assert found.text.startswith(f"1. {city}: ")
    assert FACTS.cities[city]["population"] in page.text
    assert missing.error == "there is no page 'Nowhere'; search first"
    assert nothing.text == "no page has any of these words"


def test_a_rare_word_weighs_more_than_a_common_one():
    library = Library([Page("a", "red red red"), Page("b", "red blue"), Page("c", "red green")])

    assert library.search("red blue")[0].title == "b"


@pytest.mark.parametrize(
    ("answer", "item_f1", "row_f1"),
    [
        (TRUTH, 1.0, 1.0),
        (TRUTH[::-1], 1.0, 1.0),
        ([["brun ", "12000"]], 2 * 2 / (2 + 4), 2 * 1 / (1 + 2)),
        ([["Brun", "1"], ["Kela", "9000"]], 3 / 4, 1 / 2),
        (TRUTH + TRUTH, 1.0, 1.0),
        ([], 0.0, 0.0),
        ([["12000", "Brun"]], 0.0, 0.0),
        ([*TRUTH, ["Made", "up"], ["Made", "too"]], 8 / 11, 4 / 6),
        ([["Brun", "9000"], ["Kela", "12000"]], 4 / 8, 0.0),  # each has the other's value
    ],
)
def test_tables_are_scored_by_items_and_rows(
    answer: list[list[str]], item_f1: float, row_f1: float
):
    score = score_table(answer, TRUTH)
    assert (score.item_f1, score.row_f1) == pytest.approx((item_f1, row_f1))


def test_a_written_table_reads_back():
    text = f"Here:\n\n{write_table(['city', 'population'], TRUTH)}\n| odd |\nThat is all."

    assert read_table(text, 2) == TRUTH
    assert read_table("Brun, 12000", 2) == []
    assert read_table("|a|b|\n|-|-|\n|Brun||", 2) == [["Brun", ""]]
