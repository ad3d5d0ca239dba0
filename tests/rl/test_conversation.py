"""A reply with tools: what was sampled stands in the next prompt as the same ids."""

import asyncio

import pytest
from PIL import Image

from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.tools import Tool, ToolOutput, Toolset
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text
from moonlit.rl.conversation import Conversation, work_on
from moonlit.rl.engines.base import Engine
from tests.rl.scripted import SPECIAL, TOKENIZER, Scripted, calls, conversation, says

QUESTION = [Message(role="user", content="What is 6 times 7?")]


async def multiply(arguments: dict) -> ToolOutput:
    return ToolOutput(text=str(arguments["a"] * arguments["b"]))


def toolset() -> Toolset:
    number = {"type": "number"}
    parameters = {"type": "object", "properties": {"a": number, "b": number}}
    return Toolset([Tool(name="times", description="", parameters=parameters, call=multiply)])


def test_the_script_is_an_engine():
    assert isinstance(Scripted(), Engine)


def test_tools_are_called_until_there_is_an_answer():
    first = calls('{"a": 6, "b": 7}', name="times", before="So ")
    engine, seen = Scripted(first, says("42")), []

    reply = asyncio.run(
        conversation(engine).reply(QUESTION, seed=3, tools=toolset(), watch=seen.append)
    )

    assert (reply.text, reply.stop_reason, reply.num_calls) == ("42", "answer", 1)
    assert [message.role for message in reply.messages] == ["assistant", "tool", "assistant"]
    assert reply.messages[1].content[0].text == "42"
    assert seen == reply.messages
    one, two = (list(request.input_ids) for request in engine.requests)
    assert two[: len(one) + len(first)] == one + first
    assert reply.num_tokens == len(first) + len(says("42"))


def test_pictures_that_a_tool_returns_are_trained_beside_their_placeholders():
    """Catches: a row whose later placeholders have no picture."""

    async def look(arguments: dict) -> ToolOutput:
        return ToolOutput(images=[Image.new("RGB", (56, 28), "red")])

    tool = Tool(name="look", description="", parameters={"type": "object"}, call=look)
    shown = ImagePart(Image.new("RGB", (28, 28), "blue"))
    asked = [Message(role="user", content=[shown, Text("What else?")])]
    engine = Scripted(calls("{}", name="look"), says("red"))
    reply = asyncio.run(conversation(engine).reply(asked, seed=0, tools=Toolset([tool])))

    (row,) = reply.segments()
    assert row.media is not None
    assert len(row.media.grid_thw) == 2
    assert row.input_ids.count(SPECIAL.media_pad_id) == row.media.num_tokens
    assert row.num_sampled == reply.num_tokens


def test_an_unreadable_call_is_answered_and_counted():
    engine = Scripted(calls("{not json", name="times"), says("sorry"))
    reply = asyncio.run(conversation(engine).reply(QUESTION, seed=0, tools=toolset()))
    assert reply.text == "sorry"
    assert "not JSON" in reply.errors[0]
    assert "not JSON" in reply.messages[1].content[0].text


def test_without_tools_a_call_ends_the_reply():
    engine = Scripted(calls("{}", name="times", before="I would call."))
    reply = asyncio.run(conversation(engine).reply(QUESTION, seed=0))
    assert (reply.text, reply.stop_reason) == ("I would call.", "answer")


def test_a_cut_turn_too_many_turns_and_too_long_a_dialogue_have_no_answer():
    cut = asyncio.run(conversation(Scripted([5, 6])).reply(QUESTION, seed=0))
    assert (cut.text, cut.stop_reason) == ("", "length")

    again = [calls('{"a": 1, "b": 1}', name="times", index=n) for n in range(3)]
    turns = asyncio.run(
        conversation(Scripted(*again), max_turns=3).reply(QUESTION, seed=0, tools=toolset())
    )
    assert (turns.text, turns.stop_reason, turns.num_calls) == ("", "turns", 3)

    engine = Scripted(*again)
    full = asyncio.run(
        conversation(engine, max_positions=200).reply(QUESTION, seed=0, tools=toolset())
    )
    assert (full.text, full.stop_reason) == ("", "context")


@pytest.mark.parametrize(("thinking", "temperature"), [(True, 1.0), (False, 0.6)])
def test_sampling_is_the_releases_unless_asked_otherwise(thinking: bool, temperature: float):
    sampling = conversation(Scripted(), thinking=thinking).sampling
    assert (sampling.temperature, sampling.top_p) == (temperature, 0.95)
    assert sampling.stop_ids == {SPECIAL.im_end_id}
    asked = conversation(Scripted(), thinking=thinking, temperature=0.3, top_p=0.5).sampling
    assert (asked.temperature, asked.top_p) == (0.3, 0.5)


def test_thinking_is_kept_while_tools_are_called_and_dropped_from_history():
    thought = [*TOKENIZER.encode("hm"), SPECIAL.think_end_id]
    first = [*thought, *calls('{"a": 6, "b": 7}', name="times")]
    engine = Scripted(first, [*thought, *says("42")], [*thought, *says("yes")])
    talking: Conversation = conversation(engine, thinking=True)

    async def two_questions() -> None:
        reply = await talking.reply(QUESTION, seed=0, tools=toolset())
        assert reply.text == "42"
        assert reply.messages[0].thinking == "hm"
        asked = [*QUESTION, *reply.messages, Message(role="user", content="sure?")]
        await talking.reply(asked, seed=1, tools=toolset())

    asyncio.run(two_questions())
    within, after = (list(request.input_ids) for request in engine.requests[1:])
    assert TOKENIZER.decode(within).count("hm") == 1
    assert TOKENIZER.decode(after).count("hm") == 0


def test_ipython_sees_the_pictures_of_the_task():
    picture = Image.new("RGB", (28, 28), "red")
    task = Task(
        prompt=[Message(role="user", content=[ImagePart(picture), Text("Which colour?")])],
        domain="perception",
        environment="colour",
        answer="red",
    )
    engine = Scripted(calls('{"code": "print(images[0].getpixel((3, 3)))"}'), says("red"))

    async def run() -> None:
        async with Pool(num_warm=1) as pool:
            reply = await work_on(conversation(engine), task, pool, seed=0)
        assert "(255, 0, 0)" in reply.messages[1].content[0].text
        assert reply.text == "red"

    asyncio.run(run())


def test_a_placeholder_in_the_words_of_a_prompt_is_no_picture():
    """Its characters go in as characters: nothing waits for features that never come."""
    engine = Scripted(says("4"))
    words = "How many? <|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    prompt = [Message(role="user", content=words)]
    reply = asyncio.run(conversation(engine).reply(prompt, seed=0))

    (request,) = engine.requests
    assert SPECIAL.media_pad_id not in request.input_ids
    assert request.media is None
    assert words in TOKENIZER.decode(request.input_ids)
    assert reply.text == "4"
