"""Rollouts written down: turns, versions, times, links to sub-agents, and a trace of them."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from lightning import LightningModule, Trainer
from PIL import Image as PILImage

from callbacks.rollout_records import RolloutRecords
from moonlit.batch import Group, Segment, Span, Task, Trajectory
from moonlit.chat.messages import Image, Message, Text, ToolCall
from moonlit.report.page import write_page
from moonlit.rl.records import PICTURES, chrome_trace, group_records, read_records

PICTURE = PILImage.new("RGB", (28, 28), "red")


def child() -> Trajectory:
    return Trajectory(
        agent="reader",
        prompt=[
            Message(role="system", content="read"),
            Message(role="user", content="read page 4"),
        ],
        called_by=1,
        segments=[segment([False, True], [-1, 2])],
        messages=[Message(role="assistant", content="nothing there")],
        spans=[Span(11.5, 13.0)],
        stop_reason="error",
        error="TimeoutError: 5 s",
    )


def segment(is_sampled: list[bool], versions: list[int]) -> Segment:
    return Segment(
        input_ids=list(range(len(is_sampled))),
        is_sampled=is_sampled,
        behavior_logprobs=[0.0] * len(is_sampled),
        policy_versions=versions,
    )


def group() -> Group:
    task = Task(
        prompt=[Message(role="user", content=[Image(PICTURE), Text("How many?")])],
        domain="perception",
        environment="counting",
        answer=3,
    )
    call = ToolCall("assign_task", {"agent": "reader"}, "functions.assign_task:0")
    trajectory = Trajectory(
        segments=[segment([False, True, True, False, True], [-1, 3, 4, -1, 4])],
        messages=[
            Message(role="assistant", content="so", thinking="hm", tool_calls=[call]),
            Message(role="tool", content="lost", name="assign_task", tool_call_id="0"),
            Message(role="assistant", content="3"),
        ],
        spans=[Span(10.0, 11.0), Span(11.0, 13.0), Span(13.0, 13.5)],
        stop_reason="answer",
        text="3",
        reward=1.0,
        rewards={"counting": 1.0},
        metrics={"num_turns": 2.0},
        children=[child()],
    )
    return Group(task=task, trajectories=[trajectory])


def records() -> list[dict]:
    return list(group_records(group(), step=7, number="0-2", store_picture=lambda image: "x.png"))


def test_a_record_a_turn_with_versions_and_times():
    turns = [r for r in records() if r["kind"] == "turn" and r["parent"] is None]

    assert [r["role"] for r in turns] == ["user", "assistant", "tool", "assistant"]
    assert [r["num_tokens"] for r in turns] == [None, 2, None, 1]
    assert turns[1]["policy_versions"] == [3, 4]
    assert (turns[2]["began_s"], turns[2]["ended_s"]) == (11.0, 13.0)
    assert turns[0]["pictures"] == ["x.png"]
    assert json.loads(turns[1]["calls"][0]["arguments"]) == {"agent": "reader"}
    assert [(r["text"], r["thinking"]) for r in turns[:2]] == [("How many?", None), ("so", "hm")]


def test_an_end_says_what_was_asked_answered_and_earned():
    (end,) = (r for r in records() if r["kind"] == "end" and r["parent"] is None)
    assert end == {
        "kind": "end", "rollout": "7/0-2/0", "parent": None, "agent": "policy", "step": 7,
        "called_by_turn": None, "domain": "perception", "environment": "counting", "truth": 3,
        "answer": "3", "reward": 1.0, "rewards": {"counting": 1.0}, "stop_reason": "answer",
        "error": None, "num_tokens": 3, "metrics": {"num_turns": 2.0},
    }  # fmt: skip


def test_a_sub_agent_is_linked_to_the_turn_that_called_it():
    ends = {r["rollout"]: r for r in records() if r["kind"] == "end"}

    assert ends["7/0-2/0"]["parent"] is None
    assert ends["7/0-2/0.0"]["parent"] == "7/0-2/0"
    assert ends["7/0-2/0.0"]["called_by_turn"] == 1
    assert ends["7/0-2/0.0"]["error"] == "TimeoutError: 5 s"
    assert ends["7/0-2/0"]["reward"] == 1.0
    assert ends["7/0-2/0.0"]["reward"] is None


def test_a_sub_agents_turns_begin_with_what_it_was_told():
    turns = [r for r in records() if r["kind"] == "turn" and r["parent"] is not None]
    words = [(r["turn"], r["text"]) for r in turns]
    assert words == [(0, "read"), (1, "read page 4"), (2, "nothing there")]


def test_all_below_a_rollout_are_one_process_of_its_trace():
    whole = group()
    whole.trajectories[0].children[0].children = [child()]
    made = list(group_records(whole, step=7, number="0", store_picture=lambda image: "x.png"))
    assert {r["rollout"]: r["parent"] for r in made}["7/0/0.0.0"] == "7/0/0.0"
    events = chrome_trace(made)["traceEvents"]
    for kind in ("M", "X"):
        places = {(event["pid"], event["tid"]) for event in events if event["ph"] == kind}
        assert places == {(0, 0), (0, 1), (0, 2)}


def test_the_trace_holds_every_timed_turn_in_microseconds():
    events = chrome_trace(records())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}

    assert names == {"policy", "reader"}
    assert sorted((bar["ts"], bar["dur"]) for bar in bars) == [
        (10.0e6, 1.0e6),
        (11.0e6, 2.0e6),
        (11.5e6, 1.5e6),
        (13.0e6, 0.5e6),
    ]
    assert len({bar["pid"] for bar in bars}) == 1
    assert len({bar["tid"] for bar in bars}) == 2


def test_what_is_written_is_read_back(tmp_path: Path):
    watcher = RolloutRecords(run_dir=str(tmp_path), every_n_iterations=1, max_groups=8)

    watcher.write([group()], step=7, rank=0)
    watcher.write([group()], step=8, rank=1)

    read = list(read_records(tmp_path))
    assert [r["step"] for r in read if r["kind"] == "end"] == [7, 7, 8, 8]
    assert len({r["rollout"] for r in read}) == 4
    assert len(list((tmp_path / PICTURES).iterdir())) == 1  # the same picture is kept once
    assert json.loads((tmp_path / "rollouts/step_000007.trace.json").read_text())["traceEvents"]


def test_a_lone_surrogate_is_written_as_its_escape_and_shown(tmp_path: Path):
    """A model that writes JSON comes to one: ``json.loads`` yields it."""
    said = json.loads('"price \\ud83d"')
    task = group()
    task.trajectories[0].children[0].messages[0] = Message(role="assistant", content=said)
    task.trajectories[0].children[0].text = said
    task.trajectories[0].error = said
    task.trajectories[0].messages[0].tool_calls[0].arguments["prompt"] = said

    RolloutRecords(run_dir=str(tmp_path), every_n_iterations=1, max_groups=8).write([task], 7, 0)
    write_page(tmp_path, tmp_path / "report.html", max_rollouts=1)

    assert said in {r["answer"] for r in read_records(tmp_path) if r["kind"] == "end"}
    for name in ("rollouts/step_000007.jsonl", "rollouts/step_000007.trace.json", "report.html"):
        assert "price \\ud83d" in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ['{"kind": "turn"}', "[1]", '{"kind": '])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path):
    RolloutRecords(run_dir=str(tmp_path), every_n_iterations=1, max_groups=8).write([], 7, 0)
    path = tmp_path / "rollouts/step_000007.jsonl"
    path.write_text(json.dumps(records()[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"step_000007\.jsonl, line 2: no record of a rollout"):
        list(read_records(tmp_path))


def test_rollouts_are_written_when_they_are_due_and_no_more_than_asked_for(tmp_path: Path):
    def watch(watcher: RolloutRecords, *steps: int) -> None:
        phase = Mock(LightningModule)
        for phase.last_groups, step in (([group()] * 3, step) for step in steps):
            trainer = Mock(Trainer, global_step=step, global_rank=0, max_steps=8)
            watcher.on_train_batch_end(trainer, phase, None, None, 0)

    settings = {"run_dir": str(tmp_path), "every_n_iterations": 3, "max_groups": 2}
    before, after = RolloutRecords(**settings), RolloutRecords(**settings)
    watch(before, 0, 1, 2, 3)
    after.load_state_dict(before.state_dict())
    watch(after, 4, 5, 6, 7, 8)

    ends = [r for r in read_records(tmp_path) if r["kind"] == "end" and r["parent"] is None]
    assert [r["step"] for r in ends] == [0, 0, 3, 3, 6, 6, 8, 8]  # and the last
