"""Findings: what sub-agents brought back, where it came from, and where two of them disagree.

A finding states *claims*: the cells of a table ("Norvo / population"), lines ``KEY: VALUE``, or,
where there is neither, its whole answer to its task. Two findings that give one claim different
values are a conflict: both are kept, and shown side by side in the order of their tasks, whoever
came back first. Claims are read where the agent above can read them: in the answer as it is shown,
cut at ``max_result_chars``, but for a line that the cut goes through.

Source: none; the report says nothing of conflicting sub-agents. All of it is ours.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from moonlit.agents.tables import alternatives, read_header, read_table
from moonlit.batch import Trajectory

READS = {"open": "title"}
"""Tools that read a page, and the argument that names it."""
MAX_CLAIM_CHARS = 200
"""Of a claim, a value and a title that are shown; compared are whole claims."""
# Answers may be long: each of these reads a line once, whatever stands in it.
CONFIDENCE = re.compile(r"^confidence:\s*(\d+(?:\.\d+)?)\s*(%?)$", re.IGNORECASE)
BULLET = re.compile(r"[-*\s]*")
NO_KEY = re.compile(r"[|.]")
WORD = re.compile(r"[^\W_]")


@dataclass(frozen=True, kw_only=True)  # no slots: claims are read once
class Finding:
    """What one sub-agent answered."""

    agent: str
    task: str
    text: str
    """As the agent above is shown it."""
    pages: tuple[str, ...]
    """Titles that it, or an agent below it, has read."""
    confidence: float | None
    """In [0, 1], as it stated itself on a line ``confidence: ...``; None: it did not."""

    @property
    def provenance(self) -> str:
        """The pages and the confidence in words; empty where nothing is known."""
        told = [f"pages: {', '.join(self.pages)}"] if self.pages else []
        told += [f"confidence: {self.confidence:g}"] if self.confidence is not None else []
        return f"[{'; '.join(told)}]" if told else ""

    @cached_property
    def claims(self) -> dict[str, str]:
        """Values by claim."""
        if header := read_header(self.text):
            columns = [short(key_of(column)) for column in header[1:]]
            return {
                key_of(f"{row_key} / {column}"): cell
                for row in read_table(self.text, len(header))
                for row_key in [short(key_of(row[0]))]
                for column, cell in zip(columns, row[1:], strict=True)
            }
        lines = [line for line in self.text.splitlines() if not CONFIDENCE.match(line.strip())]
        if pairs := dict(filter(None, map(key_and_value, lines))):
            return {key_of(key): value for key, value in pairs.items()}
        return {key_of(self.task): " ".join(" ".join(lines).split())}


@dataclass(frozen=True, slots=True)
class Conflict:
    """One claim, and the findings that disagree about it."""

    claim: str
    findings: tuple[Finding, ...]

    @property
    def record(self) -> dict[str, object]:
        """The conflict as JSON."""
        return {
            "claim": self.claim[:MAX_CLAIM_CHARS],
            "findings": [
                {
                    "agent": finding.agent,
                    "value": finding.claims[self.claim][:MAX_CLAIM_CHARS],
                    "pages": list(finding.pages),
                    "confidence": finding.confidence,
                }
                for finding in self.findings
            ],
        }


def conflicts(findings: Sequence[Finding]) -> list[Conflict]:
    """Return the claims to which findings give different values, with all who make them."""
    by_claim: dict[str, list[Finding]] = {}
    values: dict[str, set[tuple[str, ...]]] = {}
    for finding in findings:
        for claim, value in finding.claims.items():
            by_claim.setdefault(claim, []).append(finding)
            values.setdefault(claim, set()).add(alternatives(value))
    return [
        Conflict(claim, tuple(some)) for claim, some in by_claim.items() if len(values[claim]) > 1
    ]


class Findings:
    """The findings of one agent's sub-agents, each read once, and compared when there are more.

    Args:
        max_chars: of an answer that the agent is shown.
    """

    def __init__(self, *, max_chars: int) -> None:
        self.max_chars = max_chars
        self.read: dict[int, Finding] = {}
        self.compared: tuple[int, list[Conflict]] = (0, [])
        self.told: set[tuple[str, int]] = set()

    def of(self, child: Trajectory) -> Finding:
        """Return what a sub-agent found; its rollout is over, and kept."""
        if id(child) not in self.read:
            self.read[id(child)] = finding_of(child, max_chars=self.max_chars)
        return self.read[id(child)]

    def conflicts(self, children: Sequence[Trajectory]) -> list[Conflict]:
        """Return what those who answered disagree about, in the order of their tasks."""
        answered = [
            child
            for child in children
            if child.error is None and child.stop_reason == "answer" and not is_garbage(child.text)
        ]
        if len(answered) != self.compared[0]:
            self.compared = len(answered), conflicts([self.of(child) for child in answered])
        return self.compared[1]

    def new_conflicts(self, children: Sequence[Trajectory]) -> list[Conflict]:
        """Return the conflicts that were not returned yet, or have grown."""
        new = []
        for one in self.conflicts(children):
            if (key := (one.claim, len(one.findings))) not in self.told:
                self.told.add(key)
                new.append(one)
        return new


def told(found: Sequence[Conflict]) -> str:
    """Write conflicts down, one JSON object a line: words of others, never an instruction."""
    return "\n".join(json.dumps(one.record, ensure_ascii=False) for one in found)


def key_and_value(line: str) -> tuple[str, str] | None:
    """Read ``KEY: VALUE``; None: a line is no such pair.

    A time of day and an address have no space behind the colon.
    """
    key, _, value = line.partition(":")
    if not value[:1].isspace():
        return None
    key, value = BULLET.sub("", key, count=1), value.strip()
    return (key, value) if value and re.search(r"\w", key) and not NO_KEY.search(key) else None


def finding_of(child: Trajectory, *, max_chars: int | None = None) -> Finding:
    """Return what a sub-agent's rollout found.

    Args:
        child: the rollout.
        max_chars: of its answer that the agent above is shown; None: all of it. The confidence is
            read from all of it: it is told on a line of its own.
    """
    return Finding(
        agent=child.agent,
        task=task_of(child),
        text=child.text if max_chars is None else whole_lines(child.text, max_chars),
        pages=tuple(dict.fromkeys(pages_read(child))),
        confidence=stated_confidence(child.text),
    )


def whole_lines(text: str, max_chars: int) -> str:
    """Return the lines that fit in so many characters; of a first one that does not, what fits."""
    shown = text[:max_chars]
    if len(text) <= max_chars or text[max_chars] == "\n":
        return shown
    return shown.rpartition("\n")[0] or shown


def stated_confidence(text: str) -> float | None:
    """Read the last line ``confidence: 0.8`` or ``confidence: 80 %``; None: there is none."""
    for line in reversed(text.splitlines()):
        if match := CONFIDENCE.match(line.strip()):
            value = float(match[1]) / (100 if match[2] else 1)
            return value if value <= 1 else None
    return None


def pages_read(trajectory: Trajectory) -> Iterator[str]:
    """Yield the pages that a rollout and all below it have read."""
    for place, message in enumerate(trajectory.messages):
        # Results stand behind their turn in the order of its calls: ids are the model's own words.
        results = trajectory.messages[place + 1 : place + 1 + len(message.tool_calls)]
        for call, result in zip(message.tool_calls, results, strict=False):
            argument = READS.get(call.name)
            if argument in call.arguments and not result.words.startswith("Error: "):
                yield str(call.arguments[argument])[:MAX_CLAIM_CHARS]
    for child in trajectory.children:
        yield from pages_read(child)


def task_of(child: Trajectory) -> str:
    """Return the words of a sub-agent's task: its last prompt message."""
    return child.prompt[-1].words if child.prompt else ""


def is_garbage(text: str) -> bool:
    """Whether an answer has no letter and no digit in it."""
    return WORD.search(text) is None


def key_of(claim: str) -> str:
    """Return a claim with single spaces, in lower case."""
    return " ".join(claim.casefold().split())


def short(key: str) -> str:
    """Return a key that stands in many claims: of a long one the beginning, and a digest of all."""
    if len(key) <= MAX_CLAIM_CHARS:
        return key
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{key[:MAX_CLAIM_CHARS]} {digest}"
