"""A few dialogues in JSON Lines, by hand."""

import json
from pathlib import Path
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "ipython",
        "description": "Run code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}


def question(number: int) -> dict[str, Any]:
    """One turn, no tools."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} + 1?"},
            {"role": "assistant", "content": str(number + 1)},
        ]
    }


def with_tool(number: int) -> dict[str, Any]:
    """A call under a foreign id, its result, and a second user turn."""
    call = {"name": "ipython", "arguments": json.dumps({"code": f"print({number} * 2)"})}
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "system", "content": "You compute."},
            {"role": "user", "content": [{"type": "text", "text": f"Twice {number}?"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I run it.",
                "tool_calls": [{"id": "call_x", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_x", "content": f"{number * 2}\n"},
            {"role": "assistant", "content": str(number * 2)},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "Welcome."},
        ],
    }


def write_lines(path: Path, values: list[Any]) -> Path:
    """Write one value a line; strings as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_set(folder: Path) -> Path:
    """A training and a held-out file."""
    write_lines(folder / "train-0.jsonl", [question(n) for n in range(23)])
    write_lines(folder / "train-1.jsonl", [with_tool(n) for n in range(11)])
    write_lines(folder / "held_out.jsonl", [question(100), with_tool(200)])
    return folder
