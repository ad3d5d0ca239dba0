"""PARL trains the orchestrator and nobody else, and who serves as sub-agent follows the step."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from micro_run import micro_model, micro_settings
from policy_run import TOKENIZER, build_model, run
from torch import Tensor

from moonlit.agents.context import KeepAll, Sharding
from moonlit.agents.swarm.limits import SwarmLimits
from moonlit.agents.swarm.reward import ParlReward
from moonlit.agents.swarm.schedule import Stage, SubAgentSchedule
from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.agents.swarm.swarm import Swarm
from moonlit.agents.toolbox import Toolboxes
from moonlit.batch import Task, Trajectory
from moonlit.chat.messages import Message
from moonlit.losses.policy_gradient import clipped_ratio_loss
from moonlit.models.kimi import Kimi
from moonlit.optim.baselines import adamw
from moonlit.phases.parl import PARL
from moonlit.phases.policy_phase import PolicyPhase
from moonlit.rl.engines.native import NativeEngine
from moonlit.rl.frozen_policy import FrozenPolicy
from moonlit.rl.length_rules import NoRule
from moonlit.rl.rollout_settings import RolloutSettings
from moonlit.rl.swarm_environment import SwarmEnvironment

NO_TOOLS = Toolboxes(boxes={})


def small_model() -> Kimi:
    """A sub-agent of another width than the orchestrator: no tensor of it can be mistaken."""
    shape = micro_model().decoder_shape
    values = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    values |= {
        "vocab_size": TOKENIZER.vocab_size,
        "media_pad_id": TOKENIZER.special.media_pad_id,
        "max_positions": 256,
        "model_width": 52,
    }
    return Kimi(decoder=type(shape)(**values), vision=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of it, as a phase writes one."""
    model = small_model()
    path = tmp_path_factory.mktemp("frozen") / "small.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    shapes = {"decoder": asdict(model.decoder_shape), "vision": None}
    torch.save({"state_dict": state, "shapes": shapes}, path)
    return path


def frozen(ckpt: Path) -> FrozenPolicy:
    return FrozenPolicy(
        ckpt=str(ckpt), build_engine=NativeEngine.copy_of, tokenizer="embedded", device="cpu",
        max_new_tokens=6, max_turns=2, temperature=1.0, context=KeepAll(),
    )  # fmt: skip


def test_a_frozen_policy_talks_as_it_was_told(small: Path):
    policy = frozen(small)
    talk = policy.load()
    assert (talk.sampling.temperature, talk.max_new_tokens, talk.max_turns) == (1.0, 6, 2)
    assert talk.context is policy.context
    talk.engine.close()


def test_a_frozen_policy_passes_on_all_that_it_is_given(small: Path):
    """Catches: sub-agents whose steps nobody sees, and who go on past the budget."""
    given = {"seed": 3, "tools": object(), "watch": object(), "is_spent": object()}
    policy, asked = frozen(small), {}

    class Talks:
        async def reply(self, messages, **more):
            asked.update(more)

    policy.conversation = Talks()
    asyncio.run(policy.reply([], **given))
    assert asked == given


class Delegates(SwarmEnvironment):
    """A micro policy calls no tool: here two sub-agents work beside every rollout of it."""

    async def run(self, task: Task, policy: Any, *, seed: int) -> Trajectory:
        swarm = Swarm(self.workers_now(), task, limits=self.limits, num_prompt=1, seed=seed)
        for n in range(2):
            await swarm.create({"name": f"w{n}", "system_prompt": "s"})
            await swarm.assign({"agent": f"w{n}", "prompt": f"{n}"})
        trajectory = await super().run(task, policy, seed=seed)
        trajectory.children = swarm.children
        return trajectory


