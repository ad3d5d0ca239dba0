"""Tasks of a ``verifiers`` environment, the format of the Environments Hub.

The package is no dependency: ``uv pip install verifiers==0.4.0`` (its version 1 interface) adds 36
packages beside ours and moves none of them. Install an environment's own package too.

What can be used are environments whose tasks are asked in messages and scored from the answer:
one that wants tools, a container or a runtime to score in is refused by name. Their rewards are
``moonlit.rl.rewards.verifiers.VerifiersJudge``'s.
"""

import functools
import itertools
import zlib
from collections.abc import Mapping
from typing import Any

from data_modules.tasks.source import HELD_OUT
from moonlit.batch import Task
from moonlit.chat.messages import Message
from moonlit.rl.rewards.verifiers import ENVIRONMENT, loaded_environment, require_scorable

HELD_OUT_ONE_IN = 10
"""Of the tasks, by their keys; no task is in both splits."""
MAX_TASKS = 100_000
"""Read of an environment that has no end (our default)."""


class VerifiersTasks:
    """Deals out an environment's tasks, each split in an order of its own, over and over.

    Args:
        name: of the environment, as ``verifiers.v1.load_environment`` finds it.
        config: of its taskset, by its own keys.
        seed: of the order.

    Raises:
        ModuleNotFoundError: if the package or the environment is not installed.
        ValueError: if its tasks cannot be used, with the reason, or a split is empty.
    """

    def __init__(self, *, name: str, config: Mapping[str, Any], seed: int) -> None:
        self.name, self.config, self.seed = name, dict(config), seed
        tasks = list(itertools.islice(loaded_environment(name, self.config).taskset, MAX_TASKS))
        self.splits: dict[bool, list[Any]] = {False: [], True: []}
        for task in tasks:
            require_scorable(task)
            self.splits[zlib.crc32(task.key.encode()) % HELD_OUT_ONE_IN == 0].append(task)
        if not all(self.splits.values()):
            raise ValueError(f"{name}: {len(tasks)} tasks are too few for two splits")

    def __call__(self, split: str, number: int) -> Task:
        """Return a task; its truth is what its scorer needs."""
        tasks = self.splits[split == HELD_OUT]
        epoch, place = divmod(number, len(tasks))
        task = tasks[order_of(self.seed, epoch, len(tasks))[place]]
        return Task(
            prompt=messages_of(task),
            domain="reasoning",
            environment=ENVIRONMENT,
            answer={
                "name": self.name,
                "config": self.config,
                "data": task.data.model_dump(mode="json"),
            },
            tags={"name": self.name},
        )


@functools.lru_cache(maxsize=4)
def order_of(seed: int, epoch: int, num_tasks: int) -> list[int]:
    """Return the order of an epoch: a permutation."""
    return sorted(range(num_tasks), key=lambda n: zlib.crc32(f"{seed}/{epoch}/{n}".encode()))


def messages_of(task: Any) -> list[Message]:
    """Return a task's prompt.

    Raises:
        ValueError: if a message holds more than text.
    """
    data = task.data
    system: list[tuple[Any, Any]] = (
        [] if data.system_prompt is None else [("system", data.system_prompt)]
    )
    asked: list[tuple[Any, Any]] = (
        [("user", data.prompt)]
        if isinstance(data.prompt, str)
        else [(message.role, message.content) for message in data.prompt]
    )
    if strange := [role for role, content in asked if not isinstance(content, str)]:
        raise ValueError(f"task {data.idx}: messages of {strange} hold more than text")
    return [Message(role=role, content=content) for role, content in (*system, *asked)]
