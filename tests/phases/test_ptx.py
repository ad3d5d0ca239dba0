"""The PTX loss: what is kept is not forgotten, and its weight is what it says."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from policy_run import TOKENIZER, Numbered, make_phase, run, weights_of
from torch import Tensor

from moonlit.batch import PackedBatch
from moonlit.models.decoder import DecoderOutput
from moonlit.optim.muon_clip import MuonClip
from moonlit.phases.ptx import Scales, scales

ODD = list(range(1, 80, 2))


def kept_row(ids: list[int]) -> PackedBatch:
    """A document of the kept set: all but its first token are trained."""
    return PackedBatch(
        input_ids=torch.tensor(ids[:-1]),
        target_ids=torch.tensor(ids[1:]),
        position_ids=torch.arange(len(ids) - 1),
        cu_seqlens=torch.tensor([0, len(ids) - 1], dtype=torch.int32),
        loss_mask=torch.ones(len(ids) - 1, dtype=torch.bool),
    )


def sampled_row(num_trained: int) -> PackedBatch:
    row = kept_row(ODD)
    row.loss_mask = torch.arange(len(ODD) - 1) < num_trained
    row.behavior_logprobs = row.advantages = torch.zeros(len(ODD) - 1)
    return row


class WithKept(Numbered):
    """The kept set is one document of odd ids: what is not paid for."""

    ptx = "there is one"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def kept_rows(self, step: int) -> list[PackedBatch]:
        self.steps.append(step)
        return [kept_row(ODD)]


def test_the_kept_set_is_learnt_beside_what_is_paid():
    with_ptx, without = make_phase(), make_phase()
    with_ptx.ptx_coef = 1.0
    data = WithKept()
    logged = run(with_ptx, max_steps=8, data=data)
    run(without, max_steps=8)

    nll = [one["rl/ptx_nll_per_token"] for one in logged]
    assert nll[-1] < nll[0] - 0.5
    assert data.steps == list(range(8))
    assert logged[-1]["rl/reward_mean"] > logged[0]["rl/reward_mean"] + 0.1
    assert not torch.equal(weights_of(with_ptx), weights_of(without))


def test_each_kind_is_a_mean_over_its_own_tokens():
    """A row of 5 sampled tokens, 39 kept ones: the step will divide by 44."""

    def same(counts: Tensor) -> Tensor:
        return counts

    found = scales([sampled_row(5), kept_row(ODD)], ptx_coef=0.1, global_sum=same)
    assert found.policy / 44 == pytest.approx(1 / 5)
    assert found.ptx / 44 == pytest.approx(0.1 / 39)

    def two_ranks(counts: Tensor) -> Tensor:
        return 2 * counts

    found = scales([sampled_row(5), kept_row(ODD)], ptx_coef=0.1, global_sum=two_ranks)
    assert found.policy / 88 == pytest.approx(1 / 10)
    assert scales([sampled_row(0)], ptx_coef=0.1, global_sum=same).policy == 0


def test_a_rows_loss_is_scaled_by_its_kind_and_the_routers_part_is_not():
    phase = make_phase()
    phase.scales = Scales(policy=2.0, ptx=0.5)
    phase.policy_loss = phase.ptx_loss = lambda output, batch: torch.tensor(3.0)
    output = Mock(DecoderOutput, load_balance_loss=torch.tensor(0.25))
    assert phase.loss(output, sampled_row(5)).item() == 2 * 3 + 0.25 * 5
    assert phase.loss(output, kept_row(ODD)).item() == 0.5 * 3 + 0.25 * 39


def test_a_weight_without_a_set_is_refused_by_name():
    phase = make_phase()
    phase.ptx_coef = 0.1
    with pytest.raises(ValueError, match=r"phase.ptx_coef=0.1 and data.ptx: want both"):
        run(phase, max_steps=1)
    with pytest.raises(ValueError, match=r"phase.ptx_coef=0.0 and data.ptx: want both"):
        run(make_phase(), max_steps=1, data=WithKept())


# The other options of an iteration


def test_the_optimizer_forgets_after_every_iteration_where_it_is_told_to():
    """Muon's momentum and AdamW's averages both; and the next iteration goes on without them."""
    keeps, forgets = make_phase(), make_phase()
    for phase in (keeps, forgets):
        phase.build_optimizer = partial(
            MuonClip, lr=0.003, weight_decay=0.0, qk_clip_threshold=100.0
        )
    forgets.reset_optimizer = True
    run(keeps, max_steps=3)
    run(forgets, max_steps=3)

    assert any("momentum" in state for state in keeps.optimizers().state.values())
    assert not forgets.optimizers().state
    assert not torch.equal(weights_of(keeps), weights_of(forgets))


def test_temperature_falls_and_sampler_and_trainer_fall_together():
    phase = make_phase(temperature=1.2, final_temperature=0.6)
    seen = []
    collect = phase.collect

    def watched():
        seen.append(phase.temperature)
        groups = collect()
        assert phase.require_manager().policy.temperature == seen[-1]
        return groups

    phase.collect = watched
    logged = run(phase, max_steps=4)

    assert seen == pytest.approx([1.2, 1.05, 0.9, 0.75])
    assert max(one["rl/log_ratio_abs_mean"] for one in logged) < 1e-5


def test_all_steps_of_an_iteration_know_the_temperature_that_it_was_sampled_at():
    """The weights stay, so every step is on policy; catches: a temperature that falls within."""
    phase = make_phase(temperature=1.2, final_temperature=0.6, updates_per_iteration=4)
    phase.schedule, phase.selection_bias_rate = lambda step, total_steps: 0.0, 0.0
    for logged in run(phase, max_steps=8):
        assert logged["rl/log_ratio_abs_mean"] < 1e-5


def test_the_tokenizer_knows_the_ids():
    assert max(ODD) < TOKENIZER.vocab_size
