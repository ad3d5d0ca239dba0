"""``moonlit prepare source=zero_vision``: the set of text-only trajectories, as JSON Lines.

Writes ``train.jsonl``, ``held_out.jsonl`` and ``report.json`` into one folder (``lines.py`` says
what a line is). Work is cut into shards of problem numbers; a shard is written when it is whole, so
a run that was stopped goes on where it was. The set is a function of the arguments and the code.

Source: technical report (arXiv:2602.02276), Sec. 2.2: text-only SFT whose image operations are
IPython code. It gives no counts and no schema.
"""

import asyncio
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_modules.components.part import Part
from data_modules.zero_vision.duplicates import Seen
from data_modules.zero_vision.lines import line
from data_modules.zero_vision.report import Report
from data_modules.zero_vision.solve import FAMILIES, Rejected, problem_rng, solve
from data_modules.zero_vision.text_tasks import WORKED, Searches, documentation
from moonlit.agents.sandbox.policy import Policy
from moonlit.agents.sandbox.pool import Pool
from moonlit.chat.tokenizer import Tokenizer
from moonlit.progress import Work

SHARD = 200
SPLITS = {"train": 0, "held_out": 1}
MAX_TRIES_PER_LINE = 4
"""The set is given up when so many problems were tried for each line wanted."""
EXPECTED_TRIES_PER_LINE = 1.2
"""What parts make ahead; what is missing then, the run that joins them makes."""
TEXT_KINDS = ("documentation", "worked", "searches")

Shard = dict[str, list[Any]]
"""``lines`` and ``rejected``, before near-duplicates are removed."""


