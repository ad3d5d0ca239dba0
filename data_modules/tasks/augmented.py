"""Any source of tasks with its pictures changed, and its true coordinates with them."""

import zlib
from dataclasses import replace

from data_modules.components.augmentation import Annotated, Augmentation, Key
from data_modules.tasks.source import TRAIN, TaskSource
from moonlit.batch import Task
from moonlit.chat.messages import Image

COORDINATES = {"grounding": "boxes", "pointing": "points", "segmentation": "polygons"}
"""What the answer of an environment is, where it is coordinates."""


class Augmented:
    """Changes training tasks; held-out ones stay as they are.

    Tasks that are answered in coordinates may be mirrored and cropped; of all others only colours
    change, so leave out sources that ask for colours.

    Args:
        source: of the tasks.
        augmentation: how much may change.
        seed: with the number of the task, what is drawn is a function of it.
    """

    def __init__(self, *, source: TaskSource, augmentation: Augmentation, seed: int) -> None:
        self.source, self.augmentation, self.seed = source, augmentation, seed

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        task = self.source(split, number)
        if split != TRAIN:
            return task
        key = (self.seed, number, zlib.crc32(task.environment.encode()))
        images = [p for m in task.prompt for p in m.parts if isinstance(p, Image)]
        if task.environment in COORDINATES and len(images) == 1:
            return self.moved(task, images[0], key)
        changed = [self.augmentation.colours([image.image], (*key, n))[0]
                   for n, image in enumerate(images)]  # fmt: skip
        return with_images(task, changed)

    def moved(self, task: Task, image: Image, key: Key) -> Task:
        """Change the one picture and the answer."""
        places = COORDINATES[task.environment]
        before = Annotated(image=image.image, **{places: task.answer})
        after = self.augmentation(before, key)
        return replace(with_images(task, [after.image]), answer=getattr(after, places))


def with_images(task: Task, images: list) -> Task:
    """Return the task with other pictures in the places of its own."""
    upcoming = iter(images)
    prompt = [
        replace(
            message,
            content=[
                Image(next(upcoming)) if isinstance(part, Image) else part for part in message.parts
            ],
        )
        for message in task.prompt
    ]
    return replace(task, prompt=prompt)