class Length:
    """Pays for even ids, so that rewards differ."""

    async def judge(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        (row,) = trajectory.segments
        ids = [i for i, s in zip(row.input_ids, row.is_sampled, strict=True) if s]
        return {"even": sum(i % 2 == 0 for i in ids) / len(ids)}


def parl(workers: Mapping[str, Any], **rollouts: Any) -> PARL:
    return PARL(
        objective=partial(clipped_ratio_loss, low=0.5, high=5.0, regularisation=0.01),
        environment=Delegates(
            workers=workers, toolbox=NO_TOOLS, judge=Length(),
            reward=ParlReward(parallel_weight=0.1, finish_weight=0.2, annealed_by=0.5, cap=2),
            limits=SwarmLimits(max_retries=0),
        ),
        build_engine=NativeEngine.copy_of,
        rollouts=RolloutSettings(
            group_size=2, groups_per_iteration=2, max_new_tokens=4, row_tokens=128, **rollouts
        ),
        length_rule=NoRule(),
        normalise_advantages=False,
        reset_optimizer=False,
        **micro_settings(
            build_model=build_model,
            build_optimizer=partial(adamw, lr=0.003, weight_decay=0.0),
            schedule=lambda step, total_steps: 1.0,
            trains=["language_model"],
        ),
    )  # fmt: skip


class SaveAtEnd(Callback):
    """Writes the run's state when it is over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def test_sub_agents_do_not_exist_in_training(small: Path, tmp_path: Path):
    """Not among parameters, buffers or gradients, in the optimizer or the checkpoint.

    Nor are their tokens trained: a row holds the orchestrator's alone.
    """
    worker = PolicySubAgent(policy=frozen(small), toolbox=NO_TOOLS)
    phase, seen = parl({"w": worker}), {}
    close = worker.policy.aclose

    async def keep_first() -> None:
        seen["model"] = worker.policy.conversation.engine.model
        await close()

    worker.policy.aclose = keep_first
    rows = []
    pack_rows = phase.rows

    def keep_rows(groups):
        rows.append(pack_rows(groups))
        return rows[-1]

    phase.rows = keep_rows

    path = tmp_path / "last.ckpt"
    run(phase, max_steps=2, callbacks=[SaveAtEnd(path)])

    model = seen["model"]
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    own = [*phase.parameters(), *phase.buffers()]
    assert not theirs & {tensor.data_ptr() for tensor in own}
    assert {name for name, _ in phase.named_parameters()} == {
        f"model.{name}" for name, _ in phase.model.named_parameters()
    }
    assert all(p.grad is None for p in model.parameters())
    frozen_before = torch.load(small, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, frozen_before[f"model.{name}"], rtol=0, atol=0)

    saved = torch.load(path, weights_only=False)
    width = model.decoder_shape.model_width
    assert width != phase.model.decoder_shape.model_width
    shapes = {tuple(tensor.shape) for tensor in tensors(saved)}
    assert shapes
    assert not any(width in shape for shape in shapes)
    assert set(saved["state_dict"]) == set(phase.state_dict())
    (optimizer,) = saved["optimizer_states"]
    assert len(optimizer["state"]) == sum(p.requires_grad for p in phase.parameters())

    rollouts = [one for group in phase.last_groups for one in group.trajectories]
    children = [child for one in rollouts for child in one.children]
    assert len(children) == 2 * len(rollouts)
    assert all(child.num_tokens > 0 for child in children)
    trained = sum(int(row.loss_mask.sum()) for row in rows[-1])
    assert trained == sum(one.num_tokens for one in rollouts)
    inputs = sum(row.num_tokens for row in rows[-1])
    assert inputs == sum(len(s.input_ids) for one in rollouts for s in one.segments)


def schedule(**workers: Any) -> SubAgentSchedule:
    """Who serves from which step, the later first."""
    stages = {name: Stage(from_step=int(name), worker=one) for name, one in workers.items()}
    return SubAgentSchedule(stages=dict(reversed(stages.items())))


class Counts:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.num = 0

    async def work(self, prompt, task, *, seed, swarm):
        self.num += 1
        return Trajectory(
            segments=[], messages=[Message(role="assistant", content="12")], spans=[],
            stop_reason="answer", text="12",
        )  # fmt: skip


def test_larger_sub_agents_take_over_at_their_step_also_after_a_resume(tmp_path: Path):
    """Eight assignments an iteration: the small one serves steps 0 and 1, the large one 2 to 4."""

    def pair() -> tuple[Counts, Counts]:
        return Counts(), Counts()

    def scheduled(small: Counts, large: Counts) -> dict[str, SubAgentSchedule]:
        return {"w": schedule(**{"0": small, "2": large})}

    whole = pair()
    run(parl(scheduled(*whole)), max_steps=5)
    assert [one.num for one in whole] == [2 * 8, 3 * 8]

    first, second = pair(), pair()
    path = tmp_path / "three.ckpt"
    run(parl(scheduled(*first)), max_steps=3, callbacks=[SaveAtEnd(path)])
    run(parl(scheduled(*second)), max_steps=5, ckpt_path=str(path))
    assert [one.num for one in first] == [2 * 8, 1 * 8]
    assert [one.num for one in second] == [0, 2 * 8]


def test_an_evaluation_asks_who_serves_at_its_step(monkeypatch: pytest.MonkeyPatch):
    small, large = Counts(), Counts()
    phase = parl({"w": schedule(**{"0": small, "4": large})})
    monkeypatch.setattr(PARL, "global_step", 4)
    phase.trainer = Trainer(accelerator="cpu", logger=False, max_steps=8)
    phase.manager = object()  # stands for rollouts that have been started
    phase.backbone = object()

    phase.on_validation_start()

    assert phase.environment.workers_now() == {"w": large}
    assert phase.environment.progress == 0.5
    phase.environment.tell(progress=0.4, step=3)
    assert phase.environment.workers_now() == {"w": small}


def test_the_weights_of_both_rewards_are_logged_by_their_names(monkeypatch: pytest.MonkeyPatch):
    """A quarter of the way to nothing."""
    phase, logged = parl({"w": Counts()}), {}
    monkeypatch.setattr(PARL, "global_step", 1)
    monkeypatch.setattr(PolicyPhase, "collect", lambda phase: [])
    phase.trainer = Trainer(accelerator="cpu", logger=False, max_steps=8)
    phase.log_dict = logged.update
    phase.collect()
    wanted = {"swarm/lambda_parallel": 0.75 * 0.1, "swarm/lambda_finish": 0.75 * 0.2}
    assert logged == pytest.approx(wanted)


@pytest.mark.parametrize("steps", [[], [3], [-1, 0], [0, 0]])
def test_a_schedule_without_a_beginning_is_refused(steps: list[int]):
    with pytest.raises(ValueError, match="one of them 0"):
        SubAgentSchedule(
            stages={
                f"{place}": Stage(from_step=step, worker=Counts())
                for place, step in enumerate(steps)
            }
        )


def test_a_checkpoint_that_is_not_there_is_refused_at_once(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="for a sub-agent"):
        frozen(tmp_path / "none.ckpt")


def test_sharding_wants_somebody_to_shard_to():
    parl({"w": Counts()}, context=Sharding())
    with pytest.raises(ValueError, match="wants an environment with sub-agents"):
        parl({}, context=Sharding())


def test_a_frozen_policy_serves_one_event_loop_after_another(small: Path):
    """A validation after training has another loop; two ask before the weights are there."""
    policy = frozen(small)
    prompt = [Message(role="user", content="1")]

    async def asked() -> list[str]:
        replies = await asyncio.gather(*(policy.reply(prompt, seed=n) for n in range(2)))
        await policy.aclose()
        return [reply.stop_reason for reply in replies]

    assert [len(asyncio.run(asked())) for _ in range(2)] == [2, 2]
