"""``moonlit chat``: a person asks, about pictures too, and the model answers, with tools if asked.

The answer goes to standard output; thinking, calls and their results to standard error.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage
from rich.console import Console

from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.tools import Toolset
from moonlit.agents.toolsets.ipython import ipython
from moonlit.chat.messages import Image, Message, Part, Text
from moonlit.chat.vision_processing import open_image
from moonlit.rl.conversation import Conversation
from moonlit.rl.loading import conversation_of, sandboxes
from moonlit.rl.reply import Reply

HELP = "/image PATH attaches a picture, /new begins anew, /quit (or Ctrl-D) ends"


def chat(settings: Mapping[str, Any]) -> None:
    """Run the command: one question where there is a prompt, else as many as a person asks."""
    named = settings["image"]
    files = [] if named is None else [named] if isinstance(named, str) else named
    images = [read_image(path) for path in files]
    conversation = conversation_of(settings)

    async def run() -> None:
        async with sandboxes(settings["tools"]) as pool:
            talk = Talk(
                conversation,
                images=images,
                system=settings["system"],
                pool=pool,
                seed=settings["seed"],
            )
            if settings["prompt"] is None:
                await talk.talk()
            else:
                await talk.ask_once(settings["prompt"])

    asyncio.run(run())


class Talk:
    """A dialogue that goes on from question to question.

    Args:
        conversation: how the model is talked to.
        images: attached to the first question.
        system: a system message before it.
        pool: where the ``ipython`` tool gets its sandbox; None: no tools.
        seed: of the first answer; the next ones count up.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        images: Sequence[PILImage],
        system: str | None,
        pool: Pool | None,
        seed: int,
    ) -> None:
        self.conversation, self.pool, self.seed = conversation, pool, seed
        self.opening = [] if system is None else [Message(role="system", content=system)]
        self.messages: list[Message] = list(self.opening)
        self.attached = list(images)
        self.shown: list[PILImage] = []
        self.trace = Console(stderr=True, markup=False)

    async def ask(self, question: str) -> Reply:
        """Ask, with what is attached; the dialogue remembers question and answer.

        Raises:
            ValueError: if the dialogue does not fit the model; the question is forgotten.
        """
        content: list[Part] = [*map(Image, self.attached), Text(question)]
        asked = [*self.messages, Message(role="user", content=content)]
        pictures = [*self.shown, *self.attached]
        if self.pool is None:
            reply = await self.answer(asked, None)
        else:
            async with ipython(self.pool, pictures) as tool:
                reply = await self.answer(asked, Toolset([tool]))
        self.messages = [*asked, *reply.messages]
        self.shown, self.attached = pictures, []
        self.seed += 1
        return reply

    async def answer(self, messages: Sequence[Message], tools: Toolset | None) -> Reply:
        """Sample an answer and show what happens on the way."""
        return await self.conversation.reply(messages, seed=self.seed, tools=tools, watch=self.show)

    def show(self, message: Message) -> None:
        """Print what is not the answer."""
        if message.thinking:
            self.trace.print(message.thinking, style="dim")
        for call in message.tool_calls:
            code = call.arguments.get("code", call.arguments)
            self.trace.print(f"{call.name}: {code}", style="cyan")
        if message.role == "tool":
            words = "".join(part.text for part in message.parts if isinstance(part, Text))
            self.trace.print(words, style="green")

    async def ask_once(self, question: str) -> None:
        """Answer one question and end.

        Raises:
            RuntimeError: if the model did not get to an answer.
        """
        reply = await self.ask(question)
        if reply.stop_reason != "answer":
            raise RuntimeError(unfinished(reply))
        print(reply.text)

    async def talk(self) -> None:
        """Read questions until there are no more."""
        self.trace.print(HELP, style="dim")
        while True:
            try:
                line = (await asyncio.to_thread(input, "> ")).strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                await self.obey(line)
            except (ValueError, OSError) as error:
                self.trace.print(str(error), style="red")

    async def obey(self, line: str) -> None:
        """Do what one line says."""
        command, _, rest = line.partition(" ")
        if command == "/image":
            self.attached.append(read_image(rest.strip()))
        elif command == "/new":
            self.messages, self.shown, self.attached = list(self.opening), [], []
        elif command.startswith("/"):
            raise ValueError(f"no command {command}: {HELP}")
        elif line:
            reply = await self.ask(line)
            print(reply.text if reply.stop_reason == "answer" else unfinished(reply))


def unfinished(reply: Reply) -> str:
    """Say why there is no answer, and how far it got."""
    why = {
        "length": "the turn was cut at max_new_tokens",
        "context": "the model's positions ran out",
        "turns": "it still called tools after max_turns",
    }[reply.stop_reason]
    last = "".join(part.text for part in reply.messages[-1].parts if isinstance(part, Text))
    return f"no answer: {why}; it had written {last!r}"


def read_image(path: str) -> PILImage:
    """Open a picture.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path!r}")
    return open_image(Path(path).read_bytes(), path)
