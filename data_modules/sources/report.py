"""The closing report of a source: what is in it, and what was left out and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from data_modules.components.document import Document
from data_modules.sources.rows import Skipped

EXAMPLES = 5
"""So many of each reason are named."""


@dataclass
class Report:
    """Counts of a shard or a source."""

    documents: int = 0
    text_tokens: int = 0
    vision_tokens: int = 0
    patches: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason, by name and detail."""
    unread: dict[str, int] = field(default_factory=dict)
    """Rows that have a key which is not read, by key."""

    def count(self, document: Document) -> None:
        """Count a document."""
        self.documents += 1
        self.text_tokens += len(document.input_ids) - document.num_vision_tokens
        self.vision_tokens += document.num_vision_tokens
        self.patches += document.num_patches

    def skip(self, skipped: Skipped) -> None:
        """Count something that is left out."""
        self.skipped[skipped.reason] = self.skipped.get(skipped.reason, 0) + 1
        examples = self.examples.setdefault(skipped.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{skipped.name}: {skipped.detail}" if skipped.detail else skipped.name)

    def note_unread(self, keys: Sequence[str]) -> None:
        """Count keys of a row that are not read."""
        for key in keys:
            self.unread[key] = self.unread.get(key, 0) + 1

    def add(self, other: "Report") -> None:
        """Add another report's counts."""
        self.documents += other.documents
        self.text_tokens += other.text_tokens
        self.vision_tokens += other.vision_tokens
        self.patches += other.patches
        for key, number in other.unread.items():
            self.unread[key] = self.unread.get(key, 0) + number
        for reason, number in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + number
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: EXAMPLES - len(examples)]

    def table(self, title: str) -> Table:
        """Draw it."""
        table = Table(title=title, title_justify="left", show_header=False)
        for name in ("documents", "text_tokens", "vision_tokens", "patches"):
            table.add_row(name.replace("_", " "), f"{getattr(self, name):,}")
        for reason, number in sorted(self.skipped.items()):
            table.add_row(f"skipped: {reason}", f"{number:,}, such as {self.examples[reason][0]}")
        if self.unread:
            counts = ", ".join(f"{key} ({number:,})" for key, number in sorted(self.unread.items()))
            table.add_row("keys that are not read", counts)
            table.caption = "source.reader.columns={image: img} reads img as an image"
        if any(number > 1 for number in self.skipped.values()):
            table.caption = f"{table.caption or ''}\nmore examples: {title}/source.json".strip()
        table.caption_justify = "left"
        return table
