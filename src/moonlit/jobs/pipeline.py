"""A chain of jobs, each from the checkpoint of the one before."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonlit.jobs.job import Job
from moonlit.jobs.script import RUNS
from moonlit.runs.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One job of a pipeline.

    Attributes:
        name: of its folder, and before the colon of words that are its alone.
        words: overrides.
        template: which template runs it.
        source: the stage whose last checkpoint it starts from.
        after: further stages that must have ended.
        makes: a file that says that it has ended, where it is no run of ``moonlit train``.
    """

    name: str
    words: Sequence[str]
    template: str = "train"
    source: str | None = None
    after: Sequence[str] = field(default_factory=tuple)
    makes: Path | None = None

    @classmethod
    def read(cls, value: dict[str, Any]) -> "Stage":
        """Read an entry of ``conf/pipeline/``."""
        known = dict(value)
        makes = known.pop("makes", None)
        return cls(
            source=known.pop("from", None), makes=None if makes is None else Path(makes), **known
        )

    @property
    def needs(self) -> list[str]:
        """Names of the stages before it."""
        return [*([] if self.source is None else [self.source]), *self.after]


def words_of(stage: Stage, said: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return what a stage is started with: its own words, those for all phases, those for it.

    Raises:
        ValueError: for words of a stage that there is not.
    """
    words = list(stage.words)
    for word in said:
        name, has_colon, rest = word.partition(":")
        is_addressed = bool(has_colon) and "=" not in name
        if is_addressed and name not in names:
            raise ValueError(f"{word}: no stage {name!r}; there are {', '.join(names)}")
        if is_addressed:
            words += [rest] if name == stage.name else []
        elif stage.template in RUNS:
            words.append(word)
    return words


@dataclass(frozen=True, slots=True)
class Queued:
    """What became of a stage: ``finished`` before, ``queued`` before, or ``submitted`` now."""

    stage: str
    state: str
    job: str | None


def submit_chain(
    stages: Sequence[Stage],
    job_of: Callable[[Stage], Job],
    *,
    submit: Callable[[Job, list[str]], str],
) -> list[Queued]:
    """Submit what has neither finished nor is queued.

    Args:
        stages: each behind those it needs.
        job_of: makes a stage's job.
        submit: queues a job behind others.
    """
    done: dict[str, Queued] = {}
    for stage in stages:
        job = job_of(stage)
        if is_finished(stage, job):
            done[stage.name] = Queued(stage.name, "finished", None)
        elif (number := job.queued()) is not None:
            done[stage.name] = Queued(stage.name, "queued", number)
        else:
            after = [known for name in stage.needs if (known := done[name].job) is not None]
            done[stage.name] = Queued(stage.name, "submitted", submit(job, after))
    return list(done.values())


def is_finished(stage: Stage, job: Job) -> bool:
    """Say whether a stage has come to its end before."""
    return RunFolder(job.folder).is_finished if stage.makes is None else stage.makes.is_file()
