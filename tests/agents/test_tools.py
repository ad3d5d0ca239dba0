"""Calls are answered, whatever a model wrote."""

import asyncio
import json
from typing import Any

import pytest
from conftest import Sandbox
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moonlit.agents.schema import mismatch
from moonlit.agents.tools import UNREADABLE, Tool, ToolOutput, Toolset
from moonlit.agents.toolsets.ipython import NEW_SESSION, ipython
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text, ToolCall
from moonlit.chat.parser import ParsedTurn, parse_assistant
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.embedded()
SPECIAL = TOKENIZER.special
USER = Message(role="user", content="How many?")
SCHEMA = {
    "type": "object",
    "properties": {"at": {"type": "string", "maxLength": 9}, "times": {"type": "integer"}},
    "required": ["at"],
    "additionalProperties": False,
}


async def look(arguments: dict[str, Any]) -> ToolOutput:
    if arguments["at"] == "fail":
        raise KeyError("broken")
    return ToolOutput(text=f"saw {arguments['at']}")


def toolset() -> Toolset:
    return Toolset([Tool(name="look", description="look", parameters=SCHEMA, call=look)])


def words(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def answers(*calls: ToolCall, errors: tuple[str, ...] = ()) -> list[Message]:
    turn = ParsedTurn(Message(role="assistant", content="", tool_calls=calls), list(errors))
    return asyncio.run(toolset().answer(turn))


def test_parallel_calls_are_answered_in_order_under_their_ids():
    calls = [ToolCall("look", {"at": place}, f"functions.look:{n}") for n, place in enumerate("ab")]

    first, second = answers(*calls)

    assert (first.tool_call_id, words(first)) == ("functions.look:0", "saw a")
    assert (second.tool_call_id, words(second)) == ("functions.look:1", "saw b")


def test_parallel_calls_run_at_the_same_time():
    async def meet(arguments: dict[str, Any]) -> ToolOutput:
        await asyncio.wait_for(barrier.wait(), 5)
        return ToolOutput(text="met")

    barrier = asyncio.Barrier(3)
    tools = Toolset([Tool(name="meet", description="", parameters={}, call=meet)])
    calls = [ToolCall("meet", {}, f"functions.meet:{n}") for n in range(3)]
    turn = ParsedTurn(Message(role="assistant", content="", tool_calls=calls))

    assert [words(m) for m in asyncio.run(tools.answer(turn))] == ["met"] * 3


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (ToolCall("see", {}), "there is no tool 'see'; there are look"),
        (ToolCall("look", {}), "lacks at"),
        (ToolCall("look", {"at": 3}), "arguments.at is 3: want string"),
        (ToolCall("look", {"at": "x", "times": True}), "want integer"),
        (ToolCall("look", {"at": "x", "on": 1}), "has 'on'"),
        (ToolCall("look", {"at": "far too long"}), "above maxLength=9"),
        (ToolCall("look", {"at": "x" * 10_000_000}), "arguments of 10000010 characters"),
        (ToolCall("look", {"at": "fail"}), "look failed: KeyError: 'broken'"),
    ],
)
def test_a_bad_call_is_answered_in_words(call: ToolCall, complaint: str):
    (message,) = answers(call)

    assert complaint in words(message)
    assert len(words(message)) < 300


def test_calls_that_cannot_be_read_are_answered_beside_those_that_can():
    good, bad = answers(ToolCall("look", {"at": "x"}), errors=("arguments are not JSON",))

    assert words(good) == "saw x"
    assert (bad.tool_call_id, words(bad)) == (UNREADABLE, "Error: arguments are not JSON")


def test_a_marker_inside_a_string_stays_a_string():
    marker = "<|tool_call_end|>"
    turn = Message(role="assistant", content="", tool_calls=[ToolCall("look", {"at": marker})])
    prompt = render([USER], TOKENIZER, add_generation_prompt=True).input_ids
    sampled = render([USER, turn], TOKENIZER).input_ids[len(prompt) :]

    parsed = parse_assistant(sampled, TOKENIZER)

    assert parsed.errors == []
    assert parsed.message.tool_calls[0].arguments == {"at": marker}


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        ([1, 2], {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, True),
        ([1, "2"], {"type": "array", "items": {"type": "integer"}}, False),
        (None, {"type": ["string", "null"]}, True),
        ("c", {"enum": ["a", "b"]}, False),
        (2.0, {"type": "integer"}, True),
        (11, {"type": "number", "maximum": 10}, False),
        ({"a": {"b": 1}}, {"properties": {"a": {"properties": {"b": {"type": "null"}}}}}, False),
    ],
)
def test_values_fit_a_schema_or_do_not(value: Any, schema: dict[str, Any], fits: bool):
    assert (mismatch(value, schema) is None) == fits


