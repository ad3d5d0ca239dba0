"""A reply on its way: what was sampled after a prompt, what tools returned, and why it ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from moonlit.batch import Segment, Span
from moonlit.chat.messages import Message, Text
from moonlit.chat.template import Rendered
from moonlit.chat.vision_processing import pack_media
from moonlit.rl.engines.base import Completion


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
    stop_reason: Literal["answer", "length", "context", "turns", "budget"] = "turns"
    """It answered; a turn was cut; the positions ran out, or the turns, or the budget of steps."""
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
