"""What a source of tasks is."""

from typing import Protocol, runtime_checkable

from moonlit.batch import Task

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
