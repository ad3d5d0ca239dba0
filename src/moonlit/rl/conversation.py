"""A dialogue with a policy: sample a turn, run the tools it calls, sample on until it answers.

Token in, token out: what was sampled stands in the next prompt as the same ids.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from PIL import Image

from moonlit.agents.context import ContextStrategy, KeepAll
from moonlit.agents.environment import ContextOverflowError
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.ipython import ipython
from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, VideoChunk
from moonlit.chat.parser import ParsedTurn, parse_assistant
from moonlit.chat.template import Rendered, render
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import RELEASED_LIMITS, PatchLimits, pack_media
from moonlit.rl.engines.base import Engine, Request, Sampling
from moonlit.rl.reply import Reply, unwatched

RELEASED_TEMPERATURE = {True: 1.0, False: 0.6}
"""Thinking, instant. Source: README of the release."""
RELEASED_TOP_P = 0.95
SEED_BITS = 56
"""Of a rollout's seed: what is above them tells its contexts apart."""


def never() -> bool:
    """Let a reply go on."""
    return False


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
        is_spent: Callable[[], bool] = never,
    ) -> Reply:
        """Let the policy answer, tools included.

        Args:
            messages: the dialogue so far.
            seed: of every token drawn.
            tools: what may be called.
            watch: is shown each message as it comes.
            is_spent: asked after every turn of tools: whether no further turn may be sampled.

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
                if is_spent():
                    reply.stop_reason = "budget"
                    return reply
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
    num_contexts: int = 0
    """How often the history was rewritten."""

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
            self.num_contexts += 1
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
                # A token is drawn by seed and position: who begins again shall not repeat it all.
                seed=self.seed + (self.num_contexts << SEED_BITS),
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
