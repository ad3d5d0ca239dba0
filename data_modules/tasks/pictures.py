"""Tasks about pictures, pages and clips of the embedded world."""

from functools import lru_cache

from data_modules.tasks.source import HELD_OUT
from data_modules.world import sources
from data_modules.world.docs import Docs
from data_modules.world.sources import World
from moonlit.batch import Task
from moonlit.chat.tokenizer import Tokenizer


class Pictures:
    """Questions of one family.

    Args:
        seed: of the world; the held-out pictures are those of pre-training's held-out sets.
        family: of training tasks: a key of ``data_modules.world.sources.FAMILIES`` or of
            ``TASK_FAMILIES``, or ``pages``.
        held_out_family: of held-out tasks, of ``HELD_OUT_FAMILIES`` or the same; None: that name.
        picture_side: of scenes and clips [px].
        first: number of the first training task: below it lie pre-training's pictures.
    """

    def __init__(
        self,
        *,
        seed: int,
        family: str,
        held_out_family: str | None = None,
        picture_side: int,
        first: int,
    ) -> None:
        held_out_family = family if held_out_family is None else held_out_family
        for key, name, known in (
            ("family", family, sources.FAMILIES),
            ("held_out_family", held_out_family, sources.HELD_OUT_FAMILIES),
        ):
            names = (*known, *sources.TASK_FAMILIES, "pages")
            if name not in names:
                raise ValueError(f"{key}={name}: there are {', '.join(names)}")
        self.seed, self.first, self.picture_side = seed, first, picture_side
        self.family, self.held_out_family = family, held_out_family

    def __call__(self, split: str, number: int) -> Task:
        """Return a task."""
        world = world_of(self.seed, self.picture_side)
        if split == HELD_OUT:
            return world.item(self.held_out_family, number, sources.HELD_OUT).task()
        return world.item(self.family, self.first + number, sources.TRAIN).task()


@lru_cache(maxsize=4)
def world_of(seed: int, picture_side: int) -> World:
    """Return a world; its texts are only read for pages."""
    return World(
        seed=seed,
        tokenizer=Tokenizer.embedded(),  # of documents; tasks are words
        picture_side=picture_side,
        questions_per_picture=1,
        docs=Docs.of_this_python(),
    )
