"""Text SFT for balance: documentation, arithmetic and reasoning with worked steps, searches.

Each maker returns one dialogue and is a function of its random numbers. Arithmetic and reasoning
answers are computed, never written by hand; searches call the real tools.
"""

import ast
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_modules.world.docs import is_held_out, library_files, named_docstrings
from data_modules.world.facts import FactQuestion, Facts
from data_modules.zero_vision.lines import assistant, called, user
from data_modules.zero_vision.problem import Rng, pick
from moonlit.agents.tables import write_table
from moonlit.agents.toolsets.library import Library

MAX_ANSWER_CHARS = 400
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hal")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
Dialogue = tuple[str, list[dict[str, Any]], list[dict[str, Any]], str]
"""Kind, messages, tools, truth."""


def talk(kind: str, question: str, steps: list[str], answer: str) -> Dialogue:
    """Write a question, the steps as thinking, and the answer."""
    return kind, [user(question), assistant(answer, "\n".join(steps))], [], answer


def addition(rng: Rng) -> Dialogue:
    """Column addition of two to four numbers, or a difference."""
    size = 10 ** int(rng.integers(2, 6))
    terms = [int(v) for v in rng.integers(1, size, size=rng.integers(2, 5))]
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}")
        total += term
    sum_ = " + ".join(map(str, terms))
    question = pick(rng, f"What is {sum_}?", f"Add up: {sum_}.", f"Compute {sum_}.")
    return talk("addition", question, steps, f"{total}")


def multiplication(rng: Rng) -> Dialogue:
    """Long multiplication, digit by digit."""
    one, other = int(rng.integers(12, 9999)), int(rng.integers(12, 999))
    steps, total = [], 0
    for place, digit in enumerate(reversed(str(other))):
        part = one * int(digit) * 10**place
        steps.append(f"{one} * {int(digit) * 10**place} = {part}")
        total += part
    steps.append(f"Together {total}.")
    question = pick(rng, f"What is {one} * {other}?", f"Multiply {one} by {other}.")
    return talk("multiplication", question, steps, f"{total}")


