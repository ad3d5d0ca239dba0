"""What every phase shares: one loss over the microbatches of an optimizer step, and that step.

A phase is its loss, what it trains and (for RL) how it collects; it cannot tell where its vision
encoder runs, how the backbone is split or how many ranks there are.

Axes: T tokens of a microbatch, M modalities, E experts, L MoE layers.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.backbone import Backbone
from moonlit.distributed.encoder_process import InlineEncoder
from moonlit.distributed.gradients import clip_grad_norm_
from moonlit.losses.language_modeling import token_scores
from moonlit.models.accounting import forward_flops_per_token
from moonlit.models.decoder import DecoderOutput
from moonlit.models.kimi import Kimi
from moonlit.models.moe.router import Router
from moonlit.phases.guard import StepGuard
from moonlit.phases.held_out import HeldOut
from moonlit.phases.origin import makers, require_own, shapes_of

PARTS = ("vision_tower", "mm_projector", "language_model")


class PhaseModule(LightningModule):
    """Base of the five phases: the step of one loss over a list of microbatches.

    Args:
        build_model: makes the model; called once, on the device the strategy chose.
        build_optimizer: makes the optimizer from the model.
        schedule: multiplier of the peak learning rate at (step, total_steps=...).
        trains: which of ``vision_tower``, ``mm_projector`` and ``language_model`` learn.
        max_grad_norm: the gradient is scaled down to this norm; ``inf`` never scales.
        selection_bias_rate: step u of the router's selection bias, 0 leaves it as it is
            (1e-3 in Moonlight, arXiv:2502.16982, Sec. 3.3).
        guard: judges every optimizer step.
    """

    samples_from_whole_model = False
    """Whether every rank keeps a copy of the whole model to sample from."""
    loss_name = "train/nll_per_token"
    """What the loss of a step is logged as."""
    nothing_to_learn = False
    """Whether the next optimizer step counts but changes nothing."""
    model: Kimi
    flops_per_token: float
    """Forward and backward of one text token, without the scores of attention [FLOP]."""
    vision: InlineEncoder
    backbone: Backbone

    def __init__(
        self,
        *,
        build_model: Callable[[], Kimi],
        build_optimizer: Callable[[Kimi], Optimizer],
        schedule: Callable[..., float],
        trains: Sequence[str],
        max_grad_norm: float,
        selection_bias_rate: float,
        guard: StepGuard,
    ) -> None:
        super().__init__()
        if unknown := set(trains) - set(PARTS):
            raise ValueError(f"phase.trains holds {sorted(unknown)}; it allows {list(PARTS)}")
        if not trains:
            raise ValueError(f"phase.trains is empty: name at least one of {list(PARTS)}")
        self.automatic_optimization = False  # one step spans several backward passes
        self.build_model = build_model
        self.build_optimizer = build_optimizer
        self.schedule = schedule
        self.trains = tuple(trains)
        self.max_grad_norm = max_grad_norm
        self.selection_bias_rate = selection_bias_rate
        self.guard = guard
        self.held_out = HeldOut()
        self.held_out_step: int | None = None

    @abstractmethod
    def loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the loss of one microbatch, summed over its trained tokens [nats].

        Under a pipeline only the last stage calls it; of the model it may use the head.
        """

    def configure_model(self) -> None:
        """Build the model once and freeze the parts that this phase does not train."""
        if "model" in self._modules:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        build = getattr(strategy, "build", None)
        self.model = self.build_model() if build is None else build(self.build_model)
        self.flops_per_token = 3 * forward_flops_per_token(self.model, num_positions=0)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.split(".", 1)[0] in self.trains)

    def configure_optimizers(self) -> Optimizer:
        """One optimizer, so that the trainer's step count is the number of optimizer steps."""
        return self.build_optimizer(self.model)

    def on_fit_start(self) -> None:
        """Ask the strategy how encoder and backbone run; by default here, one after the other."""
        self.find_processes()

    def on_validation_start(self) -> None:
        """Ask it too where nothing is trained."""
        if not hasattr(self, "backbone"):
            self.find_processes()

    def find_processes(self) -> None:
        """Take encoder and backbone from the strategy."""
        strategy = self.trainer.strategy
        encoder_process = getattr(strategy, "encoder_process", InlineEncoder)
        backbone_process = getattr(strategy, "backbone_process", Backbone)
        self.vision = encoder_process(self.model)
        self.backbone = backbone_process(self.model, loss=self.loss, backward=self.manual_backward)

    def training_step(self, microbatches: list[PackedBatch], batch_idx: int) -> None:
        """Accumulate the gradient of the global per-token mean, then take the step."""
        num_tokens = self.global_sum(torch.stack([b.loss_mask.sum() for b in microbatches]).sum())
        with self.vision.around(microbatches) as features:
            loss_sum = self.backbone.run(
                microbatches, features, normalise=partial(self.per_token, num_tokens=num_tokens)
            )
        self.optimizer_step_from(self.global_sum(loss_sum) / num_tokens.clamp(min=1))

    def on_validation_epoch_start(self) -> None:
        """Begin a fresh count of the held-out sets."""
        self.held_out.clear()

    @torch.no_grad()
    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one packed row of the held-out set that the data module names."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        name = data.held_out_names[dataloader_idx]
        output = self.backbone.evaluate(batch)
        if output is None:
            self.held_out.expect(name)
            return
        logprobs, is_top1 = token_scores(
            output.hidden_TD,
            self.model.language_model.lm_head.weight,
            batch.target_ids,
            batch.loss_mask,
        )
        self.held_out.add(name, logprobs, is_top1, batch.loss_mask, batch.cu_seqlens)

    def on_validation_epoch_end(self) -> None:
        """Log ``held_out/NAME/{nll_per_token,accuracy}`` over the rows of all ranks."""
        self.held_out_step = self.global_step
        self.held_out.sum_over_ranks(
            lambda sums: self.backbone.from_last_stage(self.global_sum(sums.to(self.device)))
        )
        self.log_dict(self.held_out.metrics())

    def per_token(self, loss_sum: Tensor, num_tokens: Tensor) -> Tensor:
        """Divide by the trained tokens of the whole optimizer step, over all ranks.

        Where a strategy averages gradients over ranks, the result is scaled by their number: the
        gradient is that of one large batch, however unevenly the ranks are filled.
        """
        strategy = self.trainer.strategy
        averaged = 1 if getattr(strategy, "sums_gradients", False) else self.trainer.world_size
        return loss_sum / num_tokens.clamp(min=1) * averaged

    def optimizer_step_from(self, loss_per_token: Tensor) -> None:
        """Clip, judge and take one optimizer step; a refused one leaves the weights untouched."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        self.sum_router_loads()
        multiplier = self.schedule(self.global_step, total_steps=self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        trained = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = clip_grad_norm_(trained, self.max_grad_norm)
        reason = self.guard.reason_to_skip(loss_per_token.item(), grad_norm.item())
        if reason is not None:
            rank_zero_warn(f"step {self.global_step} is skipped for {reason}")
        taken = reason is None and not self.nothing_to_learn
        if not taken:
            optimizer.zero_grad(set_to_none=True)  # no gradient: the step below changes nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.finish_routers(taken=taken)
        self.log(self.loss_name, loss_per_token, prog_bar=True)
        self.log_dict(
            {
                "train/grad_norm": grad_norm,
                "train/learning_rate": optimizer.param_groups[-1]["lr"],
                "train/skipped_steps": float(self.guard.skipped),
            }
        )

    @property
    def routers(self) -> list[Router]:
        """The routers of all MoE layers, bottom up."""
        return [module for module in self.model.modules() if isinstance(module, Router)]

    def sum_router_loads(self) -> None:
        """Add every router's load of this step over all ranks."""
        if not self.routers:
            return
        load_LME = torch.stack([router.tokens_per_expert_ME for router in self.routers])
        load_LME = self.trainer.strategy.reduce(load_LME, reduce_op="sum")
        for router, load_ME in zip(self.routers, load_LME, strict=True):
            router.tokens_per_expert_ME.copy_(load_ME)

    def finish_routers(self, *, taken: bool) -> None:
        """Move every router's selection bias against the step's load, then forget the load.

        The bias learns without a gradient: where the language model is frozen, it is frozen too.
        """
        for router in self.routers:
            if taken and self.selection_bias_rate and "language_model" in self.trains:
                router.update_selection_bias(self.selection_bias_rate)
            router.reset_load()

    @torch.no_grad()
    def greedy_answer(
        self,
        input_ids: Int[Tensor, " T"],
        media: PackedMedia | None,
        *,
        max_new_tokens: int,
        stop_ids: set[int],
    ) -> list[int]:
        """Return the model's most likely continuation; every rank has to ask for it.

        The placeholder of vision tokens is banned: the model cannot invent a picture.
        """
        return self.backbone.greedy(
            input_ids.to(self.device),
            move_data_to_device(media, self.device),
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            banned_ids={self.model.decoder_shape.media_pad_id},
        )

    def global_sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks that read different rows, in float32 (float64 where given)."""
        value = value if value.is_floating_point() else value.float()
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the guard, and the model's shape so that the file can be read on its own."""
        checkpoint["guard"] = self.guard.state_dict()
        checkpoint["max_steps"] = self.trainer.max_steps
        checkpoint["made_by"] = makers(self)
        checkpoint["shapes"] = shapes_of(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the guard's memory; say where the run gets another length.

        Raises:
            ValueError: if another phase, optimizer or model wrote it, or it has gone too far.
        """
        require_own(checkpoint, self)
        self.guard.load_state_dict(checkpoint["guard"])
        planned = checkpoint.get("max_steps", self.trainer.max_steps)
        if planned != self.trainer.max_steps:
            rank_zero_warn(
                f"trainer.max_steps={self.trainer.max_steps}, but the checkpoint's run was to take "
                f"{planned}: schedules that depend on the length go on as if it always was the new"
            )
