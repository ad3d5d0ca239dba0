"""Wide tables: what counts as right, who needs how many steps, and traces that rollouts repeat."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_modules.components.dialogue_files import PicturesIn, parse_dialogue
from data_modules.tasks.source import HELD_OUT, TRAIN
from data_modules.tasks.swarm_traces import SwarmTraces, reassigned, trace
from data_modules.tasks.wide_tables import (
    TableJudge,
    TableRows,
    TableScript,
    WideTables,
    fill_cells,
)
from moonlit.agents.environment import VerifierError
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.swarm import SubAgent
from moonlit.batch import Trajectory
from moonlit.chat.messages import Message, ToolCall
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer
from moonlit.rl.swarm_environment import SwarmEnvironment
from tests.rl.scripted import SPECIAL, TOKENIZER, Scripted, conversation

SOURCE = WideTables(seed=3, min_rows=3, max_rows=7)
SCRIPT = TableScript()


def sheets(split: str, num: int = 300) -> set[str]:
    return {SOURCE(split, number).answer[0][0].partition("-")[0] for number in range(num)}


def test_the_splits_share_no_sheet():
    train, held_out = sheets(TRAIN), sheets(HELD_OUT)
    assert len(train) > 150
    assert len(held_out) > 50
    assert not train & held_out
    assert not {name for name in train | held_out if name[0] == "w"}  # agents are called so


def test_a_task_asks_for_rows_in_a_line_and_says_nothing_of_how():
    for number in range(50):
        task = SOURCE(TRAIN, number)
        names = [row[0] for row in task.answer]
        assert 3 <= len(names) <= 7
        (sheet,) = {name.partition("-")[0] for name in names}
        first, last = (names[place].partition("-")[2] for place in (0, -1))
        assert task.prompt[0].words == f"Fill in {first} to {last} of\n{sheet}"


def filling(*cells: str, **more: Any) -> Trajectory:
    calls = [
        ToolCall("fill", {"cell": cell}, f"functions.fill:{n}") for n, cell in enumerate(cells)
    ]
    messages = [Message(role="assistant", content="", tool_calls=[call]) for call in calls]
    return Trajectory(
        segments=[], messages=messages, spans=[], **{"stop_reason": "answer"} | more
    )  # fmt: skip


def judged(trajectory: Trajectory) -> tuple[float, float]:
    task = SOURCE(TRAIN, 0)
    task.answer = [["aB-one", "red", "star"], ["aB-two", "blue", "cross"]]
    (score,) = asyncio.run(TableJudge().judge(task, trajectory)).values()
    return score, trajectory.metrics["row_f1"]


ONE, TWO = (["aB-one colour", "aB-one shape"], ["aB-two colour", "aB-two shape"])


@pytest.mark.parametrize(
    ("cells", "item_f1", "row_f1"),
    [
        ([*ONE, *TWO], 1.0, 1.0),
        ([*TWO, *ONE, *ONE], 1.0, 1.0),  # done twice is done once
        (ONE, 2 * 2 / (2 + 4), 2 / 3),
        ([*ONE, TWO[0]], 2 * 3 / (3 + 4), 2 * 1 / (2 + 2)),
        ([*ONE, *TWO, "aB-six colour"], 2 * 4 / (5 + 4), 2 * 2 / (3 + 2)),
        ([], 0.0, 0.0),
    ],
)
def test_f1_of_cells_and_of_rows(cells: list[str], item_f1: float, row_f1: float):
    assert judged(filling(*cells)) == (pytest.approx(item_f1), pytest.approx(row_f1))
    by_child = filling()
    by_child.children = [filling(*cells)]
    assert judged(by_child) == (pytest.approx(item_f1), pytest.approx(row_f1))


@pytest.mark.parametrize("cells", [[], ONE])
def test_a_task_without_rows_is_the_verifiers_error(cells: list[str]):
    task = SOURCE(TRAIN, 0)
    task.answer = []
    with pytest.raises(VerifierError, match="TableJudge: the task's answer has no rows"):
        asyncio.run(TableJudge().judge(task, filling(*cells)))


def test_without_an_answer_nothing_counts_of_anybody():
    assert judged(filling(*ONE, *TWO, stop_reason="turns")) == (0.0, 0.0)
    whole = filling(*ONE)
    whole.children = [filling(*TWO, stop_reason="turns"), filling(*TWO, error="lost")]
    assert judged(whole) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_what_was_not_asked_for_counts_against_whoever_tried():
    whole = filling(*ONE, *TWO)
    whole.children = [filling("aB-ten colour", error="garbage: no word in its answer")]
    assert judged(whole) == (pytest.approx(2 * 4 / (5 + 4)), pytest.approx(2 * 2 / (3 + 2)))


def lost_and(*later: Trajectory) -> dict[str, float]:
    """Row one is lost in the first turn, row two is not; then come others."""
    whole = filling()
    first = [row_child(1, "aB-one", error="lost"), row_child(1, "aB-two", TWO)]
    whole.children = [*first, *later]
    judged(whole)
    return {name: whole.metrics[name] for name in ("rows_lost", "rows_reassigned", "rows_mended")}


def row_child(turn: int, row: str, cells: Sequence[str] = (), **more: Any) -> Trajectory:
    prompt = [Message(role="system", content="fill"), Message(role="user", content=row)]
    return filling(*cells, called_by=turn, prompt=prompt, **more)


@pytest.mark.parametrize(
    ("later", "wanted"),
    [
        ([], (1, 0, 0)),
        ([row_child(4, "aB-one", ONE)], (1, 1, 1)),
        ([row_child(4, "aB-one", error="lost")], (1, 1, 0)),
        ([row_child(4, "aB-two", TWO)], (1, 0, 0)),  # it was not lost
        ([row_child(1, "aB-one", ONE)], (0, 0, 0)),  # two were asked at once, and one came back
        ([row_child(1, "aB-two", error="lost")], (1, 0, 0)),  # the same, the other way round
        ([row_child(1, "aB-six", error="lost")], (1, 0, 0)),  # nobody wants that row
    ],
)
def test_what_became_of_lost_rows(later: list[Trajectory], wanted: tuple[int, int, int]):
    assert tuple(lost_and(*later).values()) == wanted


def test_a_lost_row_that_the_agent_fills_in_itself_is_mended():
    whole = filling(*ONE)
    whole.children = [row_child(1, "aB-one", error="lost")]
    judged(whole)
    assert (whole.metrics["rows_reassigned"], whole.metrics["rows_mended"]) == (0, 1)


def rolled_out(
    line: dict[str, Any], *, has_swarm: bool, number: int, worker: SubAgent | None = None
) -> Trajectory:
    """Let an engine say what the trace's assistant says."""
    dialogue = parse_dialogue(json.loads(json.dumps(line)), media=PicturesIn(Path()))
    rendered = render(dialogue.messages, TOKENIZER, tools=dialogue.tools)
    turns: list[list[int]] = [[]]
    for token_id, is_own in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if is_own:
            turns[-1].append(token_id)
            turns += [[]] if token_id == SPECIAL.im_end_id else []
    environment = SwarmEnvironment(
        workers={"w": worker or SCRIPT.worker()} if has_swarm else {},
        toolbox=fill_cells,
        judge=TableJudge(),
        reward=ParlReward(parallel_weight=0.1, finish_weight=0.1, annealed_by=0.5, cap=2),
        limits=SwarmLimits(max_critical_steps=20),
    )
    policy = conversation(Scripted(*turns[:-1]), max_turns=20)
    trajectory = asyncio.run(environment.run(SOURCE(TRAIN, number), policy, seed=0))
    (segment,) = trajectory.segments
    assert segment.input_ids == rendered.input_ids
    assert segment.is_sampled == rendered.loss_mask
    return trajectory


