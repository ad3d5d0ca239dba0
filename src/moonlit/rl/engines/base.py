"""What an engine is asked, what it answers, and the protocol between the two.

Token in, token out: an engine never sees text.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from moonlit.batch import PackedMedia

StopReason = Literal["stop", "length", "context"]
"""A stop id was sampled; ``max_new_tokens`` were; the model's last position was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Raises:
        ValueError: if a number is outside its range.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    """Where a completion ends; the id itself is part of it."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens are kept while those more likely than they hold less than this probability."""
    banned_ids: frozenset[int] = frozenset()
    """Never sampled, besides the media ids that an engine always bans."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to be continued."""

    input_ids: Sequence[int]
    sampling: Sampling
    media: PackedMedia | None = None
    """Items in the order of their placeholder tokens in ``input_ids``."""
    seed: int = 0
    """A token is drawn by this and its position alone, never by what else is in the batch."""
    session: Any = None
    """Of the same engine: the dialogue that this request continues."""


@dataclass(slots=True, kw_only=True)
class Completion:
    """Sampled tokens, and what is recorded of each."""

    token_ids: list[int] = field(default_factory=list)
    behavior_logprobs: list[float] = field(default_factory=list)
    """Of the distribution that was sampled from: bans, temperature and top-p applied [nats]."""
    untempered_logprobs: list[float] = field(default_factory=list)
    """Of the model's own softmax: what the training forward gives at temperature 1 [nats].
    Equal to ``behavior_logprobs`` at temperature 1 and top-p 1, but for the mass of banned ids. A
    vLLM server tells no more: there it is empty at other settings, greedy ones excepted."""
    policy_versions: list[int] = field(default_factory=list)
    """Version of the weights that sampled each token."""
    stop_reason: StopReason = "stop"
    num_prefilled_tokens: int = 0
    """Tokens of the prompt that were computed for this request."""
    num_reused_tokens: int = 0
    """Tokens of the prompt whose latents were there already: a session's or a twin prompt's."""


@runtime_checkable
class Engine(Protocol):
    """Samples continuations from a policy that training moves on."""

    async def generate(self, request: Request) -> Completion:
        """Continue one prompt; many calls at the same time form one batch."""
        ...

    async def update_weights(self, module: nn.Module, version: int) -> None:
        """Take over a trainer's weights, checked; ``version`` stamps the tokens from here on."""
        ...

    def session(self) -> AbstractContextManager[Any]:
        """Return what a dialogue's requests name, so that what they share is computed once."""
        ...

    @property
    def num_sampled_tokens(self) -> int:
        """Since the engine was made, as far as it knows: a server may tell only at the end."""
        ...

    async def pause(self) -> None:
        """Hold all requests, those that come too; return when no token is being sampled."""
        ...

    async def resume(self) -> None:
        """Go on with the requests that were held."""
        ...

    def close(self) -> None:
        """Serve no more."""
        ...