class ZeroVision:
    """Makes the set.

    Args:
        folder: where it goes.
        seed: of everything.
        tokenizer: whose tokens the report counts.
        num_trajectories: verified ones to train on.
        num_documentation, num_worked, num_searches: dialogues without pictures to train on.
        num_held_out: held-out trajectories; of each other kind a quarter of it.
        num_workers: sandboxes at work at the same time.
        sandbox: what the code may do.
        part: ``2/8``: make only the second of eight parts and leave it beside the set; a run
            without it joins the parts and makes what is missing. Parts may run at the same time.

    Raises:
        ValueError: if a number is not one of a set that can be made, or of a part that there is.
    """

    def __init__(
        self,
        *,
        folder: str,
        seed: int,
        tokenizer: str,
        num_trajectories: int,
        num_documentation: int,
        num_worked: int,
        num_searches: int,
        num_held_out: int,
        num_workers: int,
        sandbox: Policy,
        part: str | None,
    ) -> None:
        counts = [num_trajectories, num_documentation, num_worked, num_searches, num_held_out]
        if min(counts) < 0 or num_workers < 1:
            raise ValueError(
                f"numbers of dialogues {counts}, num_workers={num_workers}: want at least 0 and 1"
            )
        self.folder, self.seed, self.tokenizer = Path(folder), seed, Tokenizer.named(tokenizer)
        text = dict(zip(TEXT_KINDS, counts[1:4], strict=True))
        quarter = dict.fromkeys(TEXT_KINDS, num_held_out // 4)
        self.wanted = {
            "train": {"trajectories": num_trajectories, **text},
            "held_out": {"trajectories": num_held_out, **quarter},
        }
        self.num_workers, self.sandbox = num_workers, sandbox
        self.part = Part.named(part)
        self.console = Console(stderr=True, markup=False)

    def asked_for(self) -> dict[str, Any]:
        """Everything that the set is a function of."""
        import data_modules.world
        import data_modules.zero_vision

        packages = (data_modules.zero_vision, data_modules.world)
        files = [f for p in packages for f in Path(str(p.__path__[0])).rglob("*.py")]
        code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
        limits = asdict(self.sandbox.limits)
        return {"seed": self.seed, "wanted": self.wanted, "code": code, "limits": limits}

    def prepare_data(self) -> None:
        """Make the set unless it is there."""
        asked = json.loads(json.dumps(self.asked_for()))
        done = self.folder / "report.json"
        if done.is_file() and json.loads(done.read_text())["asked_for"] == asked:
            self.console.print(f"{self.folder} holds this set already")
            return
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        parts = self.folder / f"parts-{digest}"
        parts.mkdir(parents=True, exist_ok=True)
        if self.part is not None:
            asyncio.run(self.make_part(parts, self.part))
            self.console.print(f"made part {self.part}; without source.part they are joined")
            return
        report = asyncio.run(self.make(parts))
        write_whole(done, json.dumps({"asked_for": asked, **report.as_json()}, indent=1))
        shutil.rmtree(parts)
        self.console.print(report.table())
        self.console.print(f"wrote {self.folder}; next:")
        train = (
            f"moonlit train phase=zero_vision_sft data.folder={self.folder} init_from=CHECKPOINT"
        )
        self.console.print(f"  {train}", soft_wrap=True, highlight=False)

    async def make(self, parts: Path) -> Report:
        """Make both splits."""
        report, seen = Report(self.tokenizer), Seen()
        total = sum(sum(wanted.values()) for wanted in self.wanted.values())
        with Work("trajectories", total, console=self.console) as work:
            async with Pool(self.sandbox, num_warm=self.num_workers) as pool:
                self.console.print(f"sandbox: {pool.report}")
                for split, wanted in self.wanted.items():
                    kept: list[dict[str, Any]] = []
                    for kind, num in wanted.items():
                        enough = len(kept) + num
                        for shard in range(-(-num * MAX_TRIES_PER_LINE // SHARD)):
                            if len(kept) >= enough:
                                break
                            made = await self.shard(parts, pool, split, kind, shard)
                            for value in self.new_lines(made, seen, report, split):
                                if len(kept) < enough:
                                    kept.append(value)
                                    report.keep(value)
                            work.update(report.num_kept)
                        self.check_enough(kind, len(kept) - enough, report)
                    write_whole(self.folder / f"{split}.jsonl", "".join(map(written, kept)))
        return report

    async def make_part(self, parts: Path, part: Part) -> None:
        """Make one part's shards of both splits."""
        shards = [
            (split, kind, number)
            for split, wanted in self.wanted.items()
            for kind, num in wanted.items()
            for number in range(math.ceil(num * EXPECTED_TRIES_PER_LINE / SHARD))
        ]
        async with Pool(self.sandbox, num_warm=self.num_workers) as pool:
            for split, kind, number in part.of(shards):
                await self.shard(parts, pool, split, kind, number)

    async def shard(self, parts: Path, pool: Pool, split: str, kind: str, number: int) -> Shard:
        """Read a shard that an earlier run made, or make it."""
        path = parts / f"{split}-{kind}-{number:05d}.json"
        if not path.is_file():
            numbers = range(number * SHARD, (number + 1) * SHARD)
            if kind == "trajectories":
                made = await self.trajectories(pool, split, numbers)
            else:
                made = await self.texts(split, kind, numbers)
            write_whole(path, json.dumps(made))
        return json.loads(path.read_text())

    async def trajectories(self, pool: Pool, split: str, numbers: range) -> Shard:
        """Solve problems, one family after another, several at a time."""
        room = asyncio.Semaphore(self.num_workers)

        async def one(number: int) -> Any:
            family = list(FAMILIES)[number % len(FAMILIES)]
            place = number // len(FAMILIES)
            provenance = self.provenance("zero_vision", split, place)
            rng = problem_rng(self.seed, SPLITS[split], family, place)
            async with room:
                return await solve(pool, family, rng, provenance)

        made = await asyncio.gather(*map(one, numbers))
        return {
            "lines": [value for value in made if not isinstance(value, Rejected)],
            "rejected": [asdict(value) for value in made if isinstance(value, Rejected)],
        }

    async def texts(self, split: str, kind: str, numbers: range) -> Shard:
        """Make dialogues without pictures."""
        searches = Searches(2 * self.seed + SPLITS[split]) if kind == "searches" else None
        lines = []
        for number in numbers:
            place = TEXT_KINDS.index(kind)
            rng = np.random.default_rng([self.seed, 12, SPLITS[split], place, number])
            if searches is not None:
                family, messages, tools, truth = await searches.dialogue(rng)
            elif kind == "documentation":
                family, messages, tools, truth = documentation(rng, held_out=split == "held_out")
            else:
                family, messages, tools, truth = WORKED[number % len(WORKED)](rng)
            provenance = self.provenance(kind, split, number)
            provenance |= {"family": family, "program": kind, "difficulty": 1, "truth": truth}
            lines.append(line(messages, tools, provenance))
        return {"lines": lines, "rejected": []}

    def provenance(self, source: str, split: str, number: int) -> dict[str, Any]:
        """Say where a line comes from."""
        return {"source": source, "seed": self.seed, "split": split, "number": number}

    def new_lines(
        self, made: Shard, seen: Seen, report: Report, split: str
    ) -> Iterator[dict[str, Any]]:
        """Yield what is no near-duplicate; count everything."""
        for rejected in made["rejected"]:
            report.reject(rejected["family"], rejected["reason"])
        for value in made["lines"]:
            if seen.is_new(value):
                yield value
            else:
                report.reject(value["provenance"]["family"], "duplicate")

    def check_enough(self, kind: str, surplus: int, report: Report) -> None:
        """Refuse to write a smaller set than was asked for.

        Raises:
            RuntimeError: if lines are missing, with what became of the problems.
        """
        if surplus < 0:
            raise RuntimeError(
                f"{kind}: {-surplus} dialogues are missing after {MAX_TRIES_PER_LINE} tries for "
                f"each one wanted; rejected: {report.reasons()}"
            )


def written(value: dict[str, Any]) -> str:
    """Return a line as JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
