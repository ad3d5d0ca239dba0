"""Context management: what a policy still sees of a dialogue that grows too long.

| strategy | once a prompt is longer than its threshold |
| --- | --- |
| ``KeepAll`` | nothing: the dialogue ends where the positions do |
| ``HideToolResult`` | tool results are hidden, but for those of the last round; reasoning stays |
| ``DiscardAll`` | all that came after the task is dropped |
| ``Summary`` | the policy writes a summary, which stands in its place |
| ``Sharding`` | nothing: sub-agents read in contexts of their own, and one message returns |

Whoever rewrites history begins a new row to train (``Segment``): tokens are never trained in a
context that they were not sampled in.

Source: technical report (arXiv:2602.02276), Sec. 3 (sharding against the others) and App. E.6
(hide-tool-result, discard-all). Thresholds are NOT STATED; the words of the summary are ours.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from moonlit.chat.messages import Message

Ask = Callable[[Message], Awaitable[str | None]]
"""Puts a request to the policy behind the dialogue; its words, or None where it was cut off."""
HIDDEN = "(hidden)"
REQUEST = (
    "Your context is full. Write down all that you have found out and what is left to do: only "
    "this will be left of the work so far."
)
SUMMARY = "What you have written down of your work so far:\n{summary}"


@runtime_checkable
class ContextStrategy(Protocol):
    """Rewrites the history of a dialogue, which is what came after the task."""

    threshold: int | None
    """Of a prompt that still has a history [tokens]; None: it is never rewritten."""
    needs_swarm: bool
    """Whether it is one only where there are sub-agents."""

    async def shorten(self, history: Sequence[Message], ask: Ask) -> list[Message] | None:
        """Return what is left of a history; None: the policy was asked, and cut off."""
        ...


class KeepAll:
    """Keeps the whole history."""

    threshold: int | None = None
    needs_swarm = False

    async def shorten(self, history: Sequence[Message], ask: Ask) -> list[Message] | None:
        """Return all of it."""
        return list(history)


class Sharding(KeepAll):
    """Keeps the whole history, which is short because sub-agents have theirs for themselves."""

    needs_swarm = True


class Thresholded:
    """Base of the strategies that act once a prompt is too long.

    Args:
        threshold: longest prompt that is left as it is [tokens].

    Raises:
        ValueError: if it is below 1.
    """

    needs_swarm = False

    def __init__(self, *, threshold: int) -> None:
        if threshold < 1:
            raise ValueError(f"context.threshold={threshold}: want at least 1")
        self.threshold: int | None = threshold


class HideToolResult(Thresholded):
    """Hides tool results, but for the last round's; calls and reasoning stay."""

    async def shorten(self, history: Sequence[Message], ask: Ask) -> list[Message] | None:
        """Return the history with hidden results."""
        last_turn = max(
            (place for place, one in enumerate(history) if one.role == "assistant"), default=-1
        )
        return [
            replace(one, content=HIDDEN) if one.role == "tool" and place < last_turn else one
            for place, one in enumerate(history)
        ]


class DiscardAll(Thresholded):
    """Drops the whole history: the policy begins again."""

    async def shorten(self, history: Sequence[Message], ask: Ask) -> list[Message] | None:
        """Return nothing."""
        return []


class Summary(Thresholded):
    """Lets the policy write a summary, in a turn that is trained like any other."""

    async def shorten(self, history: Sequence[Message], ask: Ask) -> list[Message] | None:
        """Return the summary."""
        summary = await ask(Message(role="user", content=REQUEST))
        if summary is None:
            return None
        return [Message(role="user", content=SUMMARY.format(summary=summary))]
