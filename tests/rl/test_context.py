"""What a policy sees once its dialogue is too long, and that what is trained is what it saw."""

import asyncio

import pytest

from moonlit.agents.context import (
    REQUEST,
    ContextStrategy,
    DiscardAll,
    HideToolResult,
    KeepAll,
    Sharding,
    Summary,
)
from moonlit.agents.tools import Tool, ToolOutput, Toolset
from moonlit.chat.messages import Message
from moonlit.rl.reply import Reply
from tests.rl.scripted import TOKENIZER, Scripted, calls, conversation, says

QUESTION = [Message(role="user", content="Read all the pages.")]
STRATEGIES = [KeepAll, Sharding, HideToolResult, DiscardAll, Summary]


async def read(arguments: dict) -> ToolOutput:
    return ToolOutput(text=f"page {arguments['page']} says " + f"word{arguments['page']} " * 40)


def toolset() -> Toolset:
    parameters = {"type": "object", "properties": {"page": {"type": "integer"}}}
    return Toolset([Tool(name="read", description="", parameters=parameters, call=read)])


def reads(page: int) -> list[int]:
    return calls(f'{{"page": {page}}}', name="read", index=page, before=f"now {page}. ")


def made(kind: type, threshold: int) -> ContextStrategy:
    return kind() if kind in (KeepAll, Sharding) else kind(threshold=threshold)


def replied(kind: type, *turns: list[int], threshold: int = 450, **settings) -> tuple[Reply, list]:
    """The reply, and the words of each prompt."""
    engine = Scripted(*turns)
    talking = conversation(engine, context=made(kind, threshold), **{"max_turns": 9} | settings)
    reply = asyncio.run(talking.reply(QUESTION, seed=0, tools=toolset()))
    return reply, [TOKENIZER.decode(list(one.input_ids)) for one in engine.requests]


FOUR = [reads(0), reads(1), reads(2), reads(3), says("done")]


def shown(prompt: str) -> list[int]:
    """Pages whose words are in a prompt."""
    return [page for page in range(4) if f"word{page} " in prompt]


@pytest.mark.parametrize("kind", [KeepAll, Sharding])
def test_everything_stays(kind: type):
    reply, prompts = replied(kind, *FOUR)
    assert shown(prompts[-1]) == [0, 1, 2, 3]
    assert len(reply.segments()) == 1


def test_hidden_are_the_results_of_all_rounds_but_the_last_and_nothing_else():
    reply, prompts = replied(HideToolResult, *FOUR)
    assert [shown(prompt)[-1:] for prompt in prompts] == [[], [0], [1], [2], [3]]
    assert shown(prompts[-1])[0] >= 2
    assert all(f"now {page}. " in prompts[-1] for page in range(4))  # reasoning and calls stay
    assert prompts[-1].count("(hidden)") == 4 - len(shown(prompts[-1]))
    assert reply.text == "done"


def test_discarded_is_all_that_came_after_the_task():
    _, prompts = replied(DiscardAll, *FOUR)
    (again,) = [place for place, prompt in enumerate(prompts) if place and not shown(prompt)]
    assert prompts[again] == prompts[0]
    assert shown(prompts[again + 1]) == [again]


def test_who_begins_again_draws_other_tokens():
    """A token is drawn by seed and position: with one seed, the same would be done again."""
    engine = Scripted(*FOUR)
    talking = conversation(engine, context=DiscardAll(threshold=450), max_turns=9)
    asyncio.run(talking.reply(QUESTION, seed=5, tools=toolset()))
    first, *others = engine.requests
    (again,) = [one for one in others if one.input_ids == first.input_ids]
    assert first.seed == 5
    assert again.seed != first.seed
    assert {one.seed for one in others[: others.index(again)]} == {first.seed}


def test_a_summary_is_written_by_the_policy_and_takes_the_place_of_its_work():
    turns = [reads(0), reads(1), says("pages 0 and 1 say little"), reads(2), says("done")]
    reply, prompts = replied(Summary, *turns, threshold=350)

    assert (shown(prompts[2]), REQUEST in prompts[2]) == ([0, 1], True)
    assert (shown(prompts[3]), "pages 0 and 1 say little" in prompts[3]) == ([], True)
    assert REQUEST not in prompts[3]
    assert reply.text == "done"
    assert [m.role for m in reply.messages].count("assistant") == 5


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_sampled_token_is_trained_once_after_the_tokens_it_was_sampled_after(kind: type):
    turns = [reads(0), reads(1), reads(2), reads(3), reads(4), says("done")]
    reply, _ = replied(kind, *turns)

    contexts = {}
    for segment in reply.segments():
        for place, is_sampled in enumerate(segment.is_sampled):
            if is_sampled and not segment.is_sampled[place - 1]:
                contexts[len(contexts)] = segment.input_ids[:place]
    given = [prompt.input_ids for prompt in reply.prompts]
    assert list(contexts.values()) == given
    assert sum(s.num_sampled for s in reply.segments()) == reply.num_tokens
    assert len(reply.segments()) == (1 if kind in (KeepAll, Sharding) else len(reply.segments()))


def test_with_room_for_few_pages_only_strategies_come_to_the_end():
    """The same six pages and 900 positions: who keeps all overflows, the others answer."""
    pages = [reads(page) for page in range(6)]
    for kind in (KeepAll, Sharding):
        assert replied(kind, *pages, says("done"), max_positions=900)[0].stop_reason == "context"
    for kind in (HideToolResult, DiscardAll):
        assert replied(kind, *pages, says("done"), max_positions=900)[0].text == "done"
    turns = [pages[0], pages[1], says("so far"), pages[2], pages[3], says("so on"), says("done")]
    assert replied(Summary, *turns, threshold=350, max_positions=900)[0].text == "done"


def test_a_summary_that_is_cut_off_ends_the_reply():
    cut = TOKENIZER.encode("and then and")
    reply, _ = replied(Summary, reads(0), reads(1), cut, threshold=350)
    assert (reply.stop_reason, reply.text) == ("length", "")


def test_a_first_prompt_is_never_shortened():
    """There is no history yet: a small threshold must not loop, nor drop the task."""
    _, prompts = replied(DiscardAll, says("done"), threshold=1)
    assert len(prompts) == 1
    assert "Read all the pages." in prompts[0]


@pytest.mark.parametrize("kind", [HideToolResult, DiscardAll, Summary])
def test_a_threshold_below_one_is_refused(kind: type):
    with pytest.raises(ValueError, match=r"context\.threshold=0"):
        kind(threshold=0)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_all_are_strategies_of_one_interface(kind: type):
    assert isinstance(made(kind, 9), ContextStrategy)
