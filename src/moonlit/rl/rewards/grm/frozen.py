"""A judge in this process: a checkpoint in the native engine, whose weights nothing changes."""

from collections.abc import Sequence
from pathlib import Path

from moonlit.agents.environment import VerifierError
from moonlit.chat.messages import Message
from moonlit.rl.conversation import Conversation
from moonlit.rl.loading import conversation_of, require_vocabulary
from moonlit.rl.rewards.grm.retries import TransientError


class FrozenModel:
    """Asks a checkpoint of ours.

    Args:
        ckpt: the judge's weights; loaded when it is first asked.
        tokenizer: ``embedded``, or a folder in the released layout.
        device: where it runs.
        max_new_tokens: of a reply.
        temperature: of the judge's sampling; tries differ only above 0.
        max_sequences: sampled at the same time.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is none, or was trained with another vocabulary.
    """

    def __init__(
        self,
        *,
        ckpt: str,
        tokenizer: str,
        device: str,
        max_new_tokens: int,
        temperature: float,
        max_sequences: int,
    ) -> None:
        if not Path(ckpt).exists():
            raise FileNotFoundError(f"group_judge.model.ckpt={ckpt}: no such checkpoint")
        require_vocabulary({"ckpt": ckpt, "tokenizer": tokenizer})
        self.settings = {
            "ckpt": ckpt,
            "tokenizer": tokenizer,
            "device": device,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "max_sequences": max_sequences,
            "max_cache_tokens": None,
            "thinking": False,
            "top_p": 1.0,
            "max_turns": 1,
            "max_image_patches": 4096,
        }
        self.conversation: Conversation | None = None

    @property
    def name(self) -> str:
        """The checkpoint."""
        return f"ckpt={self.settings['ckpt']}"

    async def ask(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return the reply's words.

        Raises:
            TransientError: if the reply is cut off.
            VerifierError: if the engine refuses the question.
        """
        if self.conversation is None:
            self.conversation = conversation_of(self.settings)
        try:
            reply = await self.conversation.reply(messages, seed=seed)
        except ValueError as error:
            raise VerifierError(f"{self.name}: {error}") from error
        if reply.stop_reason != "answer":
            raise TransientError(f"{self.name}: its reply ended by {reply.stop_reason!r}")
        return reply.text

    async def aclose(self) -> None:
        """End the engine."""
        if self.conversation is not None:
            self.conversation.engine.close()
            self.conversation = None