def division(rng: Rng) -> Dialogue:
    """Long division with a remainder."""
    divisor, number = int(rng.integers(3, 99)), int(rng.integers(100, 99999))
    steps, rest, quotient = [], 0, ""
    for digit in str(number):
        rest = rest * 10 + int(digit)
        steps.append(f"{rest} / {divisor} = {rest // divisor}, remainder {rest % divisor}")
        quotient, rest = quotient + str(rest // divisor), rest % divisor
    steps.append(f"So {int(quotient)} times, and {rest} is left.")
    question = pick(
        rng,
        f"Divide {number} by {divisor}: quotient and remainder?",
        f"What is {number} divided by {divisor}, with remainder?",
    )
    return talk("division", question, steps, f"{int(quotient)}, remainder {rest}")


def divisor(rng: Rng) -> Dialogue:
    """Euclid's algorithm."""
    factor = int(rng.integers(1, 60))
    one, other = (factor * int(v) for v in rng.integers(2, 90, size=2))
    steps, a, b = [], max(one, other), min(one, other)
    while b:
        steps.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    question = f"What is the greatest common divisor of {one} and {other}?"
    return talk("divisor", question, steps, f"{a}")


def sequence(rng: Rng) -> Dialogue:
    """The next number where differences grow by a constant."""
    value, step, growth = (int(v) for v in rng.integers(1, 30, size=3))
    growth = growth % 7
    values = [value]
    for place in range(5):
        values.append(values[-1] + step + growth * place)
    gaps = [b - a for a, b in itertools.pairwise(values[:-1])]
    steps = [
        f"Differences: {', '.join(map(str, gaps))}.",
        f"They grow by {growth} each time, so the next is {gaps[-1] + growth}.",
        f"{values[-2]} + {gaps[-1] + growth} = {values[-1]}",
    ]
    shown = ", ".join(map(str, values[:-1]))
    question = pick(rng, f"What comes next: {shown}?", f"Continue the sequence {shown}.")
    return talk("sequence", question, steps, f"{values[-1]}")


def order(rng: Rng) -> Dialogue:
    """Who stands at a place of an order given by pairs."""
    people = [str(name) for name in rng.permutation(NAMES)[: rng.integers(3, 7)]]
    pairs = list(itertools.pairwise(people))
    clues = [f"{a} is taller than {b}" for a, b in (pairs[i] for i in rng.permutation(len(pairs)))]
    place = int(rng.integers(len(people)))
    steps = ["Chain the clues from the one nobody is taller than: " + " > ".join(people) + "."]
    steps += [f"Place {place + 1} in it is {people[place]}."]
    question = f"{'. '.join(clues)}. Who is number {place + 1} when sorted from tall to short?"
    return talk("order", question, steps, people[place])


def weekday(rng: Rng) -> Dialogue:
    """The weekday some days on."""
    start, days = int(rng.integers(7)), int(rng.integers(3, 400))
    steps = [f"{days} mod 7 = {days % 7}"]
    steps += [f"{DAYS[start]} plus {days % 7} days is {DAYS[(start + days) % 7]}."]
    question = pick(
        rng,
        f"Today is {DAYS[start]}. Which weekday is it in {days} days?",
        f"If it is {DAYS[start]} now, what day will it be {days} days from now?",
    )
    return talk("weekday", question, steps, DAYS[(start + days) % 7])


def sorting(rng: Rng) -> Dialogue:
    """Insertion sort."""
    values = [int(v) for v in rng.integers(0, 500, size=rng.integers(4, 9))]
    done: list[int] = []
    steps = []
    for value in values:
        done = sorted([*done, value])
        steps.append(f"insert {value}: {done}")
    question = f"Sort in ascending order: {', '.join(map(str, values))}."
    return talk("sorting", question, steps, ", ".join(map(str, done)))


def truth_value(rng: Rng) -> Dialogue:
    """A Boolean expression, from the inside out."""
    a, b, c = (bool(v) for v in rng.integers(2, size=3))
    first, second = (str(v) for v in rng.choice(["and", "or"], 2))
    inner = (a and b) if first == "and" else (a or b)
    negated = bool(rng.integers(2))
    left = not inner if negated else inner
    outer = (left and c) if second == "and" else (left or c)
    sign = "not " if negated else ""
    steps = [f"{a} {first} {b} is {inner}."]
    steps += [f"not {inner} is {left}."] if negated else []
    steps += [f"{left} {second} {c} is {outer}."]
    question = pick(rng, "Evaluate", "What is the value of", "Is this true or false:")
    question += f" {sign}({a} {first} {b}) {second} {c}"
    return talk(
        "truth_value", question + ("" if question.startswith("Eval") else "?"), steps, f"{outer}"
    )


@lru_cache
def documented(held_out: bool) -> list[tuple[str, str]]:
    """Names of the standard library with the first paragraph of their documentation."""
    found = []
    for place, path in enumerate(library_files()):
        if is_held_out(place) == held_out:
            found += list(summaries(path))
    return found


def summaries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the public names of a module with their first paragraphs."""
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for text in named_docstrings(tree, path.stem):
        name, _, rest = text.partition("\n\n")
        summary = " ".join(rest.split("\n\n")[0].split())
        public = not any(part.startswith("_") for part in name.split("."))
        if public and "." in name and 30 <= len(summary) <= MAX_ANSWER_CHARS and summary.isascii():
            yield name, summary


def documentation(rng: Rng, *, held_out: bool) -> Dialogue:
    """What something of Python's library is for, in the words of its documentation."""
    names = documented(held_out)
    name, summary = names[rng.integers(len(names))]
    question = pick(
        rng,
        "What is {name} for?",
        "What does the Python documentation say about {name}?",
        "Explain {name} from Python's standard library.",
        "I came across {name} in some Python code. What is it?",
    ).format(name=f"`{name}`")
    module, _, rest = name.partition(".")
    thinking = f"{rest} belongs to the module {module} of Python's standard library."
    messages = [user(question), assistant(summary, thinking)]
    return "documentation", messages, [], summary


class Searches:
    """Search dialogues over one invented world; the held-out ones have another."""

    def __init__(self, seed: int) -> None:
        self.facts = Facts(seed)
        self.library = Library(self.facts.pages())
        self.tools = [tool.declaration for tool in self.library.tools()]

    async def dialogue(self, rng: Rng) -> Dialogue:
        """Search for the first page, then read page after page, wide ones all at once."""
        question = self.facts.question(rng)
        messages: list[dict[str, Any]] = [user(question.text)]
        first = question.path[0]
        plan = pick(rng, f"I start with {first}.", f"Let me look up {first} first.")
        messages += await self.calls("search", [first], plan, messages)
        messages += await self.calls("open", [first], f"The page on {first} is there.", messages)
        thinking = f"It says that {question.evidence[0]}."
        if question.kind == "wide":
            messages += await self.calls("open", question.path[1:], thinking, messages)
            return "wide_search", [*messages, self.table(question)], self.tools, "see the table"
        for title, told in zip(question.path[1:], question.evidence[1:], strict=True):
            messages += await self.calls("open", [title], thinking, messages)
            thinking = f"So {told}."
        answer = question.truth[0][0]
        return "deep_search", [*messages, assistant(answer, thinking)], self.tools, answer

    async def calls(
        self, tool: str, values: list[str], thinking: str, before: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Call a tool on each value, in one turn."""
        search, read = self.library.tools()
        used, key = (search, "query") if tool == "search" else (read, "title")
        made = [(tool, {key: value}, (await used.call({key: value})).text) for value in values]
        return called(thinking, made, before)

    def table(self, question: FactQuestion) -> dict[str, Any]:
        """Answer a wide question from what the pages said."""
        thinking = "All pages are read: " + "; ".join(question.evidence[1:]) + "."
        return assistant(write_table(question.header, question.truth), thinking)


WORKED = (addition, multiplication, division, divisor, sequence, order, weekday, sorting,
          truth_value)  # fmt: skip
