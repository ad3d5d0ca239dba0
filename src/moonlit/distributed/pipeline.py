"""The backbone as a pipeline: stages on the ranks of ``pp``, microbatches on their way.

Every rank of ``pp`` reads the same rows, so only the residual stream, the balance loss so far and
the gradients of both travel. ``torch.distributed.pipelining`` decides who computes what when (1F1B,
interleaved where a rank has several stages) and moves tensors of one size: rows are padded on the
wire, and only there, to the longest row yet.

Source: Kimi K2, arXiv:2507.20534, Sec. 2.4.2 (interleaved 1F1B, no tensor parallelism).

Axes: T tokens of a microbatch, C tokens on the wire, M merged vision tokens, D model width.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.backbone import Backbone, LossSum, prepare_backward
from moonlit.distributed.whereabouts import WHEREABOUTS, at
from moonlit.models.decoder import DecoderOutput
from moonlit.models.decoding import evaluation_mode
from moonlit.models.kimi import Kimi
from moonlit.models.stages import DecoderStage

Schedule = Schedule1F1B | ScheduleInterleaved1F1B


class PipelineBackbone(Backbone):
    """Runs the microbatches of a step through all stages; gradients add up on the stages' ranks.

    Args:
        model: with this rank's layers alone; sharded.
        stages: of this rank, which share its modules.
        group: the ranks that hold the other stages, and read the same rows.
        loss: of the phase; called on the last stage's rank.
        zero_stage: as for ``ShardedBackbone``.
    """

    def __init__(
        self,
        model: Kimi,
        stages: Sequence[DecoderStage],
        group: dist.ProcessGroup,
        *,
        loss: LossSum,
        zero_stage: int,
    ) -> None:
        super().__init__(model, loss=loss, backward=backward_is_the_schedules)
        self.stages, self.group, self.zero_stage = stages, group, zero_stage
        self.schedules: dict[int, Schedule] = {}
        self.capacity = 0
        parameter = next(model.language_model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        # Of the pass that is under way:
        self.microbatches: Sequence[PackedBatch] = ()
        self.features: Iterator[Tensor | None] = iter(())
        self.first_number = 0
        self.at_the_end: Callable[[DecoderOutput, PackedBatch], Tensor]

    def run(
        self,
        microbatches: Sequence[PackedBatch],
        features: Iterable[Tensor | None],
        *,
        normalise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Accumulate every microbatch's gradient; return the sum of their losses on all stages."""
        losses = [torch.zeros((), device=self.device)]

        def loss_of(output: DecoderOutput, batch: PackedBatch) -> Tensor:
            loss = self.loss(output, batch)
            losses.append(loss.detach())
            return normalise(loss)

        self.microbatches, self.features, self.at_the_end = microbatches, iter(features), loss_of
        for numbers in portions(len(microbatches), self.group.size(), len(self.stages)):
            self.pass_through(numbers)
        self.microbatches, self.features = (), iter(())  # let go of pixels and features
        return self.from_last_stage(torch.stack([x.to(self.exact) for x in losses]).sum())

    def evaluate(self, batch: PackedBatch) -> DecoderOutput | None:
        """Return the output of one row, on the last stage's rank."""
        return self.output_of(batch, (self.encoded(row) for row in [batch]))

    @torch.no_grad()
    def output_of(
        self, batch: PackedBatch, features: Iterator[Tensor | None]
    ) -> DecoderOutput | None:
        """Pass one row through all stages; the first of them asks for its features."""
        outputs: list[DecoderOutput] = []

        def keep(output: DecoderOutput, batch: PackedBatch) -> Tensor:
            outputs.append(output)
            return output.load_balance_loss

        self.microbatches, self.features, self.at_the_end = [batch], features, keep
        self.pass_through(range(1), backward=False)
        return outputs[0] if outputs else None

    @torch.no_grad()
    def greedy(
        self,
        input_ids: Int[Tensor, " T"],
        media: PackedMedia | None,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        banned_ids: Collection[int],
    ) -> list[int]:
        """Return the most likely continuation of a prompt, without a cache: for a few short ones.

        Every token is a pass of the whole row through all stages.
        """
        row, continuation = one_document(input_ids, media), []
        self.make_room(len(input_ids) + max_new_tokens)
        features = self.encoded(row) if self.stages[0].is_first else None
        with evaluation_mode(self.model):
            while len(continuation) < max_new_tokens:
                output = self.output_of(row, iter([features]))
                token = self.from_last_stage(self.likeliest(output, banned_ids))
                continuation.append(int(token))
                if continuation[-1] in stop_ids:
                    break
                row = one_document(torch.cat([row.input_ids, token[None]]), media)
        return continuation

    def likeliest(self, output: DecoderOutput | None, banned_ids: Collection[int]) -> Tensor:
        """Return the next token of a row; anything where another rank knows it."""
        if output is None:
            return torch.zeros((), dtype=torch.int64, device=self.device)
        logits_V = self.model.logits(output.hidden_TD[-1:])[0]
        logits_V[sorted(banned_ids)] = -torch.inf
        return logits_V.argmax()

    def pass_through(self, numbers: range, *, backward: bool = True) -> None:
        """Run some neighbouring microbatches through all stages."""
        schedule = self.schedule(len(numbers))
        self.first_number = numbers.start
        number = torch.arange(numbers.start, numbers.stop)
        direction = schedule.step if backward else schedule.eval
        options: dict[str, Any] = {"target": number, "return_outputs": False}
        with at("the pipeline"):
            direction(number=number, **options)

    def schedule(self, num_microbatches: int) -> Schedule:
        """Return torch's schedule for so many microbatches, no longer than the capacity."""
        self.make_room(max(batch.num_tokens for batch in self.microbatches))
        if num_microbatches not in self.schedules:
            self.schedules[num_microbatches] = self.new_schedule(num_microbatches)
        return self.schedules[num_microbatches]

    def make_room(self, num_tokens: int) -> None:
        """Let rows of so many tokens pass; schedules for shorter ones are laid out anew."""
        if num_tokens > self.capacity:
            self.capacity = num_tokens
            self.schedules.clear()

    def new_schedule(self, num_microbatches: int) -> Schedule:
        """Lay out a schedule, with buffers for what will arrive."""
        num_ranks, rank = self.group.size(), self.group.rank()
        numbered = [
            NumberedStage(self, stage, index=rank + local * num_ranks)
            for local, stage in enumerate(self.stages)
        ]
        options: dict[str, Any] = {"loss_fn": self.loss_at_the_end, "scale_grads": False}
        if len(numbered) == 1 and num_microbatches >= num_ranks:
            return Schedule1F1B(numbered[0], num_microbatches, **options)
        return ScheduleInterleaved1F1B(list(numbered), num_microbatches, **options)

    def loss_at_the_end(self, output: tuple[Tensor, Tensor], number: Int[Tensor, " 1"]) -> Tensor:
        """Hand the last stage's output to whoever began the pass."""
        return self.at_the_end(DecoderOutput(*output), self.microbatches[int(number)])

    def before_backward(self, stage: DecoderStage, local_number: int) -> None:
        """Tell a stage's shards when to sum gradients and when to let go of the weights."""
        is_last = self.first_number + local_number == len(self.microbatches) - 1
        assert isinstance(stage, FSDPModule)
        prepare_backward(stage, is_last=is_last, zero_stage=self.zero_stage)

    def from_last_stage(self, value: Tensor) -> Tensor:
        """Return the last stage's value on every stage."""
        value = value.clone()
        dist.broadcast(value, group=self.group, group_src=self.group.size() - 1)
        return value

    @property
    def exact(self) -> torch.dtype:
        """In which scalars travel."""
        return torch.promote_types(self.dtype, torch.float32)

    def wire(self) -> tuple[Tensor, Tensor]:
        """Return what a stage takes and gives, on no device: torch wants to know it beforehand."""
        width = self.model.decoder_shape.model_width
        return (
            torch.empty(self.capacity, width, dtype=self.dtype, device="meta", requires_grad=True),
            torch.empty((), dtype=self.exact, device="meta", requires_grad=True),
        )


