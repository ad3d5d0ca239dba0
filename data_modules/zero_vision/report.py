"""What a set holds: by family how many were tried and kept, how hard and how long they are."""

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from rich.table import Table

from moonlit.chat.messages import Message, ToolCall
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer


class Report:
    """Counts lines as they are kept or rejected."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.rejected: dict[str, Counter[str]] = defaultdict(Counter)
        self.difficulties: dict[str, Counter[int]] = defaultdict(Counter)
        self.num_calls: dict[str, list[int]] = defaultdict(list)
        self.num_tokens: dict[str, list[int]] = defaultdict(list)

    @property
    def num_kept(self) -> int:
        """Lines kept so far."""
        return sum(map(len, self.num_tokens.values()))

    def reject(self, family: str, reason: str) -> None:
        """Count a problem without a line."""
        self.rejected[family][reason] += 1

    def keep(self, line: dict[str, Any]) -> None:
        """Count a line."""
        provenance = line["provenance"]
        family = provenance["family"]
        self.difficulties[family][provenance["difficulty"]] += 1
        self.num_calls[family].append(
            sum(len(message.get("tool_calls", ())) for message in line["messages"])
        )
        messages = [as_message(message) for message in line["messages"]]
        ids = render(messages, self.tokenizer, tools=line["tools"]).input_ids
        self.num_tokens[family].append(len(ids))

    def reasons(self) -> dict[str, int]:
        """Rejections of all families by reason."""
        return dict(sum(self.rejected.values(), Counter()))

    def as_json(self) -> dict[str, Any]:
        """Return every number of the table."""
        return {
            "num_lines": self.num_kept,
            "num_tokens": sum(map(sum, self.num_tokens.values())),
            "families": {
                family: {
                    "kept": len(tokens),
                    "rejected": dict(self.rejected[family]),
                    "difficulty": {str(k): n for k, n in sorted(self.difficulties[family].items())},
                    "mean_calls": float(np.mean(self.num_calls[family])),
                    "median_tokens": float(np.median(tokens)),
                    "p95_tokens": float(np.quantile(tokens, 0.95)),
                    "max_tokens": max(tokens),
                }
                for family, tokens in self.num_tokens.items()
            },
        }

    def table(self) -> Table:
        """Lay it out for reading."""
        table = Table(title="dialogues", title_justify="left")
        table.add_column("family", no_wrap=True)
        for column in ("kept", "rejected", "easy/mid/hard", "calls", "tokens", "p95", "max"):
            table.add_column(column, justify="right", no_wrap=True)
        for family, row in self.as_json()["families"].items():
            table.add_row(
                family,
                f"{row['kept']}",
                f"{sum(self.rejected[family].values())}",
                "/".join(f"{self.difficulties[family][level]}" for level in (1, 2, 3)),
                f"{row['mean_calls']:.1f}",
                *(f"{row[key]:.0f}" for key in ("median_tokens", "p95_tokens", "max_tokens")),
            )
        return table


def as_message(value: dict[str, Any]) -> Message:
    """Read one of our own messages."""
    calls = [
        ToolCall(c["function"]["name"], json.loads(c["function"]["arguments"]), c["id"])
        for c in value.get("tool_calls", ())
    ]
    return Message(
        role=value["role"],
        content=value["content"],
        thinking=value.get("reasoning_content"),
        tool_calls=calls,
        tool_call_id=value.get("tool_call_id"),
        name="ipython" if value["role"] == "tool" else None,
    )
