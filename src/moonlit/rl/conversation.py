"""A dialogue with a policy: sample a turn, run the tools it calls, sample on until it answers.

Token in, token out: what was sampled stands in the next prompt as the same ids.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from PIL import Image

from moonlit.agents.context import ContextStrategy, KeepAll
from moonlit.agents.environment import ContextOverflowError
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.ipython import ipython
from moonlit.batch import Segment, Span, Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text, VideoChunk
from moonlit.chat.parser import ParsedTurn, parse_assistant
from moonlit.chat.template import Rendered, render
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import RELEASED_LIMITS, PatchLimits, pack_media
from moonlit.rl.engines.base import Completion, Engine, Request, Sampling

RELEASED_TEMPERATURE = {True: 1.0, False: 0.6}
"""Thinking, instant. Source: README of the release."""
RELEASED_TOP_P = 0.95


def unwatched(message: Message) -> None:
    """Let a message pass."""


@dataclass(slots=True)
class Reply:
    """What came after a prompt: the policy's turns and what its tools returned."""

    messages: list[Message] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """When each message was made."""
    prompts: list[Rendered] = field(default_factory=list)
    """What each turn of the policy was sampled after ..."""
    completions: list[Completion] = field(default_factory=list)
    """... and what was sampled."""
    errors: list[str] = field(default_factory=list)
    """What was malformed in the policy's turns."""
    stop_reason: Literal["answer", "length", "context", "turns"] = "turns"
    """It answered; a turn was cut; the positions ran out; the turns did."""
    watch: Callable[[Message], None] = unwatched
    """Is shown each message as it comes."""

    @property
    def text(self) -> str:
        """Words of the last turn if it is an answer, else none."""
        if self.stop_reason != "answer":
            return ""
        return "".join(part.text for part in self.messages[-1].parts if isinstance(part, Text))

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def num_calls(self) -> int:
        """Tool calls that could be read."""
        return sum(len(message.tool_calls) for message in self.messages)

    def add(self, message: Message, began_s: float) -> None:
        """Append a message that has just been made."""
        self.messages.append(message)
        self.spans.append(Span(began_s, time.time()))
        self.watch(message)

    def segments(self) -> list[Segment]:
        """Return the rows to train: one, as long as every prompt extends what stood before it."""
        segments: list[Segment] = []
        for prompt, completion in zip(self.prompts, self.completions, strict=True):
            before = segments[-1].input_ids if segments else None
            if before is None or prompt.input_ids[: len(before)] != before:
                segments.append(
                    Segment(input_ids=[], is_sampled=[], behavior_logprobs=[], policy_versions=[])
                )
            segment = segments[-1]
            given = prompt.input_ids[len(segment.input_ids) :]
            sampled = completion.token_ids
            segment.input_ids += given + sampled
            segment.is_sampled += [False] * len(given) + [True] * len(sampled)
            segment.behavior_logprobs += [0.0] * len(given) + completion.behavior_logprobs
            segment.policy_versions += [-1] * len(given) + completion.policy_versions
            segment.media = pack_media(prompt.media) if prompt.media else None
            segment.check()
        return segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """How a policy is talked to.

    Args:
        engine: samples.
        tokenizer: whose ids the engine knows.
        max_positions: longest prompt and answer together [tokens].
        max_new_tokens: of one turn.
        thinking: let it think first.
        temperature: None: the release's, 1.0 thinking and 0.6 instant.
        top_p: None: the release's.
        max_turns: of the policy in one reply; its tool calls end there.
        max_reply_tokens: sampled in one reply, all its turns together; None: no limit.
        limits: of pictures.
        context: what is done where the dialogue grows too long.
    """

    engine: Engine
    tokenizer: Tokenizer
    max_positions: int
    max_new_tokens: int
    thinking: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_turns: int = 8
    max_reply_tokens: int | None = None
    limits: PatchLimits = RELEASED_LIMITS
    context: ContextStrategy = field(default_factory=KeepAll)

    @property
    def sampling(self) -> Sampling:
        """Settings of every turn."""
        temperature = RELEASED_TEMPERATURE[self.thinking]
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            stop_ids=frozenset({self.tokenizer.special.im_end_id}),
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=RELEASED_TOP_P if self.top_p is None else self.top_p,
        )

    def sampling_after(self, num_sampled: int) -> Sampling:
        """Settings of the turn that comes after so many sampled tokens of a reply."""
        if self.max_reply_tokens is None:
            return self.sampling
        left = min(self.max_new_tokens, self.max_reply_tokens - num_sampled)
        return replace(self.sampling, max_new_tokens=left)

    async def reply(
        self,
        messages: Sequence[Message],
        *,
        seed: int,
        tools: Toolset | None = None,
        watch: Callable[[Message], None] = unwatched,
    ) -> Reply:
        """Let the policy answer, tools included.

        Args:
            messages: the dialogue so far.
            seed: of every token drawn.
            tools: what may be called.
            watch: is shown each message as it comes.

        Raises:
            ValueError: if the engine refuses the prompt.
            ContextOverflowError: if the prompt leaves no position for an answer.
        """
        reply = Reply(watch=watch)
        history: list[Message] = []  # what the policy still sees of the reply
        with self.engine.session() as session:
            dialogue = Dialogue(self, list(messages), reply, seed, session, tools)
            for _ in range(self.max_turns):
                turn = await dialogue.turn(history)
                if turn is None:
                    return reply
                if not self.calls_tools(turn) or tools is None:
                    reply.stop_reason = "answer"
                    return reply
                began_s = time.time()
                results = await tools.answer(turn)
                for result in results:
                    reply.add(result, began_s)
                history += [turn.message, *results]
        return reply

    def calls_tools(self, turn: ParsedTurn) -> bool:
        """Whether a turn wants tools, readable or not."""
        begin = self.tokenizer.special.tool_calls_section_begin_id
        return bool(turn.message.tool_calls) or begin in (turn.message.sampled_ids or ())


