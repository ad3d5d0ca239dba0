"""Rollouts as people look at them: JSON lines, one record a turn, and a trace for timelines.

A rollout's records are its turns in order and then its end: what it earned and why it stopped. A
sub-agent's rollout stands before its parent's end, with a link to the turn that called it.

Trace format: "Trace Event Format" of Chromium's tracing, which Perfetto opens.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL.Image import Image as PILImage

from moonlit.batch import Group, Task, Trajectory
from moonlit.chat.messages import Image, Message, Text, VideoChunk

ROLLOUTS = "rollouts"
PICTURES = "rollouts/pictures"
"""Folders of a run."""
HELD_OUT_ANSWERS = "held_out_answers{rank}.jsonl"
"""File of a run: its evaluations' answers, a line each; ``rank`` is empty for the first one."""
Record = dict[str, Any]
StorePicture = Callable[[PILImage], str]
"""Keeps a picture and returns its name."""
ESCAPES = "backslashreplace"
"""How what UTF-8 has no form for is written: a lone surrogate, which models and pages come to by
``json.loads``, then stands in JSON as its escape."""


def group_records(
    group: Group, *, step: int, number: str, store_picture: StorePicture
) -> Iterator[Record]:
    """Write down the rollouts of one task.

    Args:
        group: the rollouts of a task.
        step: optimizer steps taken when they were collected.
        number: of the group within the step.
        store_picture: keeps the pictures that messages hold.
    """
    for k, trajectory in enumerate(group.trajectories):
        name = f"{step}/{number}/{k}"
        yield from rollout_records(
            trajectory, group.task, name, step=step, parent=None, store_picture=store_picture
        )


def rollout_records(
    trajectory: Trajectory,
    task: Task,
    name: str,
    *,
    step: int,
    parent: str | None,
    store_picture: StorePicture,
) -> Iterator[Record]:
    """Write down a rollout and all below it."""
    shared = {"rollout": name, "parent": parent, "agent": trajectory.agent, "step": step}
    prompt = task.prompt if trajectory.prompt is None else trajectory.prompt
    sampled = sampled_turns(trajectory)
    for turn, message in enumerate([*prompt, *trajectory.messages]):
        span = trajectory.spans[turn - len(prompt)] if turn >= len(prompt) else None
        is_sampled = span is not None and message.role == "assistant"
        versions = next(sampled, []) if is_sampled else []
        yield {
            "kind": "turn",
            **shared,
            "turn": turn,
            **message_record(message, store_picture),
            "began_s": None if span is None else span.began_s,
            "ended_s": None if span is None else span.ended_s,
            "num_tokens": len(versions) if is_sampled else None,
            "policy_versions": [min(versions), max(versions)] if versions else [],
        }
    for place, child in enumerate(trajectory.children):
        yield from rollout_records(
            child, task, f"{name}.{place}", step=step, parent=name, store_picture=store_picture
        )
    yield {
        "kind": "end",
        **shared,
        "called_by_turn": trajectory.called_by,
        "domain": task.domain,
        "environment": task.environment,
        "truth": task.answer,
        "answer": trajectory.text,
        "reward": trajectory.reward if parent is None else None,  # a sub-agent earns none
        "rewards": trajectory.rewards,
        "stop_reason": trajectory.stop_reason,
        "error": trajectory.error,
        "num_tokens": trajectory.num_tokens,
        "metrics": trajectory.metrics,
    }


def sampled_turns(trajectory: Trajectory) -> Iterator[list[int]]:
    """Yield the policy versions of each run of sampled tokens: one run is one turn."""
    for segment in trajectory.segments:
        for is_sampled, run in groupby(
            zip(segment.is_sampled, segment.policy_versions, strict=True), key=lambda pair: pair[0]
        ):
            if is_sampled:
                yield [version for _, version in run]


def message_record(message: Message, store_picture: StorePicture) -> Record:
    """Write down what a turn says."""
    pictures = [image for part in message.parts for image in pictures_of_part(part)]
    return {
        "role": message.role,
        "agent_name": message.name,
        "text": "".join(part.text for part in message.parts if isinstance(part, Text)),
        "thinking": message.thinking,
        "calls": [
            {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
            for call in message.tool_calls
        ],
        "pictures": [store_picture(image) for image in pictures],
    }


def pictures_of_part(part: object) -> Sequence[PILImage]:
    """Return a part's picture, or a clip's frames."""
    if isinstance(part, Image):
        return [part.image]
    return part.frames if isinstance(part, VideoChunk) else []


class PictureStore:
    """Keeps each picture once, as a PNG named by its content.

    Args:
        folder: where; made when the first picture comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, image: PILImage) -> str:
        """Keep a picture and return its file's name."""
        file = io.BytesIO()
        image.save(file, "PNG")
        name = hashlib.sha256(file.getvalue()).hexdigest()[:20] + ".png"
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        return name


def write_escaped(path: Path, text: str) -> None:
    """Write JSON of what models and pages said."""
    path.write_text(text, encoding="utf-8", errors=ESCAPES)


def read_records(run: Path, *, cut: list[str] | None = None) -> Iterator[Record]:
    """Read a run's records, oldest step first.

    Args:
        run: the run's folder.
        cut: is told which files' last lines were cut off, as a killed run leaves them: no record
            comes of those. None: they are refused too.

    Raises:
        ValueError: if a line is no record, naming file and line.
    """
    for path in sorted((run / ROLLOUTS).glob("*.jsonl")):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line.decode())
                except ValueError as error:  # no UTF-8, or no JSON
                    if cut is not None and not line.endswith(b"\n"):
                        cut.append(f"{path.name}, line {number}")
                        continue
                    raise ValueError(f"{path}, line {number}: no record of a rollout") from error
                if not isinstance(record, dict) or not {"kind", "rollout"} <= set(record):
                    raise ValueError(f"{path}, line {number}: no record of a rollout")
                yield record


def chrome_trace(records: Sequence[Record]) -> dict[str, Any]:
    """Return the timed turns as a trace: a process for each root, a thread for each agent [us]."""
    processes: dict[str, int] = {}
    threads: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for record in records:
        name = record["rollout"]
        if name not in threads:
            root = name.split(".", 1)[0]
            pid = processes.setdefault(root, len(processes))
            threads[name] = len(threads)
            place = {"pid": pid, "tid": threads[name]}
            events += [
                {"ph": "M", "name": "process_name", **place, "args": {"name": f"rollout {root}"}},
                {"ph": "M", "name": "thread_name", **place, "args": {"name": record["agent"]}},
            ]
        if record["kind"] != "turn" or record["began_s"] is None:
            continue
        calls = ", ".join(call["name"] for call in record["calls"])
        events.append(
            {
                "ph": "X",
                "name": f"{record['role']} {calls}".strip(),
                "cat": record["role"],
                "ts": record["began_s"] * 1e6,
                "dur": (record["ended_s"] - record["began_s"]) * 1e6,
                "pid": processes[name.split(".", 1)[0]],
                "tid": threads[name],
                "args": {"text": record["text"][:500], "num_tokens": record["num_tokens"]},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
