"""An engine that says what it is told: a policy that already knows how to call tools."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moonlit.chat.tokenizer import Tokenizer
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.base import Completion, Request

TOKENIZER = Tokenizer.embedded()
SPECIAL = TOKENIZER.special


def says(text: str) -> list[int]:
    return [*TOKENIZER.encode(text), SPECIAL.im_end_id]


def calls(code: str, *, index: int = 0, name: str = "ipython", before: str = "") -> list[int]:
    """A turn with one call whose argument is ``code``, written as JSON or not."""
    return [
        *TOKENIZER.encode(before),
        SPECIAL.tool_calls_section_begin_id,
        SPECIAL.tool_call_begin_id,
        *TOKENIZER.encode(f"functions.{name}:{index}"),
        SPECIAL.tool_call_argument_begin_id,
        *TOKENIZER.encode(code),
        SPECIAL.tool_call_end_id,
        SPECIAL.tool_calls_section_end_id,
        SPECIAL.im_end_id,
    ]


class Scripted:
    """Gives the turns of a script in order; keeps what it was asked."""

    version = 0
    """Of the weights that it says it has."""

    def __init__(self, *turns: list[int]) -> None:
        self.turns, self.requests = list(turns), list[Request]()

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        ids = self.turns.pop(0)
        ends = ids[-1] == SPECIAL.im_end_id
        return Completion(
            token_ids=ids,
            behavior_logprobs=[-0.5] * len(ids),
            policy_versions=[self.version] * len(ids),
            stop_reason="stop" if ends else "length",
        )

    async def update_weights(self, module: nn.Module, version: int) -> None:
        raise NotImplementedError

    @property
    def num_sampled_tokens(self) -> int:
        return 0

    async def pause(self) -> None:
        pass

    async def resume(self) -> None:
        pass

    def close(self) -> None:
        pass

    @contextmanager
    def session(self) -> Iterator[None]:
        yield None


def conversation(engine: object, **settings: object) -> Conversation:
    values = {"max_positions": 4096, "max_new_tokens": 64, **settings}
    return Conversation(engine=engine, tokenizer=TOKENIZER, **values)
