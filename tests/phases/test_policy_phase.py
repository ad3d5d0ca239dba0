"""An RL phase from tasks to weights: it learns what is paid, and goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from policy_run import Numbered, make_phase, run, weights_of

from moonlit.agents.context import HideToolResult
from moonlit.batch import Group, Task, Trajectory
from moonlit.phases import policy_phase
from moonlit.rl.length_rules import NoRule, alone
from moonlit.rl.rollout_settings import RolloutSettings
from moonlit.rl.task_order import InOrder
from moonlit.rl.trained_segments import trained_segments


class Opposite(NoRule):
    """Pays for what was not to be paid."""

    def apply(self, groups, over_ranks=alone):
        for one in (one for group in groups for one in group.trajectories):
            one.reward = 1 - one.rewards["even"]
        return {}


def even_share(phase) -> float:
    """What the last answers earned by the judge, whatever they were paid."""
    some = [one.rewards["even"] for group in phase.last_groups for one in group.trajectories]
    return sum(some) / len(some)


def test_what_is_paid_is_learnt_and_its_opposite_too():
    """Catches: a sign, advantages at the wrong tokens, a baseline over all groups."""
    paid, opposite = make_phase(), make_phase(Opposite())
    first = run(paid, max_steps=8)[0]["rl/reward_mean"]
    run(opposite, max_steps=8)

    assert 0.2 < first < 0.8
    assert even_share(paid) > 0.9
    assert even_share(opposite) < 0.1


def test_what_was_earned_is_logged_beside_what_is_paid():
    (logged,) = run(make_phase(Opposite()), max_steps=1)
    assert logged["rl/earned_mean"] + logged["rl/reward_mean"] == pytest.approx(1)
    assert logged["rl/earned_mean"] != pytest.approx(0.5)


def test_what_was_lost_earned_neither_something_nor_nothing():
    judged, lost = (
        Trajectory(segments=[], messages=[], spans=[], stop_reason="answer", reward=r, error=e)
        for r, e in ((0.5, None), (0.0, "lost"))
    )
    phase = make_phase()
    task = Task(prompt=[], domain="reasoning", environment="even", answer=0)
    phase.last_groups = [Group(task=task, trajectories=[judged, lost])]
    assert phase.mean_earned() == 0.5


def test_on_policy_the_sampler_and_the_trainer_agree():
    """Catches: behavior log-probs at the wrong token, and an engine with old weights."""
    for logged in run(make_phase(), max_steps=3):
        assert logged["rl/log_ratio_abs_mean"] < 1e-5
        assert logged["rl/masked_fraction"] == 0
        assert logged["rl/staleness"] == 0
        assert logged["rl/share_reasoning"] == logged["rl/share_text"] == 1


def test_the_loss_counts_sampled_tokens_only():
    """32 answers of 4 tokens, or fewer where one ends early."""
    phase = make_phase()
    run(phase, max_steps=1)

    rollouts = [one for group in phase.last_groups for one in group.trajectories]
    assert len(rollouts) == 32
    assert all(1 <= one.num_tokens <= 4 for one in rollouts)
    assert {len(one.segments) for one in rollouts} == {1}


def test_partial_rollouts_are_stale_by_what_is_allowed_and_still_learn():
    logged = run(make_phase(groups_ahead=4, max_staleness=2), max_steps=10)
    assert max(one["rl/staleness"] for one in logged) <= 2
    assert logged[-1]["rl/reward_mean"] > logged[0]["rl/reward_mean"] + 0.3


def test_an_iteration_can_be_several_optimizer_steps():
    phase = make_phase(updates_per_iteration=4)
    logged = run(phase, max_steps=8)
    assert len(logged) == 2
    assert phase.global_step == 8


class NowAndThen(NoRule):
    """Rewards are as they were in the first iteration, and all the same in those after it."""

    def __init__(self) -> None:
        self.iteration = 0

    def apply(self, groups, over_ranks=alone):
        self.iteration += 1
        if self.iteration > 1:
            for one in (one for group in groups for one in group.trajectories):
                one.reward = 0.1
        return {}


def test_where_no_group_teaches_the_weights_stay():
    """Catches: steps along the optimizer's momentum, which are as long without a reason."""
    one, three = make_phase(NowAndThen()), make_phase(NowAndThen())
    run(one, max_steps=1)
    logged = run(three, max_steps=3)

    assert [step["rl/teaching_groups"] for step in logged[1:]] == [0, 0]
    assert logged[0]["rl/teaching_groups"] > 0.5
    assert three.global_step == 3
    assert torch.equal(weights_of(one), weights_of(three))


class Steps(Callback):
    """Counts the trained tokens of every optimizer step; keeps the manager as it was made."""

    def __init__(self) -> None:
        self.num_trained: list[int] = []

    def on_train_start(self, trainer, pl_module):
        run_rows = pl_module.backbone.run

        def run_and_count(rows, *args, **settings):
            self.num_trained.append(sum(int(row.loss_mask.sum()) for row in rows))
            return run_rows(rows, *args, **settings)

        pl_module.backbone.run = run_and_count

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.manager = pl_module.require_manager()


