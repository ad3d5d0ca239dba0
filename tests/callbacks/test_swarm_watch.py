"""The swarm's measures: means over an iteration's rollouts, those lost to faults left out."""

import asyncio

import pytest
from lightning import Callback
from micro_run import fit

from callbacks.swarm import WATCHED, SwarmWatch
from data_modules.tasks.fact_search import FactJudge, FactSearch
from data_modules.tasks.source import TRAIN
from moonlit.batch import Group, Task, Trajectory
from tests.rl.scripted import says
from tests.swarm.orchestrating import PARALLEL, run


def rollout(error: str | None = None, **metrics: float) -> Trajectory:
    return Trajectory(
        segments=[], messages=[], spans=[], stop_reason="answer", error=error,
        metrics=metrics, rewards={"parallel": metrics["critical_steps"] / 10},
    )  # fmt: skip


class Give(Callback):
    """The phase has collected these groups."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.last_groups = self.groups


def logged(*groups: Group) -> dict[str, float]:
    phase = fit(max_steps=1, callbacks=[Give(list(groups)), SwarmWatch()])
    told = phase.trainer.callback_metrics.items()
    return {name: value.item() for name, value in told if name.startswith("swarm/")}


def test_means_are_of_all_rollouts_that_were_not_lost():
    task = Task(prompt=[], domain="agentic", environment="swarm", answer=None)
    first = Group(
        task=task,
        trajectories=[rollout(critical_steps=4.0, failed_timeout=0.5), rollout(critical_steps=2.0)],
    )
    lost = rollout("a fault", critical_steps=100.0)
    second = Group(task=task, trajectories=[rollout(critical_steps=6.0, parallelism=3.0), lost])

    told = logged(first, second)
    assert told["swarm/critical_steps"] == 4
    assert told["swarm/reward_parallel"] == pytest.approx(0.4)
    assert told["swarm/parallelism"] == 3  # of those that measured it
    assert told["swarm/failed_timeout"] == 0.5
    assert "swarm/retries" not in told


def test_all_that_a_rollout_of_a_swarm_measures_is_logged():
    """By the environment, and by the judge of pages that disagree."""
    source = FactSearch(seed=3, weights={"disputed": 1.0}, num_worlds=4, num_countries=5)
    judged: dict[str, float] = {}
    for number in range(8):
        one = Trajectory(segments=[], messages=[], spans=[], stop_reason="answer")
        asyncio.run(FactJudge().judge(source(TRAIN, number), one))
        judged |= one.metrics
    of_any_dialogue = {"num_turns", "num_calls", "num_malformed", "well_formed"}
    measured = run(PARALLEL, says("x")).metrics.keys() - of_any_dialogue
    assert measured | judged.keys() == set(WATCHED)


def test_a_phase_without_a_swarm_is_left_alone():
    assert logged() == {}