class NumberedStage(PipelineStage):
    """A stage as torch's schedule sees it: it is told a microbatch's number."""

    def __init__(self, backbone: PipelineBackbone, stage: DecoderStage, *, index: int) -> None:
        wire = backbone.wire()
        super().__init__(
            StageOnTheWire(backbone, stage),
            index,
            backbone.group.size() * len(backbone.stages),
            backbone.device,
            input_args=() if stage.is_first else wire,
            output_args=wire,
            group=backbone.group,
        )
        self.backbone, self.stage = backbone, stage

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute one microbatch's forward pass."""
        self.note(fwd_chunk_id, "forward")
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute one microbatch's backward pass."""
        self.note(bwd_chunk_id, "backward")
        if self.has_backward:
            self.backbone.before_backward(self.stage, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def note(self, chunk_id: int, direction: str) -> None:
        """Say where this rank is, should it wait too long there or behind it."""
        number = self.backbone.first_number + chunk_id + 1
        WHEREABOUTS.move(f"the pipeline, {direction} of microbatch {number}, {self.log_prefix}")


class StageOnTheWire(nn.Module):
    """A stage between what arrives and what leaves: rows of ``capacity``, of which T are tokens.

    The stage is no submodule: torch's schedule would take FSDP2 out of our hands, and forget
    gradients whenever it sets itself up.
    """

    def __init__(self, backbone: PipelineBackbone, stage: DecoderStage) -> None:
        super().__init__()
        self.backbone, self.of_stage = backbone, [stage]

    def forward(
        self,
        arrived_CD: Float[Tensor, "C D"] | None = None,
        load_balance_loss: Float[Tensor, ""] | None = None,
        *,
        number: Int[Tensor, " 1"],
    ) -> tuple[Tensor, Tensor]:
        """Run a microbatch through the stage."""
        (stage,), backbone = self.of_stage, self.backbone
        batch = backbone.microbatches[int(number)]
        hidden_TD, balance_so_far = stage(
            batch,
            next(backbone.features) if stage.is_first else None,
            None if arrived_CD is None else arrived_CD[: batch.num_tokens],
            load_balance_loss,
        )
        if not stage.is_last:
            hidden_TD = F.pad(hidden_TD, (0, 0, 0, backbone.capacity - batch.num_tokens))
        return hidden_TD, balance_so_far.to(backbone.exact)


def one_document(input_ids: Int[Tensor, " T"], media: PackedMedia | None) -> PackedBatch:
    """Return a row that teaches nothing."""
    positions = torch.arange(len(input_ids), device=input_ids.device)
    return PackedBatch(
        input_ids=input_ids,
        target_ids=input_ids,
        position_ids=positions,
        cu_seqlens=torch.tensor([0, len(input_ids)], device=input_ids.device),
        loss_mask=torch.zeros_like(input_ids, dtype=torch.bool),
        media=media,
    )


def portions(num_microbatches: int, num_ranks: int, stages_per_rank: int) -> list[range]:
    """Cut a step into passes that a schedule can take: one, or whole rounds and what is left.

    Interleaved stages take their turns in rounds of equally many microbatches.
    """
    num_rounds = max(1, num_microbatches // num_ranks)
    if stages_per_rank == 1 or num_microbatches % num_rounds == 0:
        return [range(num_microbatches)]
    whole = num_rounds * num_ranks
    return [range(whole), range(whole, num_microbatches)]


def backward_is_the_schedules(loss: Tensor) -> None:
    """Stand where a backbone's ``backward`` is: here torch's schedule goes backward."""
    raise RuntimeError("a pipeline's backward pass is run by its schedule")
