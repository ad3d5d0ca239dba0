"""The few types that travel between data, model, phases and callbacks.

Axes: T tokens of one packed microbatch, S documents in it, P patches end to end, N visual items.
"""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class PackedMedia:
    """Visual items laid end to end: raw patches, normalised on the device.

    One item is an image (t = 1) or one chunk of up to four video frames.
    """

    pixel_values: UInt8[Tensor, "P 3 14 14"]
    """Patches in [0, 255], row-major inside each frame, frames in order."""
    grid_thw: Int[Tensor, "N 3"]
    """Frames, patch rows and patch columns of each item; products sum to P."""

    @property
    def num_tokens(self) -> int:
        """Vision tokens the items become: 2 x 2 patches, over all frames, merge into one."""
        return int((self.grid_thw[:, 1] * self.grid_thw[:, 2] // 4).sum())


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """One microbatch as one packed row: documents end to end, no padding."""

    input_ids: Int[Tensor, " T"]
    target_ids: Int[Tensor, " T"]
    """The next token of the same document, already shifted; ignored where the mask is False."""
    position_ids: Int[Tensor, " T"]
    """Position inside the document, from zero."""
    cu_seqlens: Int[Tensor, " S_plus_1"]
    """Document boundaries: 0, then the running total of lengths, T last."""
    prefix_of_document: Int[Tensor, " S"] | None = None
    """The document whose tokens each one continues, and sees; -1: none. None: nobody does."""
    loss_mask: Bool[Tensor, " T"]
    """True where the prediction of ``target_ids`` is trained."""
    media: PackedMedia | None = None
    """Items in the order of their placeholder tokens in ``input_ids``."""
    behavior_logprobs: Float[Tensor, " T"] | None = None
    """Log-probability of ``target_ids`` recorded by the sampler [nats]; RL only."""
    advantages: Float[Tensor, " T"] | None = None
    """Unitless; RL only."""

    @property
    def num_tokens(self) -> int:
        """Length T of the row."""
        return len(self.input_ids)

    @property
    def num_vision_tokens(self) -> int:
        """How many of the T tokens are merged vision tokens."""
        return 0 if self.media is None else self.media.num_tokens


@dataclass(slots=True, kw_only=True)
class Task:
    """A question whose answer can be checked without a model."""

    prompt: list[Any]
    """Chat messages (``moonlit.chat.messages.Message``), media included."""
    domain: str
    """The ability it exercises: perception, knowledge, reasoning, coding, agentic."""
    environment: str
    """What scores it: ``counting``, ``grounding``, ``pointing``, ``segmentation``, ``ocr``, ..."""
    answer: Any
    """The exact truth, JSON-serialisable: a number, a text, boxes, points or polygons in [0, 1].

    An empty list of boxes or points: nothing is there, and the right answer is ``none``."""
    tags: dict[str, str] = field(default_factory=dict)
    """Free labels such as the split or the composition the picture was drawn from."""


@dataclass(slots=True, kw_only=True)
class Segment:
    """One row that is trained as it stands: a prompt and all that followed by appending.

    Token in, token out: the ids are those that were sampled, never text read back.
    """

    input_ids: list[int]
    is_sampled: list[bool]
    """True where the policy wrote the token: it is trained."""
    behavior_logprobs: list[float]
    """Of sampled tokens, as the sampler recorded them [nats]; 0 elsewhere."""
    policy_versions: list[int]
    """Weights that sampled each token; -1 elsewhere."""
    media: PackedMedia | None = None
    """Items in the order of their placeholder tokens in ``input_ids``."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse lists of unlike lengths.

        Raises:
            ValueError: with the lengths.
        """
        lists = self.input_ids, self.is_sampled, self.behavior_logprobs, self.policy_versions
        lengths = {len(values) for values in lists}
        if len(lengths) > 1:
            raise ValueError(f"a segment's lists have the lengths {sorted(lengths)}: want one")

    @property
    def num_sampled(self) -> int:
        """How many tokens the policy wrote."""
        return sum(self.is_sampled)


@dataclass(frozen=True, slots=True)
class Span:
    """When a turn began and ended, on the clock of ``time.time`` [s]."""

    began_s: float
    ended_s: float


CORRECT = 1 - 1e-6
"""An answer of this verified reward is correct."""


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """One rollout of a task."""

    segments: list[Segment]
    """One; more where context management rewrote the history."""
    messages: list[Any]
    """What was said after the task's prompt, for people and judges."""
    spans: list[Span]
    """One a message."""
    stop_reason: str
    """``answer``, ``length``, ``context``, ``turns``, ``budget`` or ``error``."""
    text: str = ""
    """Words of the final answer; none where there is no answer."""
    rewards: dict[str, float] = field(default_factory=dict)
    """What the judge measured, by name."""
    reward: float = 0.0
    """What is learnt from: the judge's weighted sum, then what length rules make of it."""
    bonus: float = 0.0
    """The part of it that a generative judge added: it makes no answer correct."""
    agent: str = "policy"
    """Who acted; a sub-agent's name."""
    prompt: list[Any] | None = None
    """Messages before the first turn, where they are not the task's prompt."""
    called_by: int | None = None
    """The parent's turn that started this sub-agent, counted from its first prompt message."""
    children: list["Trajectory"] = field(default_factory=list)
    """Sub-agents' rollouts: observations, never trained."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Anything else that is measured."""
    error: str | None = None
    """A fault of environment or verifier, not of the policy: such a rollout is not trained."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the policy wrote here, its sub-agents' not among them."""
        return sum(segment.num_sampled for segment in self.segments)

    @property
    def verified_reward(self) -> float:
        """What was verified, without a generative judge's part."""
        return self.reward - self.bonus

    @property
    def is_correct(self) -> bool:
        """Whether the answer was verified right."""
        return self.verified_reward >= CORRECT


@dataclass(slots=True, kw_only=True)
class Group:
    """The K rollouts of one task."""

    task: Task
    trajectories: list[Trajectory]

    @property
    def teaches(self) -> bool:
        """Whether the rewards differ: advantages are all zero where they do not."""
        rewards = [one.reward for one in self.trajectories if one.error is None]
        return bool(rewards) and max(rewards) > min(rewards)
