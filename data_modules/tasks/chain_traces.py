"""``moonlit prepare source=chain_traces``: answers of unlike lengths to sums along a chain.

The same chain is answered at once (a guess, for a model this small), or after the running sums were
written down, or after going over them again and again: what a warmed-up policy chooses its lengths
from.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_modules.tasks.chains import Chains
from data_modules.tasks.source import HELD_OUT, TRAIN
from data_modules.zero_vision.lines import assistant, line, user
from data_modules.zero_vision.source import write_whole, written

SPLITS = {TRAIN: "train", HELD_OUT: "held_out"}
AGAIN = ";"
"""Between two passes over a chain."""


class ChainTraces:
    """Makes the set.

    Args:
        folder: where ``train.jsonl`` and ``held_out.jsonl`` go.
        source: of the tasks; traces take training tasks from ``first`` on.
        first: number of the first task.
        num_train: traces to train on.
        num_held_out: traces to score.
        passes: weight of each number of passes over a chain, 0 a guess.
        seed: of the draw.

    Raises:
        ValueError: if the weights are none.
    """

    def __init__(
        self,
        *,
        folder: str,
        source: Chains,
        first: int,
        num_train: int,
        num_held_out: int,
        passes: Mapping[int, float],
        seed: int,
    ) -> None:
        if not passes or min(*passes, *passes.values()) < 0 or not sum(passes.values()) > 0:
            raise ValueError(f"passes={dict(passes)}: want weights of numbers, none below 0")
        self.folder, self.source, self.first = Path(folder), source, first
        self.num = {TRAIN: num_train, HELD_OUT: num_held_out}
        self.passes, self.seed = dict(passes), seed

    def prepare_data(self) -> None:
        """Write both splits."""
        for split, name in SPLITS.items():
            traces = [self.trace(split, number) for number in range(self.num[split])]
            write_whole(self.folder / f"{name}.jsonl", "".join(map(written, traces)))
            console = Console(stderr=True, markup=False)
            console.print(f"wrote {self.folder / name}.jsonl: {len(traces):,} traces")

    def trace(self, split: str, number: int) -> dict[str, Any]:
        """Answer one task."""
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), number])
        shares = np.array(list(self.passes.values()), dtype=float)
        passes = list(self.passes)[rng.choice(len(shares), p=shares / shares.sum())]
        task = self.source(split, self.first + number)
        thinking = AGAIN.join([task.tags["steps"]] * passes)
        asked = "".join(part.text for part in task.prompt[0].parts)
        provenance = {"source": "chain_traces", "passes": passes, "truth": task.answer}
        return line([user(asked), assistant(str(task.answer), thinking)], [], provenance)
