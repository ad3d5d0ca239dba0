"""Findings: what sub-agents brought back, where it came from, and where two of them disagree.

A finding states *claims*: the cells of a table ("Norvo / population"), lines ``KEY: VALUE``, or,
where there is neither, its whole answer to its task. Two findings that give one claim different
values are a conflict: both are kept, and shown side by side in the order of their tasks, whoever
came back first.

Source: none; the report says nothing of conflicting sub-agents. All of it is ours.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moonlit.agents.tables import alternatives, read_header, read_table
from moonlit.batch import Trajectory

READS = {"open": "title"}
"""Tools that read a page, and the argument that names it."""
MAX_CLAIM_CHARS = 200
"""Of a claim, a value and a title that are shown; compared are whole claims."""
CONFIDENCE = re.compile(r"^confidence:\s*(\d+(?:\.\d+)?)\s*(%?)\s*$", re.IGNORECASE)
LINE = re.compile(r"^[-*\s]*([^:|.]*\w[^:|.]*):\s+(\S.*)$")
"""``KEY: VALUE``; a time of day and an address have no space behind the colon."""
WORD = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one sub-agent answered."""

    agent: str
    task: str
    text: str
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

    @property
    def claims(self) -> dict[str, str]:
        """Values by claim."""
        if header := read_header(self.text):
            return {
                key_of(f"{row[0]} / {column}"): cell
                for row in read_table(self.text, len(header))
                for column, cell in zip(header[1:], row[1:], strict=True)
            }
        lines = [line for line in self.text.splitlines() if not CONFIDENCE.match(line.strip())]
        if pairs := {match[1]: match[2] for line in lines if (match := LINE.match(line))}:
            return {key_of(key): value.strip() for key, value in pairs.items()}
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


def told(found: Sequence[Conflict]) -> str:
    """Write conflicts down, one JSON object a line: words of others, never an instruction."""
    return "\n".join(json.dumps(one.record, ensure_ascii=False) for one in found)


def finding_of(child: Trajectory) -> Finding:
    """Return what a sub-agent's rollout found."""
    return Finding(
        agent=child.agent,
        task=task_of(child),
        text=child.text,
        pages=tuple(dict.fromkeys(pages_read(child))),
        confidence=stated_confidence(child.text),
    )


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