@dataclass(slots=True)
class Dialogue:
    """A reply on its way."""

    talk: Conversation
    messages: list[Message]
    """What is answered."""
    reply: Reply
    seed: int
    session: object
    tools: Toolset | None

    async def turn(self, history: list[Message]) -> ParsedTurn | None:
        """Sample one turn into the reply; None: it could not be finished, and the reply says why.

        Args:
            history: what came after the messages; shortened in place where it is too long.

        Raises:
            ContextOverflowError: if the first prompt is too long already.
        """
        rendered = self.rendered(history)
        threshold = self.talk.context.threshold
        if history and threshold is not None and len(rendered.input_ids) > threshold:
            shorter = await self.talk.context.shorten(history, partial(self.ask, history))
            if shorter is None:
                return None
            history[:] = shorter
            rendered = self.rendered(history)
        return await self.sample(rendered)

    async def ask(self, history: list[Message], request: Message) -> str | None:
        """Let the policy answer a request about its work; None: it could not be finished."""
        self.reply.add(request, time.time())
        turn = await self.sample(self.rendered([*history, request]))
        return None if turn is None else turn.message.words

    def rendered(self, history: Sequence[Message]) -> Rendered:
        """Return the ids of the dialogue so far."""
        return render(
            [*self.messages, *history],
            self.talk.tokenizer,
            tools=self.tools.declarations if self.tools else (),
            add_generation_prompt=True,
            thinking=self.talk.thinking,
            limits=self.talk.limits,
        )

    async def sample(self, rendered: Rendered) -> ParsedTurn | None:
        """Let the engine continue a prompt, as far as it can be."""
        talk, reply = self.talk, self.reply
        if (num_tokens := len(rendered.input_ids)) >= talk.max_positions:
            if not reply.messages:
                raise ContextOverflowError(
                    f"the prompt has {num_tokens} tokens: there are {talk.max_positions} positions,"
                    " and one is needed for an answer"
                )
            reply.stop_reason = "context"
            return None
        if talk.max_reply_tokens is not None and reply.num_tokens >= talk.max_reply_tokens:
            reply.stop_reason = "length"
            return None
        began_s = time.time()
        completion = await talk.engine.generate(
            Request(
                input_ids=rendered.input_ids,
                media=pack_media(rendered.media) if rendered.media else None,
                sampling=talk.sampling_after(reply.num_tokens),
                seed=self.seed,
                session=self.session,
            )
        )
        turn = parse_assistant(completion.token_ids, talk.tokenizer, thinking=talk.thinking)
        reply.prompts.append(rendered)
        reply.completions.append(completion)
        reply.add(turn.message, began_s)
        reply.errors += turn.errors
        if completion.stop_reason != "stop":
            reply.stop_reason = completion.stop_reason
            return None
        return turn


async def work_on(conversation: Conversation, task: Task, pool: Pool | None, *, seed: int) -> Reply:
    """Let a policy work on a task, with a sandbox of its own where there is a pool."""
    if pool is None:
        return await conversation.reply(task.prompt, seed=seed)
    async with ipython(pool, pictures_of(task.prompt)) as tool:
        return await conversation.reply(task.prompt, seed=seed, tools=Toolset([tool]))


def pictures_of(messages: Sequence[Message]) -> list[Image.Image]:
    """Return all pictures of a dialogue in order, a clip's frames one by one."""
    pictures: list[Image.Image] = []
    for part in (part for message in messages for part in message.parts):
        if isinstance(part, ImagePart):
            pictures.append(part.image)
        elif isinstance(part, VideoChunk):
            pictures += part.frames
    return pictures