markers = [
    SPECIAL.tool_calls_section_begin_id,
    SPECIAL.tool_calls_section_end_id,
    SPECIAL.tool_call_begin_id,
    SPECIAL.tool_call_argument_begin_id,
    SPECIAL.tool_call_end_id,
    SPECIAL.think_end_id,
    SPECIAL.im_end_id,
    SPECIAL.media_pad_id,
]
names = st.sampled_from(["functions.look:0", "functions.see:1", "look", "functions.look:x", ""])
json_texts = st.sampled_from(
    ['{"at": "x"}', '{"at": 1}', "{", "[]", "null", '{"at": "x", "times": 2}', '{"at": NaN}']
)
pieces = st.one_of(
    st.sampled_from(markers).map(lambda marker: [marker]),
    st.text(max_size=6).map(TOKENIZER.encode),
    st.tuples(names, json_texts | st.text(max_size=8)).map(
        lambda call: [
            markers[0],
            markers[2],
            *TOKENIZER.encode(call[0]),
            markers[3],
            *TOKENIZER.encode(call[1]),
            markers[4],
            markers[1],
        ]
    ),
    st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=4),
)


def check_sampled(parts: list[list[int]], thinking: bool) -> None:
    """Parse, answer, render: nothing raises, and every call and complaint has its answer."""
    ids = [token_id for part in parts for token_id in part]

    turn = parse_assistant(ids, TOKENIZER, thinking=thinking)
    messages = asyncio.run(toolset().answer(turn))

    assert len(messages) == len(turn.message.tool_calls) + bool(turn.errors)
    render([USER, turn.message, *messages], TOKENIZER, preserve_thinking=True)
    for call, message in zip(turn.message.tool_calls, messages, strict=False):
        valid = call.name == "look" and mismatch(call.arguments, SCHEMA) is None
        valid = valid and call.arguments["at"] != "fail"
        assert words(message).startswith("saw ") == valid


fuzz = given(st.lists(pieces, max_size=6), st.booleans())
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
full = settings(quick, max_examples=10_000)
test_anything_sampled_is_answered = quick(fuzz(check_sampled))
test_anything_sampled_is_answered_ten_thousand_times = pytest.mark.slow(full(fuzz(check_sampled)))


def in_session(sandbox: Sandbox, *cells: str) -> list[Message]:
    async def answer() -> list[Message]:
        pictures = [Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")]
        async with ipython(sandbox.pool, pictures) as tool:
            tools = Toolset([tool])
            calls = [ToolCall("ipython", {"code": cell}) for cell in cells]
            return [
                message
                for call in calls
                for message in await tools.answer(
                    ParsedTurn(Message(role="assistant", content="", tool_calls=[call]))
                )
            ]

    return sandbox.wait(answer())


def test_the_tasks_pictures_are_there_as_files_and_as_objects(sandbox: Sandbox):
    files, colours, shown = in_session(
        sandbox,
        "import os; sorted(os.listdir())",
        "[image.getpixel((0, 0)) for image in images]",
        "images[1]",
    )

    assert words(files) == "['image_0.png', 'image_1.png']"
    assert words(colours) == "[(255, 0, 0), (0, 0, 255)]"
    (picture,) = [part.image for part in shown.parts if isinstance(part, ImagePart)]
    assert picture.getpixel((3, 2)) == (0, 0, 255)


def test_a_lost_session_is_replaced_and_the_model_is_told(sandbox: Sandbox):
    lost, again = in_session(sandbox, "import os; os._exit(1)", "len(images)")

    assert "all variables and files are lost" in words(lost)
    assert words(again) == f"{NEW_SESSION}2"


def test_declarations_render(sandbox: Sandbox):
    async def declare() -> list[dict[str, Any]]:
        async with ipython(sandbox.pool) as tool:
            return Toolset([tool]).declarations

    declarations = sandbox.wait(declare())

    assert render([USER], TOKENIZER, tools=declarations).input_ids
    assert json.loads(json.dumps(declarations)) == declarations
