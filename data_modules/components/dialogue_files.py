"""Dialogues in JSON Lines, in the OpenAI message form, to messages and tool declarations.

One object a line::

    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}

``content`` is a text, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image_url",
"image_url": {"url": ...}}`` (a ``data:`` URI, or a path relative to the file), also ``video_url``;
or of parts as ``sources/rows.py`` has them. An assistant may
have ``reasoning_content`` and ``tool_calls``; a ``tool`` message names its call by
``tool_call_id``. Call ids become ``functions.NAME:INDEX``, as the chat format wants them. Other
keys of the object are left to their writer.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from moonlit.chat.messages import (
    Image,
    MediaFile,
    Message,
    Role,
    Text,
    ToolCall,
    VideoChunk,
)
from moonlit.chat.template import call_id
from moonlit.chat.vision_processing import open_image


class BadDialogueError(ValueError):
    """A line that is no dialogue; names the file, the line and the reason."""


@dataclass(slots=True, kw_only=True)
class Dialogue:
    """Messages in order, and the tools that were declared."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Pictures in all messages."""
        return sum(isinstance(part, Image) for m in self.messages for part in m.parts)


def line_starts(path: Path) -> list[int]:
    """Byte offsets at which the non-blank lines of a file begin.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    starts, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                starts.append(offset)
            offset += len(line)
    return starts


def read_dialogue(path: Path, start: int) -> Dialogue:
    """Read the dialogue on the line that begins at a byte offset.

    Raises:
        BadDialogueError: if it is none.
    """
    with path.open("rb") as file:
        file.seek(start)
        line = file.readline()
    try:
        return parse_dialogue(json.loads(line), media=PicturesIn(path.parent))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        number = path.read_bytes()[:start].count(b"\n") + 1
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise BadDialogueError(f"{path}, line {number}: {reason}") from error


Parts = Sequence[Text | Image | VideoChunk]
ReadMedium = Callable[[str, Any], Parts]
"""Reads a medium, given ``image``, ``video`` or ``audio`` and what stands there."""


@dataclass(frozen=True, slots=True)
class PicturesIn:
    """Reads pictures from ``data:`` URIs and from files of a folder, and no other media."""

    folder: Path

    def __call__(self, kind: str, url: Any) -> Parts:
        """Open one."""
        if kind != "image":
            raise ValueError(f"a part of type {kind!r}: want text or image_url")
        name, data = "picture", b""
        if not isinstance(url, str):
            raise ValueError(f"a picture is {type(url).__name__}: want a path or a data: URI")
        if url.startswith("data:"):
            try:
                data = base64.b64decode(url.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise ValueError(f"a picture's data: URI is not base64: {error}") from error
        else:
            path = self.folder / url
            if not path.is_file():
                raise ValueError(f"no picture at {path}")
            name, data = str(path), path.read_bytes()
        return [Image(open_image(data, name), MediaFile(data, "picture"))]


def parse_dialogue(value: Any, *, media: ReadMedium) -> Dialogue:
    """Read a decoded line.

    Raises:
        ValueError, KeyError, TypeError: if it is no dialogue.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list):
        raise ValueError('want an object with a list "messages"')
    reader = MessageReader(media)
    messages = [reader.message(message) for message in value["messages"]]
    if unanswered := [own for own, answered in reader.answered.items() if not answered]:
        raise ValueError(f"tool calls without a result: {', '.join(unanswered)}")
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no assistant message: there is nothing to learn")
    if not any(message.role == "user" for message in messages):
        raise ValueError("no user message")
    return Dialogue(messages=messages, tools=list(value.get("tools") or []))


class MessageReader:
    """Reads messages in order and renames their calls.

    Args:
        media: reads pictures and videos.
    """

    def __init__(self, media: ReadMedium) -> None:
        self.media = media
        self.names: dict[str, tuple[str, str]] = {}
        """For each call's id in the file: our id and the tool's name."""
        self.answered: dict[str, bool] = {}

    def message(self, value: Any) -> Message:
        """Read one message."""
        if not isinstance(value, dict):
            raise ValueError(f"a message is {value!r}: want an object")
        role = value["role"]
        if role == "tool":
            return self.tool_result(value)
        if role not in get_args(Role):
            raise ValueError(f"role={role!r}: want one of {get_args(Role)}")
        pending = [own for own, answered in self.answered.items() if not answered]
        if pending:
            raise ValueError(f"message of {role} before the result of {', '.join(pending)}")
        return Message(
            role=role,
            content=self.content(value.get("content")),
            name=value.get("name"),
            thinking=value.get("reasoning_content"),
            tool_calls=[self.call(call) for call in value.get("tool_calls") or []],
        )

    def tool_result(self, value: dict[str, Any]) -> Message:
        """Read the answer to a call that was made before."""
        theirs = value["tool_call_id"]
        if theirs not in self.names:
            raise ValueError(f"a tool message answers {theirs!r}, which nobody called")
        own, tool = self.names[theirs]
        if self.answered[own]:
            raise ValueError(f"a second result of the call {theirs!r}")
        self.answered[own] = True
        content = self.content(value.get("content"))
        return Message(role="tool", content=content, name=tool, tool_call_id=own)

    def call(self, value: Any) -> ToolCall:
        """Read a call; its arguments are a JSON object, or the text of one."""
        tool, arguments = value["function"]["name"], value["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of {tool!r} are {arguments!r}: want a JSON object")
        own = call_id(tool, len(self.answered))
        theirs = value.get("id", own)
        if theirs in self.names:
            raise ValueError(f"two calls have the id {theirs!r}")
        self.names[theirs], self.answered[own] = (own, tool), False
        return ToolCall(tool, arguments, own)

    def content(self, value: Any) -> Parts:
        """Read a text or a list of parts."""
        if value is None:
            return ()
        return (Text(value),) if isinstance(value, str) else tuple(self.parts(value))

    def parts(self, values: Any) -> Iterator[Text | Image | VideoChunk]:
        """Read parts."""
        for value in values:
            kind = value.get("type") or next((k for k, v in value.items() if v is not None), "none")
            name = kind.removesuffix("_url")
            if kind == "text":
                yield Text(value["text"])
            elif name == kind and name in ("image", "video", "audio"):
                yield from self.media(name, value.get(kind))
            elif name in ("image", "video", "audio"):
                yield from self.media(name, value[kind]["url"])
            else:
                raise ValueError(f"a part of type {kind!r}: want text or image_url")
