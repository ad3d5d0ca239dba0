"""What a source of tasks is."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image as Picture

from moonlit.batch import Task
from moonlit.chat.messages import Image, Message, Text, VideoChunk
from moonlit.chat.special_tokens import TOKEN_STRINGS

TRAIN, HELD_OUT = "train", "held_out"


@runtime_checkable
class TaskSource(Protocol):
    """Makes tasks: a pure function of its settings, the split and a number.

    The splits share no task. A user's own source is any callable of this form, named in ``conf/``
    by its import path.
    """

    def __call__(self, split: str, number: int) -> Task:
        """Return a task of ``train`` or ``held_out``."""
        ...


def require_task(task: Any, told: str) -> Task:
    """Return what a source made, if it is a task that a policy can be asked.

    Args:
        task: of a source; a user's may return anything.
        told: names the task.

    Raises:
        ValueError: naming the task, and what is wrong.
    """
    if not isinstance(task, Task):
        raise ValueError(f"{told} is {task!r:.80}: want a moonlit.batch.Task")
    if not isinstance(task.environment, str) or not task.environment:
        raise ValueError(f"{told} has the environment {task.environment!r}: want what scores it")
    prompt: Any = task.prompt
    if not (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and all(isinstance(one, Message) and isinstance(one.content, Sequence) for one in prompt)
    ):
        raise ValueError(
            f"{told} has the prompt {prompt!r:.80}: want a list of moonlit.chat.messages.Message"
        )
    for part in (part for message in prompt for part in message.parts):
        if not is_whole(part):
            raise ValueError(
                f"{told} has the part {part!r:.80} in its prompt: want Text of a str, Image of a "
                "PIL picture, or VideoChunk of some"
            )
    parts = [part for message in prompt for part in message.parts]
    if all(isinstance(part, Text) and not part.text.strip() for part in parts):
        raise ValueError(f"{told} asks nothing: its prompt {prompt!r:.80} has no word or picture")
    return task


def is_whole(part: Any) -> bool:
    """Whether a part of a message holds what its kind promises."""
    if isinstance(part, VideoChunk):
        return bool(part.frames) and all(isinstance(frame, Picture) for frame in part.frames)
    if isinstance(part, Image):
        return isinstance(part.image, Picture)
    return isinstance(part, Text) and isinstance(part.text, str)


def markers_in(task: Task) -> list[str]:
    """Return the strings of special tokens that stand in a task's words, where they are words."""
    words = "".join(message.words for message in task.prompt if message.role != "assistant")
    return [one for one in TOKEN_STRINGS.values() if one.startswith("<|") and one in words]