@pytest.mark.parametrize("number", range(4))
def test_a_trace_is_token_for_token_what_a_rollout_would_be_and_right(number: int):
    """Catches: tools declared otherwise, results named otherwise, a script that does not work."""
    task = SOURCE(TRAIN, number)
    for is_parallel, has_swarm in ((True, True), (False, True), (False, False)):
        line = asyncio.run(trace(task, SCRIPT, is_parallel=is_parallel, has_swarm=has_swarm))
        done = rolled_out(line, has_swarm=has_swarm, number=number)

        assert done.rewards["wide_table"] == 1.0
        num_rows = len(task.answer)
        expected = 1 + 3 + 1 if is_parallel else 2 * num_rows + 1
        assert done.metrics["critical_steps"] == expected
        assert done.metrics["parallelism"] == (num_rows if is_parallel else 0)
        assert done.rewards["parallel"] == (1.0 if is_parallel else 0.0)


@pytest.mark.parametrize("number", range(6))
def test_a_trace_with_a_dead_agent_gives_its_rows_to_the_other_one_or_not(number: int):
    """Nine steps if it does: that is the budget of experiment=parl_facts."""
    script = TableScript(dead_share=1.0)
    num_rows = len(SOURCE(TRAIN, number).answer)
    for reassigns in (True, False):
        line = asyncio.run(
            trace(SOURCE(TRAIN, number), script, is_parallel=True, has_swarm=True,
                  reassigns=reassigns)
        )  # fmt: skip
        done = rolled_out(line, has_swarm=True, number=number, worker=script.worker())

        lost = done.metrics["rows_lost"]
        assert lost in (num_rows // 2, (num_rows + 1) // 2)
        assert done.metrics["rows_mended"] == (lost if reassigns else 0)
        assert done.metrics["critical_steps"] == (9 if reassigns else 5)
        assert (done.rewards["wide_table"] == 1.0) is reassigns


def test_a_trace_can_deal_rows_to_agents_at_random():
    """Another way at another task, the same at the same; and the judge counts who was asked."""
    script, first = TableScript(deals_at_random=True), []
    for number in range(40):
        turns = script.parallel(SOURCE(TRAIN, number))
        assert turns == script.parallel(SOURCE(TRAIN, number))
        first += [call["agent"] == "w1" for name, call in turns[0] if name == "assign_task"]
    assert sum(first) == pytest.approx(len(first) / 2, abs=len(first) / 6)

    task = SOURCE(TRAIN, 3)
    line = asyncio.run(trace(task, script, is_parallel=True, has_swarm=True, reassigns=False))
    done = rolled_out(line, has_swarm=True, number=3)
    asked = [call["agent"] for name, call in script.parallel(task)[0] if name == "assign_task"]
    assert done.metrics["asked_first"] == asked.count("w1") != asked.count("w2")


def test_a_row_is_what_a_sub_agent_is_asked_for():
    """Its trace stands in the context of a sub-agent: system prompt, row, the tool alone."""
    rows = TableRows(seed=3)
    line = asyncio.run(trace(rows(TRAIN, 5), SCRIPT, is_parallel=False, has_swarm=False))
    row = rows(TRAIN, 5).answer[0][0]
    told = [(one["role"], one["content"]) for one in line["messages"][:2]]
    assert told == [("system", "fill"), ("user", row)]
    assert [tool["function"]["name"] for tool in line["tools"]] == ["fill"]
    made = [
        call["function"]["arguments"] for m in line["messages"] for call in m.get("tool_calls", ())
    ]
    assert [json.loads(one)["cell"] for one in made] == [f"{row} colour", f"{row} shape"]


def test_the_shares_of_traces_are_what_was_asked_for(tmp_path):
    settings = {"parallel_fraction": 0.25, "single_fraction": 0.5, "reassign_fraction": 0.0}
    SwarmTraces(
        folder=str(tmp_path), source=SOURCE, script=SCRIPT, first=500, num_train=200,
        num_held_out=1, vocabulary=400, seed=0, **settings,
    ).prepare_data()  # fmt: skip

    assert Tokenizer.named(tmp_path / "tokenizer").vocab_size == 400 + 256
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = [line["messages"][0]["content"] for line in lines]
    assert asked == [SOURCE(TRAIN, 500 + number).prompt[0].words for number in range(200)]
    parallel = sum(line["provenance"]["parallel"] for line in lines)
    alone = sum(len(line["tools"]) == 1 for line in lines)
    assert parallel == pytest.approx(50, abs=20)
    assert alone == pytest.approx(100, abs=20)
    assert not any(line["provenance"]["parallel"] and len(line["tools"]) == 1 for line in lines)


def test_lost_rows_go_round_among_the_agents_that_lost_none():
    created = [("create_subagent", {"name": one, "system_prompt": "fill"}) for one in "abc"]
    lost = [("assign_task", {"agent": "b", "prompt": row}) for row in ("one", "two", "three")]
    again = reassigned(lost, [*created, *lost])
    assert [(given["agent"], given["prompt"]) for _, given in again] == [
        ("a", "one"), ("c", "two"), ("a", "three"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nobody is left to do what b lost"):
        reassigned(lost, [created[1], *lost])


def test_a_cell_that_is_not_there_is_a_tool_error():
    async def fill(cell: str) -> tuple[str, str | None]:
        async with fill_cells(SOURCE(TRAIN, 0)) as tools:
            (tool,) = tools.tools
            output = await tool.call({"cell": cell})
            return output.text, output.error

    name, colour, _ = SOURCE(TRAIN, 0).answer[0]
    assert asyncio.run(fill(f"{name} colour")) == (colour, None)
    assert asyncio.run(fill("zz size"))[1] == "there is no cell 'zz size'"
