"""A policy that nobody trains: the weights of a checkpoint in an engine, for sub-agents."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moonlit.agents.context import ContextStrategy
from moonlit.agents.tools import Toolset
from moonlit.chat.messages import Message
from moonlit.chat.tokenizer import Tokenizer
from moonlit.distributed.checkpoint import model_from_checkpoint
from moonlit.rl.conversation import Conversation, never
from moonlit.rl.engines.base import Engine
from moonlit.rl.loading import require_vocabulary
from moonlit.rl.reply import Reply, unwatched


class FrozenPolicy:
    """Answers with the weights of a checkpoint.

    They are loaded when it is first asked, are no part of any phase, and never change.

    Args:
        ckpt: an earlier checkpoint, or a smaller model's.
        build_engine: makes the engine from the model and ``version=``: in this process, or on
            servers that take the weights.
        tokenizer: ``embedded``, or a folder in the released layout.
        device: where an engine in this process runs.
        max_new_tokens: of one turn.
        max_turns: of one answer: the step budget.
        temperature: of sampling.
        context: what is done where a dialogue grows too long.
        thinking: let it think first.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is none, or was trained with another vocabulary.
    """

    def __init__(
        self,
        *,
        ckpt: str,
        build_engine: Callable[..., Engine],
        tokenizer: str,
        device: str,
        max_new_tokens: int,
        max_turns: int,
        temperature: float,
        context: ContextStrategy,
        thinking: bool = False,
    ) -> None:
        if not Path(ckpt).exists():
            raise FileNotFoundError(f"ckpt={ckpt}: no such checkpoint for a sub-agent")
        require_vocabulary({"ckpt": ckpt, "tokenizer": tokenizer})
        if max_new_tokens < 1 or max_turns < 1:
            raise ValueError(
                f"sub-agent: max_new_tokens={max_new_tokens}, max_turns={max_turns}: want 1 or more"
            )
        self.ckpt, self.build_engine, self.device = ckpt, build_engine, device
        self.tokenizer_name = tokenizer
        self.max_new_tokens, self.max_turns = max_new_tokens, max_turns
        self.temperature, self.thinking = temperature, thinking
        self.context = context
        self.conversation: Conversation | None = None
        self.loading = asyncio.Lock()

    async def reply(
        self,
        messages: Sequence[Message],
        *,
        seed: int,
        tools: Toolset | None = None,
        watch: Callable[[Message], None] = unwatched,
        is_spent: Callable[[], bool] = never,
    ) -> Reply:
        """Answer, tools included.

        Raises:
            ContextOverflowError: if the prompt leaves no position for an answer.
            EngineServerError: if a server is gone.
        """
        async with self.loading:
            if self.conversation is None:
                self.conversation = await asyncio.to_thread(self.load)
        return await self.conversation.reply(
            messages, seed=seed, tools=tools, watch=watch, is_spent=is_spent
        )

    def load(self) -> Conversation:
        """Read the weights and give them to an engine."""
        tokenizer = Tokenizer.named(self.tokenizer_name)
        model = model_from_checkpoint(Path(self.ckpt)).to(torch.device(self.device))
        return Conversation(
            engine=self.build_engine(model, version=0),
            tokenizer=tokenizer,
            max_positions=model.decoder_shape.max_positions,
            max_new_tokens=self.max_new_tokens,
            max_turns=self.max_turns,
            temperature=self.temperature,
            thinking=self.thinking,
            context=self.context,
        )

    async def aclose(self) -> None:
        """End the engine; it may start again, on another event loop too."""
        if self.conversation is not None:
            self.conversation.engine.close()
            self.conversation = None
        self.loading = asyncio.Lock()  # one that somebody has waited for belongs to its loop