class Noted(InOrder):
    """Keeps which groups' outcomes it was told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []

    def learn(self, outcomes):
        self.told.append([number for number, _, _ in outcomes])


def test_every_answer_is_trained_in_one_step_of_its_iteration():
    phase, steps = make_phase(updates_per_iteration=4), Steps()
    phase.task_order = Noted()
    run(phase, max_steps=4, callbacks=[steps])

    answers = [one for group in phase.last_groups for one in group.trajectories]
    assert len(steps.num_trained) == 4
    assert min(steps.num_trained) > 0
    assert sum(steps.num_trained) == sum(one.num_tokens for one in answers)
    assert phase.task_order.told == [list(range(8))]


class Silent:
    """A group judge that adds nothing."""

    async def judge_group(self, task, trajectories, *, step, seed):
        pass

    async def aclose(self):
        pass


def test_rollouts_are_made_and_weighed_as_the_settings_say(monkeypatch: pytest.MonkeyPatch):
    """Catches: a setting that nothing reads."""
    asked = []

    def watched(groups, **settings):
        asked.append(settings)
        return trained_segments(groups, **settings)

    monkeypatch.setattr(policy_phase, "trained_segments", watched)
    settings = {"max_staleness": 3, "drop_equal_rewards": True, "max_error_fraction": 0.3}
    talk = {"max_turns": 2, "context": HideToolResult(threshold=99)}
    phase = make_phase(**settings, **talk, max_token_staleness=2, timeout_s=50.0)
    phase.normalise_advantages, phase.group_judge = True, Silent()
    data, steps = Numbered(), Steps()
    data.seed = 5
    run(phase, max_steps=2, callbacks=[steps], data=data)

    assert {name: getattr(steps.manager, name) for name in settings} == settings
    assert {name: getattr(steps.manager.policy, name) for name in talk} == talk
    assert (steps.manager.limits.timeout_s, steps.manager.seed) == (50, 5)
    assert steps.manager.group_judge is phase.group_judge
    assert asked == [
        {"version": version, "max_token_staleness": 2, "normalise": True} for version in (0, 1)
    ]


class Iterations(NoRule):
    """Counts them."""

    def __init__(self) -> None:
        self.num = 0

    def apply(self, groups, over_ranks=alone):
        self.num += 1
        return {}

    def state_dict(self):
        return {"num": self.num}

    def load_state_dict(self, state):
        self.num = state["num"]


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    """Same tasks, same answers, same weights: nothing is skipped, repeated or sampled anew."""
    path = tmp_path / "two.ckpt"
    whole = make_phase(Iterations())
    run(whole, max_steps=4, callbacks=[SaveAt(2, path)])

    resumed = make_phase(Iterations())
    run(resumed, max_steps=4, ckpt_path=path)

    first, second = whole.environment.judge.seen, resumed.environment.judge.seen
    assert sorted(first) == list(range(32))
    assert sorted(second) == list(range(16, 32))
    assert set(second.values()) == {4}
    assert resumed.length_rule.num == 4
    # The sampler's batches differ in size, and with them its log-probs in the last bit.
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"updates_per_iteration": 9}, "updates_per_iteration=9, groups_per_iteration=8"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"group_size": 1}, "phase.rollouts.group_size=1: want a whole number of at least 2"),
        ({"max_new_tokens": 0}, "phase.rollouts.max_new_tokens=0"),
        ({"max_token_staleness": -1}, "phase.rollouts.max_token_staleness=-1"),
        ({"max_turns": 0}, "phase.rollouts.max_turns=0: want a whole number of at least 1"),
        ({"final_temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, told: str):
    settings = {"group_size": 4, "groups_per_iteration": 8, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=told):
        RolloutSettings(**settings | change)


class FirstStep(Callback):
    """Keeps the gradient of the first optimizer step, and how many tokens it took."""

    def on_train_start(self, trainer, pl_module):
        run_rows = pl_module.backbone.run

        def run_and_count(rows, *args, **settings):
            self.num_tokens = sum(row.num_tokens for row in rows)
            return run_rows(rows, *args, **settings)

        pl_module.backbone.run = run_and_count

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient = torch.cat([gradient.flatten() for gradient in gradients])


def test_shared_prompts_change_no_gradient():
    """Catches: a branch's positions, its first token, a prompt that counts more than once."""
    shared, copied = FirstStep(), FirstStep()
    run(make_phase(), max_steps=1, callbacks=[shared])
    run(make_phase(share_prompts=False), max_steps=1, callbacks=[copied])

    atol = 1e-5 * float(copied.gradient.abs().max())  # float32
    torch.testing.assert_close(shared.gradient, copied.gradient, rtol=1e-3, atol=atol)
    assert shared.num_tokens < 0.8 * copied.num_tokens
