"""One line of the set: a dialogue in the OpenAI message form, with where it comes from.

::

    {"messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "content": "", "reasoning_content": "...",
                   "tool_calls": [{"id": "functions.ipython:0", "type": "function",
                                   "function": {"name": "ipython", "arguments": "{...}"}}]},
                  {"role": "tool", "tool_call_id": "functions.ipython:0", "content": "..."},
                  {"role": "assistant", "content": "4", "reasoning_content": "..."}],
     "tools": [...],
     "provenance": {"source": "zero_vision", "family": "maze", "program": "bfs", "seed": 0,
                    "split": "train", "number": 17, "difficulty": 2, "truth": "24"}}

``data_modules.components.dialogue_files`` reads it. No line holds a picture: that is the point.
"""

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


def user(text: str) -> Message:
    """Write a question."""
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None) -> Message:
    """Write an answer; None: an instant one."""
    message: Message = {"role": "assistant", "content": text}
    return message if thinking is None else {**message, "reasoning_content": thinking}


def called(
    thinking: str, calls: Sequence[tuple[str, dict[str, Any], str]], before: Sequence[Message]
) -> list[Message]:
    """Write a turn of parallel calls and their results.

    Args:
        thinking: before the calls.
        calls: tool, arguments and what it returned, for each.
        before: the dialogue so far; calls are numbered through it.
    """
    first = sum(len(message.get("tool_calls", ())) for message in before)
    made, results = [], []
    for place, (name, arguments, output) in enumerate(calls, start=first):
        call_id = f"functions.{name}:{place}"
        written = json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": written}
        made.append({"id": call_id, "type": "function", "function": function})
        content = output or "(no output)"
        results.append({"role": "tool", "tool_call_id": call_id, "content": content})
    return [{**assistant("", thinking), "tool_calls": made}, *results]


def line(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], provenance: dict[str, Any]
) -> dict[str, Any]:
    """Put a line together."""
    return {"messages": list(messages), "tools": list(tools), "provenance": provenance}


def what_varies(value: dict[str, Any]) -> str:
    """Return a dialogue's words without its code: what makes it more than a copy of another."""
    return "\n".join(
        f"{message['content']}\n{message.get('reasoning_content') or ''}"
        for message in value["messages"]
    )
