"""Messages as dictionaries in the OpenAI form: what sets of dialogues are written in."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL.Image import Image as PILImage

from moonlit.chat.messages import Image, Message, Part, Text, ToolCall
from moonlit.chat.template import with_call_ids


def openai_messages(
    messages: Sequence[Message], url_of: Callable[[PILImage], str]
) -> list[dict[str, Any]]:
    """Write a dialogue; sampled ids are left out, the words stay.

    Args:
        messages: the turns, in order.
        url_of: stores a picture and returns where it is.

    Raises:
        ValueError: if there is a clip: the form has no place for its timestamps.
    """
    return [openai_message(message, url_of) for message in with_call_ids(messages)]


def openai_message(message: Message, url_of: Callable[[PILImage], str]) -> dict[str, Any]:
    """Write one turn."""
    written: dict[str, Any] = {"role": message.role, "content": content(message.parts, url_of)}
    if message.role == "tool":
        written["tool_call_id"] = message.tool_call_id
    if message.thinking is not None:
        written["reasoning_content"] = message.thinking
    if message.tool_calls:
        written["tool_calls"] = [tool_call(call) for call in message.tool_calls]
    if message.name is not None:
        written["name"] = message.name
    return written


def tool_call(call: ToolCall) -> dict[str, Any]:
    """Write a call."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def content(parts: Sequence[Part], url_of: Callable[[PILImage], str]) -> str | list[dict[str, Any]]:
    """Write content: one text as it is, anything else as a list."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    return [part_of(part, url_of) for part in parts]


def part_of(part: Part, url_of: Callable[[PILImage], str]) -> dict[str, Any]:
    """Write a text or a picture."""
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Image():
            return {"type": "image_url", "image_url": {"url": url_of(part.image)}}
        case _:
            raise ValueError("a dialogue with a clip cannot be written in the OpenAI form")
