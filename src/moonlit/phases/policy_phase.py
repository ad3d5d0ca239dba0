"""What the RL phases share: an iteration rolls out, scores, trains and syncs the engine.

Axes: T tokens of a packed row, K rollouts of a task.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from moonlit.agents.environment import Environment, GroupJudge
from moonlit.batch import Group, PackedBatch, Task
from moonlit.losses.language_modeling import next_token_loss
from moonlit.losses.policy_gradient import PolicyObjective
from moonlit.losses.token_logprobs import token_logprobs
from moonlit.models.decoder import DecoderOutput
from moonlit.phases.base import PhaseModule
from moonlit.phases.held_out_rewards import HeldOutAnswer, HeldOutRewards
from moonlit.phases.ptx import Scales, is_kept, scales
from moonlit.phases.rollout_metrics import group_metrics, notes_of, token_metrics
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.base import Engine
from moonlit.rl.engines.native import media_ids
from moonlit.rl.length_rules import LengthRule
from moonlit.rl.packing import pack
from moonlit.rl.rollout_manager import RolloutManager
from moonlit.rl.rollout_settings import RolloutSettings
from moonlit.rl.task_order import InOrder, TaskOrder
from moonlit.rl.trained_segments import trained_segments


class PolicyPhase(PhaseModule):
    """Base of the RL phases.

    An optimizer step none of whose groups teaches changes nothing (ours): MuonClip's steps are as
    long however small the gradient is, and would go on along what the momentum remembers.

    The data module gives ``task(number)``, ``tokenizer`` and, as validation batches, lists of held-
    out tasks. A training batch is an iteration's number; all else is collected here.

    Args:
        objective: summed loss of sampled tokens.
        environment: what a rollout runs in.
        build_engine: makes the engine from the model and ``version=``.
        rollouts: how many answers, and how.
        length_rule: what length does to rewards.
        task_order: which task comes next; None: one after another.
        normalise_advantages: divide by the group's deviation, as GRPO does and K2.5 does not.
        group_judge: compares the answers of a group, on top of the environment's rewards.
        reset_optimizer: forget the optimizer's state after each iteration, as k1.5 does.
        ptx_coef: weight of the next-token loss on the kept set that the data module brings.
        step: as ``PhaseModule`` says.
    """

    samples_from_whole_model = True
    loss_name = "rl/loss_per_token"
    watched: tuple[str, ...] = ()
    """Metrics of answers that are told of the held-out sets, beside rewards."""
    held_out: HeldOutRewards  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        *,
        objective: PolicyObjective,
        environment: Environment,
        build_engine: Callable[..., Engine],
        rollouts: RolloutSettings,
        length_rule: LengthRule,
        normalise_advantages: bool,
        reset_optimizer: bool,
        group_judge: GroupJudge | None = None,
        task_order: TaskOrder | None = None,
        ptx_coef: float = 0.0,
        **step: Any,
    ) -> None:
        super().__init__(**step)
        self.objective, self.environment, self.group_judge = objective, environment, group_judge
        self.build_engine, self.rollouts, self.length_rule = build_engine, rollouts, length_rule
        self.task_order = task_order or InOrder()
        self.normalise_advantages, self.reset_optimizer = normalise_advantages, reset_optimizer
        if not 0 <= ptx_coef < float("inf"):
            raise ValueError(f"phase.ptx_coef={ptx_coef}: want at least 0, and finite")
        if rollouts.context.needs_swarm and not getattr(environment, "workers", None):
            raise ValueError("context=sharding wants an environment with sub-agents (workers)")
        self.ptx_coef, self.scales = ptx_coef, Scales()
        self.held_out = HeldOutRewards(self.watched)
        self.last_groups: list[Group] = []
        self.last_answers: list[HeldOutAnswer] = []
        self.manager: RolloutManager | None = None
        self.restored: list[Mapping[str, Any]] = []
        self.sampled: dict[str, list[Tensor]] = defaultdict(list)

    # An iteration

    def training_step(self, microbatches: Any, batch_idx: int) -> None:
        """Roll out, score, take the optimizer steps, and give the engine the new weights."""
        seconds: dict[str, float] = {}
        with timed(seconds, "rollout"):
            self.last_groups = self.collect()
        earned = self.mean_earned()  # before a length rule changes it
        told = self.length_rule.apply(self.last_groups, gathered) | {"rl/earned_mean": earned}
        with timed(seconds, "train"):
            num_updates = self.rollouts.updates_per_iteration
            for groups in (self.last_groups[n::num_updates] for n in range(num_updates)):
                self.nothing_to_learn = not (self.ptx_coef or self.any_teaches(groups))
                rows = self.rows(groups)
                rows += self.kept_rows(rows)
                super().training_step(move_data_to_device(rows, self.device), batch_idx)
        if self.reset_optimizer:
            self.optimizers().state.clear()  # pyright: ignore[reportAttributeAccessIssue]
        with timed(seconds, "sync"):
            self.sync()
        self.log_dict({f"perf/{name}_s": value for name, value in seconds.items()} | told)
        self.log_iteration()

    def mean_earned(self) -> float:
        """Return the mean reward of the iteration's answers, over all ranks."""
        judged = [one for group in self.last_groups for one in group.trajectories]
        rewards = [one.reward for one in judged if one.error is None]
        together = [reward for rank in gathered(rewards) for reward in rank]
        return sum(together) / max(1, len(together))

    def collect(self) -> list[Group]:
        """Return this rank's groups of the iteration."""
        manager = self.require_manager()
        manager.policy = replace(manager.policy, temperature=self.temperature)
        groups = manager.collect(self.share(self.rollouts.groups_per_iteration))
        outcomes = gathered(manager.take_outcomes())
        self.task_order.learn(sorted(outcome for rank in outcomes for outcome in rank))
        return groups

    def any_teaches(self, groups: Sequence[Group]) -> bool:
        """Whether the rewards of any of these groups differ, on any rank."""
        return bool(self.over_ranks(any(group.teaches for group in groups), "max"))

    def rows(self, groups: Sequence[Group]) -> list[PackedBatch]:
        """Pack the groups of an optimizer step, in as many rows on every rank."""
        segments = trained_segments(
            groups,
            version=self.require_manager().version,
            max_token_staleness=self.rollouts.max_token_staleness,
            normalise=self.normalise_advantages,
        )
        pad_id = self.model.decoder_shape.media_pad_id
        settings: Any = {
            "row_tokens": self.rollouts.row_tokens,
            "filler_id": self.filler_id,
            "media_pad_id": pad_id if self.rollouts.share_prompts else None,
        }
        rows = pack(segments, num_rows=None, **settings)
        num_rows = int(self.over_ranks(len(rows), "max"))
        return rows if num_rows == len(rows) else pack(segments, num_rows=num_rows, **settings)

    def kept_rows(self, rows: list[PackedBatch]) -> list[PackedBatch]:
        """Return the kept set's rows of the next optimizer step, and weigh both kinds."""
        if not self.ptx_coef:
            return []
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        kept = data.kept_rows(self.global_step)
        self.scales = scales(
            [*rows, *kept],
            ptx_coef=self.ptx_coef,
            global_sum=lambda counts: self.global_sum(counts.to(self.device)),
        )
        return kept

    def loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the objective of the tokens that the policy sampled, or a kept row's, summed."""
        balance = output.load_balance_loss * batch.loss_mask.sum()
        if is_kept(batch):
            return self.scales.ptx * self.ptx_loss(output, batch) + balance
        return self.scales.policy * self.policy_loss(output, batch) + balance

    def ptx_loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the cross-entropy of a kept row [nats]."""
        loss_sum = next_token_loss(
            output.hidden_TD,
            self.model.language_model.lm_head.weight,
            batch.target_ids,
            batch.loss_mask,
        )
        num_tokens = batch.loss_mask.sum()
        self.sampled["ptx"].append(torch.stack([loss_sum.detach(), num_tokens]).float())
        return loss_sum

    def policy_loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the objective of the tokens that the policy sampled."""
        assert batch.behavior_logprobs is not None
        assert batch.advantages is not None
        policy_logprobs, entropy = token_logprobs(
            output.hidden_TD,
            self.model.language_model.lm_head.weight,
            batch.target_ids,
            batch.loss_mask,
            temperature=self.require_manager().policy.sampling.temperature,
            banned_ids=sorted(media_ids(self.model.decoder_shape.media_pad_id)),
        )
        mask = batch.loss_mask
        self.sampled["log_ratio"].append(
            (policy_logprobs.detach() - batch.behavior_logprobs)[mask].float()
        )
        self.sampled["entropy"].append(entropy[mask].float())
        return self.objective(
            policy_logprobs, batch.behavior_logprobs, batch.advantages, mask, batch.cu_seqlens
        )

    def sync(self) -> None:
        """Give the engine the trained weights; its probe must agree."""
        self.require_manager().update_weights(self.model)

    # Held-out tasks

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer some tasks of the held-out set that the data module names, greedily."""
        tasks: list[Task] = batch
        manager = self.require_manager()
        greedy = replace(manager.policy, temperature=0.0, top_p=1.0)
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        name, answers = data.held_out_names[dataloader_idx], manager.evaluate(tasks, greedy)
        self.held_out.add(name, answers)
        rank, num_ranks = self.data_parallel_place()
        num_before = sum(one.name == name for one in self.last_answers)
        numbers = count(num_before * num_ranks + rank, num_ranks)
        self.last_answers += map(HeldOutAnswer, repeat(name), numbers, tasks, answers)

    # Begin and end

    def on_train_start(self) -> None:
        """Make the engine and the rollout manager, once all weights are in place."""
        if self.manager is None:
            self.start_rollouts()

    def on_validation_start(self) -> None:
        """Make them where nothing has been trained yet."""
        super().on_validation_start()
        self.last_answers = []
        if self.manager is None:
            self.start_rollouts()

    def start_rollouts(self) -> None:
        """Copy the weights into an engine, and go on with the tasks that a checkpoint left."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if (self.ptx_coef > 0) != (getattr(data, "ptx", None) is not None):
            raise ValueError(
                f"phase.ptx_coef={self.ptx_coef} and data.ptx: want both or neither, such as "
                "ptx@data.ptx=dialogues phase.ptx_coef=0.1"
            )
        settings, shape = self.rollouts, self.model.decoder_shape
        self.filler_id = data.tokenizer.special.eos_id
        version = max((state["version"] for state in self.restored), default=0)
        policy = Conversation(
            engine=self.build_engine(self.model, version=version),
            tokenizer=data.tokenizer,
            max_positions=shape.max_positions,
            max_new_tokens=settings.max_new_tokens,
            thinking=settings.thinking,
            temperature=settings.temperature,
            top_p=1.0,  # the trained log-probs know temperature, not nuclei
            max_turns=settings.max_turns,
            context=settings.context,
        )
        rank, num_ranks = self.data_parallel_place()
        self.manager = RolloutManager(
            task_of=data.task,
            task_order=self.task_order,
            environment=self.environment,
            group_judge=self.group_judge,
            policy=policy,
            group_size=settings.group_size,
            num_ahead=self.share(settings.groups_ahead),
            max_staleness=settings.max_staleness,
            drop_equal_rewards=settings.drop_equal_rewards,
            max_error_fraction=settings.max_error_fraction,
            timeout_s=settings.timeout_s,
            seed=data.seed,
            rank=rank,
            num_ranks=num_ranks,
        )
        if self.restored:
            self.manager.load_state_dicts(self.restored)

    def teardown(self, stage: str) -> None:
        """End rollouts, environment and engine."""
        if self.manager is not None:
            self.manager.close()
            self.manager.policy.engine.close()
            self.manager = None

    def require_manager(self) -> RolloutManager:
        """Return the manager."""
        if self.manager is None:
            raise RuntimeError("rollouts have not been started")
        return self.manager

    # Ranks

    def data_parallel_place(self) -> tuple[int, int]:
        """Return this rank's place among those that roll out, and their number."""
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "data_parallel_rank"):
            return strategy.data_parallel_rank, strategy.data_parallel_size
        return self.trainer.global_rank, self.trainer.world_size

    def share(self, total: int) -> int:
        """Return this rank's part of a number of groups.

        Raises:
            ValueError: if the ranks cannot have equal parts.
        """
        _, num_ranks = self.data_parallel_place()
        if total % num_ranks:
            raise ValueError(
                f"phase.rollouts: {total} groups over {num_ranks} ranks: use a multiple of them"
            )
        return total // num_ranks

    def over_ranks(self, value: int | float, operation: str) -> float:
        """Reduce a number over the ranks."""
        tensor = torch.tensor(float(value), device=self.device)
        return float(self.trainer.strategy.reduce(tensor, reduce_op=operation))

    # What is logged

    @property
    def temperature(self) -> float:
        """Of sampling in this iteration: linear from the first to the final one."""
        first, final = self.rollouts.temperature, self.rollouts.final_temperature
        if final is None:
            return first
        done = min(1.0, self.global_step / max(1, self.trainer.max_steps))
        return first + (final - first) * done

    def log_iteration(self) -> None:
        """Log what the iteration's groups got, and how far policy and sampler are apart."""
        manager = self.require_manager()
        notes = gathered(notes_of(self.last_groups, version=manager.version - 1))  # the trained one
        self.log_dict(group_metrics(notes))
        self.log("rl/dropped_groups", float(manager.counts.dropped_groups))
        self.log_dict(token_metrics(self.sampled, self.objective))
        self.sampled.clear()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which tasks are done on every rank, and what the length rule remembers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts"] = gathered(self.require_manager().state_dict())
        checkpoint["length_rule"] = self.length_rule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the tasks that were not done."""
        super().on_load_checkpoint(checkpoint)
        self.restored = checkpoint["rollouts"]
        self.length_rule.load_state_dict(checkpoint["length_rule"])


def gathered(value: Any) -> list[Any]:
    """Return the value of every rank, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write down how long a part took [s]."""
    began_s = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began_s
