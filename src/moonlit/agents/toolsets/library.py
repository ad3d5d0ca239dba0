"""The ``search`` and ``open`` tools over a collection of short pages.

Ranking is BM25 with k1 = 1.2 and b = 0.75 (Robertson and Zaragoza, 2009); ties go to the earlier
page, so the same query always returns the same list.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moonlit.agents.tools import Tool, ToolOutput

K1, B = 1.2, 0.75
NUM_RESULTS = 5
SNIPPET_CHARS = 120
WORD = re.compile(r"\w+")
SEARCH = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "words to look for", "minLength": 1}},
    "required": ["query"],
    "additionalProperties": False,
}
OPEN = {
    "type": "object",
    "properties": {"title": {"type": "string", "description": "a title that search returned"}},
    "required": ["title"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Page:
    """One page; titles are unique."""

    title: str
    text: str


class Library:
    """Pages and their index.

    Raises:
        ValueError: if there are none, or two have one title.
    """

    def __init__(self, pages: Sequence[Page]) -> None:
        self.pages = {page.title: page for page in pages}
        if not pages or len(self.pages) < len(pages):
            raise ValueError(f"{len(pages)} pages with {len(self.pages)} titles: want unique ones")
        self.titles = list(self.pages)
        self.places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """For each word the pages that have it, and how often."""
        self.lengths = []
        for number, page in enumerate(pages):
            words = Counter(words_of(f"{page.title} {page.title} {page.text}"))
            self.lengths.append(words.total())
            for word, times in words.items():
                self.places[word].append((number, times))
        self.mean_length = sum(self.lengths) / len(self.lengths)

    def search(self, query: str, num_results: int = NUM_RESULTS) -> list[Page]:
        """Return the pages that fit a query best, none that shares no word with it."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words_of(query)):
            places = self.places.get(word, ())
            rarity = math.log(1 + (len(self.titles) - len(places) + 0.5) / (len(places) + 0.5))
            for number, times in places:
                length = 1 - B + B * self.lengths[number] / self.mean_length
                scores[number] += rarity * times * (K1 + 1) / (times + K1 * length)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:num_results]
        return [self.pages[self.titles[number]] for number in best]

    async def call_search(self, arguments: dict[str, Any]) -> ToolOutput:
        """Answer ``search``."""
        found = self.search(arguments["query"])
        lines = [
            f"{n}. {page.title}: {snippet(page.text)}" for n, page in enumerate(found, start=1)
        ]
        return ToolOutput(text="\n".join(lines) or "no page has any of these words")

    async def call_open(self, arguments: dict[str, Any]) -> ToolOutput:
        """Answer ``open``."""
        title = arguments["title"]
        if title not in self.pages:
            return ToolOutput(error=f"there is no page {title[:100]!r}; search first")
        return ToolOutput(text=self.pages[title].text)

    def tools(self) -> list[Tool]:
        """Return the two tools."""
        return [
            Tool(
                name="search",
                description=f"Search the library; returns up to {NUM_RESULTS} titles with the "
                "beginning of each page.",
                parameters=SEARCH,
                call=self.call_search,
            ),
            Tool(
                name="open",
                description="Read a page of the library.",
                parameters=OPEN,
                call=self.call_open,
            ),
        ]


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case."""
    return WORD.findall(text.lower())


def snippet(text: str) -> str:
    """Return the beginning of a page, cut at a word."""
    text = " ".join(text.split())
    return text if len(text) <= SNIPPET_CHARS else text[:SNIPPET_CHARS].rsplit(" ", 1)[0] + " ..."
