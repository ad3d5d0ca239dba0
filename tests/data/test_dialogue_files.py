"""JSON Lines in the OpenAI message form, and what is none."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from dialogue_lines import TOOL, question, with_tool, write_lines
from PIL import Image as Pictures

from data_modules.components.dialogue_files import BadDialogueError, line_starts, read_dialogue
from moonlit.chat.messages import Image, Text


def test_a_dialogue_is_read_as_it_was_written(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [question(1), "", with_tool(4)])
    starts = line_starts(path)
    assert len(starts) == 2  # the blank line is none
    dialogue = read_dialogue(path, starts[1])

    assert [m.role for m in dialogue.messages] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip
    asked, result = dialogue.messages[2], dialogue.messages[3]
    assert asked.thinking == "I run it."
    assert asked.parts == ()
    assert asked.tool_calls[0].arguments == {"code": "print(4 * 2)"}
    assert asked.tool_calls[0].id == result.tool_call_id == "functions.ipython:0"
    assert result.name == "ipython"
    assert result.parts == (Text("8\n"),)
    assert dialogue.tools == [TOOL]


def test_calls_are_numbered_over_the_whole_dialogue(tmp_path: Path):
    def call(own_id: str) -> dict[str, Any]:
        return {"id": own_id, "function": {"name": "ipython", "arguments": {"code": "1"}}}

    value = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [call("b"), call("a")]},
            {"role": "tool", "tool_call_id": "a", "content": "second"},
            {"role": "tool", "tool_call_id": "b", "content": "first"},
            {"role": "assistant", "content": "", "tool_calls": [call("c")]},
            {"role": "tool", "tool_call_id": "c", "content": "third"},
            {"role": "assistant", "content": "done"},
        ]
    }
    dialogue = read_dialogue(write_lines(tmp_path / "a.jsonl", [value]), 0)
    results = {m.tool_call_id: m.parts[0].text for m in dialogue.messages if m.role == "tool"}  # pyright: ignore
    assert results == {
        "functions.ipython:0": "first",
        "functions.ipython:1": "second",
        "functions.ipython:2": "third",
    }


@pytest.mark.parametrize("inline", [True, False])
def test_pictures_come_inline_or_from_files_beside_it(tmp_path: Path, inline: bool):
    file = io.BytesIO()
    Pictures.new("RGB", (30, 40), "red").save(file, "PNG")
    (tmp_path / "p.png").write_bytes(file.getvalue())
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url if inline else "p.png"}}
    value = question(1)
    value["messages"][0]["content"] = [part, {"type": "text", "text": "Colour?"}]
    dialogue = read_dialogue(write_lines(tmp_path / "a.jsonl", [value]), 0)

    assert dialogue.num_images == 1
    image = dialogue.messages[0].parts[0]
    assert isinstance(image, Image)
    assert image.image.size == (30, 40)


def without_result(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [m for m in value["messages"] if m["role"] != "tool"]}


def ending_in_a_call(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": value["messages"][:3]}


def answering_nothing(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [value["messages"][1], value["messages"][3], value["messages"][4]]}


def answered_twice(value: dict[str, Any]) -> dict[str, Any]:
    messages = value["messages"]
    return {"messages": [*messages[:4], messages[3], *messages[4:]]}


def with_arguments(text: str) -> dict[str, Any]:
    value = with_tool(1)
    value["messages"][2]["tool_calls"][0]["function"]["arguments"] = text
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{not json", "Expecting property name"),
        ("[1, 2]", 'want an object with a list "messages"'),
        (json.dumps({"messages": [3]}), "a message is 3"),
        (json.dumps({"messages": []}), "no assistant message"),
        (json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}), "no user message"),
        (json.dumps({"messages": [{"content": "hi"}]}), "no key 'role'"),
        (json.dumps({"messages": [{"role": "alien", "content": "hi"}]}), "role='alien'"),
        (without_result(with_tool(1)), "before the result of functions.ipython:0"),
        (ending_in_a_call(with_tool(1)), "tool calls without a result: functions.ipython:0"),
        (answering_nothing(with_tool(1)), "answers 'call_x', which nobody called"),
        (answered_twice(with_tool(1)), "a second result of the call 'call_x'"),
        (with_arguments("[1]"), "want a JSON object"),
        (with_arguments("{"), "Expecting property name"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "type 'audio'"),
        (
            '{"messages": [{"role": "user", "content": '
            '[{"type": "image_url", "image_url": {"url": "gone.png"}}]}]}',
            "no picture at",
        ),
    ],
)
def test_what_is_no_dialogue_is_named_by_file_and_line(tmp_path: Path, value: Any, reason: str):
    path = write_lines(tmp_path / "bad.jsonl", [question(1), value])
    with pytest.raises(BadDialogueError, match=r"bad\.jsonl, line 2: ") as caught:
        read_dialogue(path, line_starts(path)[1])
    assert reason in str(caught.value)
