"""Batch downloads: what was saved counts, whoever saved it, and nothing that was only said."""

import asyncio

import pytest

from data_modules.tasks.downloads import DownloadJudge, Downloads
from data_modules.tasks.source import TRAIN
from moonlit.batch import Trajectory
from moonlit.chat.messages import Message

TASK = Downloads(seed=3, min_pages=4, max_pages=4)(TRAIN, 0)


def saving(*words: str, stop_reason: str = "answer", name: str = "save") -> Trajectory:
    messages = [Message(role="tool", content=one, name=name, tool_call_id="0") for one in words]
    return Trajectory(
        segments=[], messages=messages, spans=[], stop_reason=stop_reason, text="saved 4"
    )


def judged(trajectory: Trajectory, *children: Trajectory) -> float:
    trajectory.children = list(children)
    return asyncio.run(DownloadJudge().judge(TASK, trajectory))["download"]


def test_pages_count_once_whoever_saved_them():
    assert TASK.answer == [1, 2, 3, 4]
    pair, others = ("saved 1", "saved 2"), saving("saved 3", "saved 4")
    assert judged(saving(*pair)) == 2 * 2 / (2 + 4)
    assert judged(saving(*pair, *pair)) == 2 * 2 / (2 + 4)
    assert judged(saving(*pair), others) == 1.0
    lead = saving()
    lead.children = [others]
    assert judged(saving(*pair), lead) == 1.0


def test_what_was_not_asked_for_not_saved_or_only_said_gains_nothing():
    assert judged(saving("saved 1", "saved 9")) == 2 * 1 / (2 + 4)
    assert judged(saving("Error: save failed: it was saved 1")) == 0.0
    assert judged(saving("saved 1", name="assign_task")) == 0.0
    assert judged(saving("saved 1", stop_reason="budget")) == 0.0


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="want 1 <= min <= max <= 99"):
        Downloads(seed=0, min_pages=3, max_pages=2)
