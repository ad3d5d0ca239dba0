"""Environments of the real ``verifiers`` package: their tasks, their splits, their own rewards.

The package is no dependency: without it the tests that need it are skipped. With it (in a copy of
this environment, ``uv pip install verifiers==0.4.0``) they run as they are.
"""

import asyncio
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_modules.tasks.verifiers import VerifiersTasks
from moonlit.agents.environment import VerifierError
from moonlit.batch import Task
from moonlit.rl.dialogue_environment import DialogueEnvironment
from moonlit.rl.rewards.verifiers import VerifiersJudge
from tests.rl.scripted import Scripted, conversation, says

needs_package = pytest.mark.skipif(
    find_spec("verifiers") is None, reason="the verifiers package is not installed"
)
MODULE = textwrap.dedent(
    '''
    """Doubling, as a package of the Hub would be."""
    import verifiers.v1 as vf


    class Data(vf.TaskData):
        truth: int


    class Config(vf.TasksetConfig):
        size: int = 30


    class Double(vf.Task[Data]):
        @vf.reward(weight=0.75)
        async def right(self, trace: vf.Trace) -> float:
            if trace.last_reply == "boom":
                raise RuntimeError("the scorer fell over")
            return float(trace.last_reply == str(self.data.truth))

        @vf.reward(weight=0.25)
        async def short(self, task: Data, trace: vf.Trace) -> float:
            asked = [message.content for message in trace.messages if message.role != "assistant"]
            assert asked == ["Say a number.", task.prompt]
            return float(len(trace.last_reply) < 4)

        @vf.metric
        async def length(self, trace: vf.Trace) -> float:
            return len(trace.last_reply)


    class Doubles(vf.Taskset[Double, Config]):
        def load(self):
            for n in range(self.config.size):
                data = Data(prompt=f"Twice {n}?", system_prompt="Say a number.", truth=2 * n)
                yield Double(data, self.config.task)


    __all__ = ["Doubles"]
    '''
)
WANTS_RUNTIME = MODULE.replace("length(self, trace: vf.Trace)", "length(self, trace, runtime)")


def module(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def rewarded(task: Task, *turns: list[int]) -> tuple[float, dict[str, float], dict[str, float]]:
    environment = DialogueEnvironment(judge=VerifiersJudge())
    engine = conversation(Scripted(*turns))
    trajectory = asyncio.run(environment.run(task, engine, seed=0))
    return trajectory.reward, trajectory.rewards, trajectory.metrics


@needs_package
def test_an_environment_is_asked_and_scored_as_its_own_loop_would(tmp_path, monkeypatch):
    name = module("doubles_v1", MODULE, tmp_path, monkeypatch)
    task = VerifiersTasks(name=name, config={"size": 40}, seed=0)("train", 3)

    assert [message.role for message in task.prompt] == ["system", "user"]
    right = str(task.answer["data"]["truth"])
    reward, rewards, metrics = rewarded(task, says(right))
    assert (reward, rewards) == (1.0, {"right": 0.75, "short": 0.25})
    assert metrics["length"] == len(right)
    assert rewarded(task, says("a long guess"))[0] == 0.0
    assert rewarded(task, says(right)[:-1])[1] == {"verifiers": 0.0}  # cut: no answer to score


@needs_package
def test_splits_share_no_task_and_every_epoch_holds_all(tmp_path, monkeypatch):
    name = module("doubles_too_v1", MODULE, tmp_path, monkeypatch)
    source = VerifiersTasks(name=name, config={}, seed=0)
    words = {
        split: [source(split, n).prompt[-1].words for n in range(len(source.splits[held]))]
        for split, held in (("train", False), ("held_out", True))
    }
    assert not set(words["train"]) & set(words["held_out"])
    assert len({*words["train"], *words["held_out"]}) == 30
    again = [source("train", n + len(words["train"])) for n in range(len(words["train"]))]
    assert sorted(one.prompt[-1].words for one in again) == sorted(words["train"])
    assert source("train", 2) == VerifiersTasks(name=name, config={}, seed=0)("train", 2)


@needs_package
def test_a_scorer_that_fails_is_no_zero(tmp_path, monkeypatch):
    name = module("doubles_three_v1", MODULE, tmp_path, monkeypatch)
    task = VerifiersTasks(name=name, config={}, seed=0)("train", 0)
    with pytest.raises(VerifierError, match=r"doubles_three_v1: .*the scorer fell over"):
        rewarded(task, says("boom"))


@needs_package
def test_what_a_dialogue_cannot_do_is_refused_by_name(tmp_path, monkeypatch):
    assert WANTS_RUNTIME != MODULE
    name = module("doubles_runtime_v1", WANTS_RUNTIME, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="task 0 of Double wants a runtime for length"):
        VerifiersTasks(name=name, config={}, seed=0)
    few = module("doubles_few_v1", MODULE, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="1 tasks are too few"):
        VerifiersTasks(name=few, config={"size": 1}, seed=0)


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="the verifiers package is there")
def test_a_missing_package_is_named_with_the_way_to_get_it():
    with pytest.raises(ModuleNotFoundError, match="uv pip install verifiers"):
        VerifiersTasks(name="gsm8k-v1", config={}, seed=0)


def test_a_task_of_another_environment_is_refused():
    task = Task(prompt=[], domain="d", environment="ocr", answer="a")
    with pytest.raises(VerifierError, match="environment 'ocr'"):
        asyncio.run(VerifiersJudge().judge(task, None))  # pyright: ignore[reportArgumentType]
