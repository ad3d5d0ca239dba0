"""A dialogue as people and agents write it, before any token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from PIL.Image import Image as PILImage

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Text:
    """Characters; a special token's string inside them stays characters."""

    text: str


MediaKind = Literal["picture", "video", "sound", "audiovisual"]
"""The last one is a video that is read with its sound."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaFile:
    """An encoded file in its native format; what is equal is the file itself."""

    data: bytes
    kind: MediaKind


@dataclass(frozen=True, slots=True)
class Image:
    """One picture, upright already (EXIF orientation is the reader's business)."""

    image: PILImage
    file: MediaFile | None = None
    """What it was decoded from; a sound has one picture for each stretch of time."""


@dataclass(frozen=True, slots=True)
class VideoChunk:
    """Up to four consecutive frames of one size, encoded as one visual item."""

    frames: Sequence[PILImage]
    timestamp_s: float
    """Time of the first frame from the start of the video [s]."""
    max_frame_patches: int | None = None
    """Patch limit of each frame, where a whole video shares one; None: the renderer's."""
    file: MediaFile | None = None
    """The video it was decoded from; all its chunks name the same one."""


Part = Text | Image | VideoChunk


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool with JSON arguments."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None
    """``functions.NAME:INDEX``; None: named when rendered, by its place in the dialogue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a dialogue.

    Raises:
        ValueError: if the role is none of ours, has a field that only another role can have, or
            lacks one that it needs.
    """

    role: Role
    content: Sequence[Part] | str
    name: str | None = None
    """Name shown in the turn's header; None: the role's."""
    thinking: str | None = None
    """What an assistant thought first; None: it did not think (an instant answer)."""
    tool_calls: Sequence[ToolCall] = ()
    """Calls an assistant made at the end of its turn, all at once."""
    tool_call_id: str | None = None
    """The call that a tool message answers; required there."""
    trained: bool = True
    """False leaves an assistant's turn out of the loss."""
    sampled_ids: Sequence[int] | None = field(default=None, compare=False, repr=False)
    """Ids exactly as sampled after the generation prompt; rendered in place of the words."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role={self.role!r}: want one of {get_args(Role)}")
        if self.role != "assistant":
            for key in ("thinking", "tool_calls", "sampled_ids"):
                if getattr(self, key):
                    raise ValueError(f"{key} on a message of role {self.role!r}: assistants only")
        elif not all(isinstance(part, Text) for part in self.parts):
            raise ValueError("content of an assistant holds media: want text only")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                f"tool_call_id={self.tool_call_id!r} on a message of role {self.role!r}: "
                "a tool's message names its call, others none"
            )

    @property
    def parts(self) -> Sequence[Part]:
        """The content as parts."""
        return (Text(self.content),) if isinstance(self.content, str) else self.content

    @property
    def words(self) -> str:
        """The content's text, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))
