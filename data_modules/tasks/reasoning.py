"""Tasks of reasoning-gym, by name and configuration, with its own verifiers."""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Message
from moonlit.rl.rewards.reasoning import library

SPLIT_SIZE = 1_000_000


class ReasoningGym:
    """Makes tasks of one of its datasets.

    Args:
        seed: of everything; the splits have seeds of their own.
        name: of the dataset, such as ``chain_sum``.
        config: what the dataset's own configuration takes.

    Raises:
        ValueError: if there is no such dataset, or it refuses the configuration.
    """

    def __init__(self, *, seed: int, name: str, config: Mapping[str, Any]) -> None:
        self.seed, self.name, self.config = seed, name, dict(config)
        try:
            self.dataset("train")
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"reasoning-gym {name!r} with {self.config}: {error}") from error

    @lru_cache(maxsize=2)  # noqa: B019  # a source lives as long as the run
    def dataset(self, split: str) -> Any:
        """Return the dataset of a split."""
        seed = zlib.crc32(f"{self.seed}/{split}".encode()) % 2**31
        return library().create_dataset(self.name, seed=seed, size=SPLIT_SIZE, **self.config)

    def __call__(self, split: str, number: int) -> Task:
        """Return a task; its truth is the dataset's name and entry, for the verifier."""
        entry = self.dataset(HELD_OUT if split == HELD_OUT else "train")[number % SPLIT_SIZE]
        return Task(
            prompt=[Message(role="user", content=entry["question"])],
            domain="reasoning",
            environment="reasoning_gym",
            answer={"name": self.name, "entry": entry},
            tags={"dataset": self.name},
        )
