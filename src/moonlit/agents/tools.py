"""Tools: what a model may call, and how its calls are answered.

A tool is a name, a JSON schema of its arguments and an async function that returns text and images
or an error text. A toolset answers every call of a turn at the same time. Whatever the model wrote
is answered, never raised: a call that cannot be read, a tool that does not exist, arguments that
do not fit the schema, a tool that fails.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from moonlit.agents.schema import mismatch
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Part, Text, ToolCall
from moonlit.chat.parser import ParsedTurn

MAX_ARGUMENT_CHARS = 1_000_000
UNREADABLE = "unreadable"
"""Stands for the id of calls that could not be read."""


@dataclass(slots=True, kw_only=True)
class ToolOutput:
    """What a call returned."""

    text: str = ""
    images: Sequence[Image.Image] = ()
    error: str | None = None
    """What went wrong, in words for the model; None: nothing."""

    @property
    def parts(self) -> list[Part]:
        """The output as a message's content."""
        lines = [self.text.rstrip("\n")] if self.text else []
        if self.error is not None and self.error not in self.text:
            lines.append(f"Error: {self.error}")
        return [Text("\n".join(lines) or "(no output)"), *map(ImagePart, self.images)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function that a model may call."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object."""
    call: Callable[[dict[str, Any]], Awaitable[ToolOutput]]

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool as ``moonlit.chat.tool_declarations`` and the OpenAI form want it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


def nothing_to_say() -> Message | None:
    """Say nothing after a turn."""
    return None


@dataclass(slots=True)
class Toolset:
    """The tools of one rollout.

    Raises:
        ValueError: if two tools have one name.
    """

    tools: Sequence[Tool]
    after_turn: Callable[[], Message | None] = nothing_to_say
    """Asked once all calls of a turn are answered: what they say together."""
    num_calls: int = 0
    num_refused: int = 0
    """Calls that no tool saw: unreadable, unknown or with wrong arguments."""
    failures: list[str] = field(default_factory=list)
    """Exceptions that tools raised: our faults, to be looked at."""

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError(f"tools {names}: two have one name")

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """Declarations for the prompt."""
        return [tool.declaration for tool in self.tools]

    async def answer(self, turn: ParsedTurn) -> list[Message]:
        """Return one tool message a call, in order, then one for all that could not be read."""
        calls = turn.message.tool_calls
        outputs = await asyncio.gather(*map(self.run, calls))
        messages = [
            tool_message(call.name, call.id or call.name, output)
            for call, output in zip(calls, outputs, strict=True)
        ]
        if turn.errors:
            self.num_refused += 1
            output = ToolOutput(error="; ".join(turn.errors)[:2000])
            messages.append(tool_message(UNREADABLE, UNREADABLE, output))
        together = self.after_turn()
        return messages if together is None else [*messages, together]

    async def run(self, call: ToolCall) -> ToolOutput:
        """Make one call."""
        self.num_calls += 1
        if (complaint := self.complaint(call)) is not None:
            self.num_refused += 1
            return ToolOutput(error=complaint)
        tool = next(tool for tool in self.tools if tool.name == call.name)
        try:
            return await tool.call(call.arguments)
        except Exception as error:  # a tool's fault is the model's observation, and is counted
            self.failures.append(f"{call.name}: {type(error).__name__}: {error}")
            return ToolOutput(error=f"{call.name} failed: {type(error).__name__}: {error}"[:2000])

    def complaint(self, call: ToolCall) -> str | None:
        """Say what is wrong with a call before any tool sees it."""
        tools = {tool.name: tool for tool in self.tools}
        if call.name not in tools:
            return f"there is no tool {call.name[:100]!r}; there are {', '.join(tools) or 'none'}"
        num_chars = len(json.dumps(call.arguments, ensure_ascii=False))
        if num_chars > MAX_ARGUMENT_CHARS:
            return f"arguments of {num_chars} characters: want at most {MAX_ARGUMENT_CHARS}"
        return mismatch(call.arguments, tools[call.name].parameters)


def tool_message(name: str, call_id: str, output: ToolOutput) -> Message:
    """Return an output as the message that answers a call."""
    return Message(role="tool", content=output.parts, name=name, tool_call_id=call_id)
