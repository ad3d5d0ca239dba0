"""A multimodal training step against a text-only one of the same rows, tokens and trained tokens.

The report claims 90 % of text-only training's speed for its Decoupled Encoder Process (arXiv:
2602.02276, Sec. 4.5.1). Here every rank is a gloo process of one thread. The sides:

    text        no pictures
    inline      the encoder in the graph of the microbatch (under pp: of the first stage)
    decoupled   DEP as in the report: what was encoded is encoded again for its backward pass
    kept        DEP that keeps the encoder's graph (``recompute: never``, and ``auto`` here)

on pictures of one size dealt out evenly, and of unlike sizes of which nearly all fall to the first
data-parallel rank. Rounds are interleaved, the order rotates; an efficiency is the median over
rounds of text time / multimodal time of that round, with the lowest and highest beside it.

Beside it stand two limits: *arithmetic* is the share of the decoder's FLOPs in all FLOPs (forward
three times, with recomputation four), *measured* puts in their place the seconds that the ranks
need for nothing but their share of the encoding, at the same time.

    python benchmarks/dep_efficiency.py                # 2 processes: under 5 minutes on 2 cores
    python benchmarks/dep_efficiency.py --processes 4 --rounds 3
    python benchmarks/dep_efficiency.py --encoder tiny # an encoder four times as costly
    python benchmarks/dep_efficiency.py --clock cpu    # on a machine that is busy

``--clock cpu`` takes for a step's time the processor seconds of its busiest rank: work without any
waiting, so neither a pipeline's bubbles nor the wire are in it.
"""

import argparse
import ctypes
import gc
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moonlit.batch import PackedBatch, PackedMedia
from moonlit.distributed.backbone import Backbone, ShardedBackbone
from moonlit.distributed.decoupled_encoder import DecoupledEncoder
from moonlit.distributed.encoder_process import ReplicatedInlineEncoder
from moonlit.distributed.gradients import clip_grad_norm_
from moonlit.distributed.item_exchange import ItemExchange
from moonlit.distributed.mesh import MeshSizes, ProcessMesh
from moonlit.distributed.pipeline import PipelineBackbone
from moonlit.distributed.sharding import shard
from moonlit.losses.language_modeling import next_token_loss
from moonlit.models.accounting import forward_flops_per_token
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import EncoderShape
from moonlit.models.stages import cut_layers, keep_layers
from moonlit.optim.baselines import adamw

TINY = OmegaConf.load(Path(__file__).parents[1] / "conf" / "model" / "tiny.yaml")
ENCODERS: dict[str, EncoderShape] = {
    "light": EncoderShape(
        num_layers=2, width=64, mlp_width=172, num_heads=4, table_height=16, table_width=16
    ),
    "tiny": instantiate(TINY["vision"]),
}
"""``light``: about 4 % of the step, at a vision share of 10 %; K2.5's own would be about 0.5 %."""
NUM_ROWS, ROW_TOKENS, DOCUMENT_TOKENS = 8, 512, 256
EVEN = [[14]] * NUM_ROWS
SKEWED = [[24], [8], [20], [8], [16], [8], [12], []]
"""Sides of each row's square pictures [patches]; 392 tokens of 4,096 both times."""
SIDES = ("inline", "decoupled", "kept")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One side on one batch, as one rank saw it."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    sent_bytes: int = 0
    grown_bytes: int = 0


def rows_of(pictures: list[list[int]], media_pad_id: int) -> list[PackedBatch]:
    """Rows of random words, each document beginning with at most one square picture."""
    noise = torch.Generator().manual_seed(0)
    rows = []
    for sides in pictures:
        input_ids = torch.randint(media_pad_id, (ROW_TOKENS,), generator=noise)
        for number, side in enumerate(sides):
            start = number * DOCUMENT_TOKENS
            input_ids[start : start + side * side // 4] = media_pad_id
        num_patches = sum(side * side for side in sides)
        pixels = torch.randint(256, (num_patches, 3, 14, 14), generator=noise).to(torch.uint8)
        grid_thw = torch.tensor([(1, side, side) for side in sides])
        position_ids = torch.arange(ROW_TOKENS) % DOCUMENT_TOKENS
        rows.append(
            PackedBatch(
                input_ids=input_ids,
                target_ids=torch.randint(media_pad_id, (ROW_TOKENS,), generator=noise),
                position_ids=position_ids,
                cu_seqlens=torch.arange(0, ROW_TOKENS + 1, DOCUMENT_TOKENS),
                loss_mask=position_ids > DOCUMENT_TOKENS // 2,  # the same ones on all sides
                media=PackedMedia(pixel_values=pixels, grid_thw=grid_thw) if sides else None,
            )
        )
    return rows


class Bench:
    """A sharded model on this rank, and a training step of it by side and batch."""

    def __init__(self, pp: int, encoder: str) -> None:
        torch.manual_seed(0)
        sizes = MeshSizes.for_world(
            dist.get_world_size(), pp=pp, dp_replicate=1, dp_shard=None, ep=1
        )
        self.mesh = ProcessMesh(sizes, "cpu")
        self.model = Kimi(decoder=instantiate(TINY["decoder"]), vision=ENCODERS[encoder]).train()
        self.flops_per_token = forward_flops_per_token(
            self.model, num_positions=DOCUMENT_TOKENS // 2
        )
        self.head: Any = self.model.language_model.lm_head
        self.backbone = self.build_backbone(pp)
        self.optimizer = adamw(self.model, lr=1e-3, weight_decay=0.1)
        self.rows: list[PackedBatch] = []
        self.encoders: dict[str, Any] = {
            "inline": ReplicatedInlineEncoder(self.model, self.mesh.group("world")),
            "decoupled": self.decoupled("always"),
            "kept": self.decoupled("never"),
        }
        self.encoders["text"] = self.encoders["decoupled"]

    def build_backbone(self, pp: int) -> Backbone:
        """Shard the model, as the strategy does."""
        cut = cut_layers(self.model.decoder_shape.num_layers, pp)
        stages = keep_layers(self.model, [cut[self.mesh.rank("pp")]]) if pp > 1 else []
        shard(self.model, self.mesh, zero_stage=1, stages=stages)
        options: dict[str, Any] = {"loss": self.loss, "zero_stage": 1}
        if stages:
            return PipelineBackbone(self.model, stages, self.mesh.group("pp"), **options)
        return ShardedBackbone(self.model, backward=torch.Tensor.backward, **options)

    def decoupled(self, recompute: str) -> DecoupledEncoder:
        """Encode all ranks' pictures in equal shares."""
        return DecoupledEncoder(
            self.model, group=self.mesh.group("world"), holds_rows=self.mesh.rank("pp") == 0,
            recompute=recompute, patch_budget=4096, overlap=True, coming=lambda: self.rows,
        )  # fmt: skip

    def loss(self, output: Any, batch: PackedBatch) -> torch.Tensor:
        """Next-token loss."""
        return next_token_loss(
            output.hidden_TD, self.head.weight, batch.target_ids, batch.loss_mask
        )

    def mine(self, rows: list[PackedBatch]) -> list[PackedBatch]:
        """Return the rows that this rank reads."""
        return rows[self.mesh.data_parallel_rank :: self.mesh.data_parallel_size]

    def step(self, side: str, rows: list[PackedBatch]) -> None:
        """Take an optimizer step; the next one will be of the same rows."""
        self.rows = rows
        num_tokens = torch.stack([row.loss_mask.sum() for row in rows]).sum().float()
        dist.all_reduce(num_tokens, group=self.mesh.group("data"))
        with self.encoders[side].around(rows) as features:
            self.backbone.run(rows, features, normalise=lambda loss: loss / num_tokens)
        clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self, side: str) -> None:
        """Leave nothing on the wire."""
        if isinstance(self.encoders[side], DecoupledEncoder):
            self.encoders[side].finish()

    def encode_alone(
        self, rows: list[PackedBatch], clock: Callable[[], float], *, forwards: int
    ) -> float:
        """Return the seconds of the slowest rank for its share of the encoding alone."""
        assert self.model.vision_shape is not None
        world = self.mesh.group("world")
        media = [r.media for r in rows if r.media is not None and self.mesh.rank("pp") == 0]
        grid_thw = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(m.grid_thw for m in media)])
        exchange = ItemExchange.plan(grid_thw, self.model.vision_shape, world)
        grids = [exchange.grids[item] for item in exchange.owned]
        num_patches = sum(t * h * w for t, h, w in grids)
        share = PackedMedia(
            pixel_values=torch.zeros(num_patches, 3, 14, 14, dtype=torch.uint8),
            grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        )
        dist.barrier()
        began = clock()
        if grids:
            with torch.no_grad():
                for _ in range(forwards - 1):
                    self.model.encode_media(share)
            self.model.encode_media(share).sum().backward()
        seconds = torch.tensor(clock() - began, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)


def encoder_flops(encoder: str, pictures: list[list[int]]) -> float:
    """Return the FLOPs of encoding and projecting all pictures once, forward."""
    shape, model_width = ENCODERS[encoder], TINY["decoder"]["model_width"]
    width, merged = shape.width, shape.width * shape.merge**2
    per_patch = 2 * 3 * shape.patch_size**2 * width
    per_layer = 2 * (4 * width**2 + 2 * width * shape.mlp_width)
    total = 0.0
    for side in (side for row in pictures for side in row):
        patches = side * side
        attention = 4 * patches * width
        total += patches * (per_patch + shape.num_layers * (per_layer + attention))
        total += patches / 4 * 2 * (merged**2 + merged * model_width)
    return total


def written_bytes() -> int:
    """Return what this process has written so far: here, to its sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def resident_bytes(name: str) -> int:
    """Return ``VmRSS`` or, since the last reset, its peak ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def grown_in(step: Callable[[], None]) -> int:
    """Return the memory that a step needs on top of what stays [bytes]."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def measure(rank: int, world: int, port: int, pp: int, args: Any, queue: Any) -> None:
    """Be one rank: run all sides in turn, and send what was measured."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    bench = Bench(pp, args.encoder)
    pad = bench.model.decoder_shape.media_pad_id
    batches = {"even": bench.mine(rows_of(EVEN, pad)), "skewed": bench.mine(rows_of(SKEWED, pad))}
    text = bench.mine(rows_of([[]] * NUM_ROWS, pad))
    cases = {("text", "-"): text} | {
        (side, name): rows for name, rows in batches.items() for side in SIDES
    }
    results = {case: Measured() for case in cases}
    for (side, name), rows in cases.items():  # not timed: schedules, buffers, caches
        bench.step(side, rows)
        results[side, name].grown_bytes = grown_in(lambda s=side, r=rows: bench.step(s, r))
        written = written_bytes()
        bench.step(side, rows)
        results[side, name].sent_bytes = written_bytes() - written
        bench.settle(side)
    order = list(cases)
    for round_number in range(args.rounds):
        shift = round_number % len(order)
        for side, name in order[shift:] + order[:shift]:
            rows = cases[side, name]
            if side in ("decoupled", "kept"):  # the timed step's patches shall be on their way
                bench.step(side, rows)
            dist.barrier()
            began, busy = time.perf_counter(), time.process_time()
            bench.step(side, rows)
            dist.barrier()
            results[side, name].wall_s.append(time.perf_counter() - began)
            results[side, name].cpu_s.append(time.process_time() - busy)
            bench.settle(side)
    alone = {
        (name, forwards): statistics.median(
            bench.encode_alone(rows, CLOCKS[args.clock], forwards=forwards) for _ in range(5)
        )
        for name, rows in batches.items()
        for forwards in (1, 2)
    }
    queue.put((rank, results, alone, bench.flops_per_token))
    dist.barrier()
    dist.destroy_process_group()


def run(pp: int, args: Any) -> tuple[list[dict], dict, float]:
    """Start the ranks; return what each measured, the encoder's own seconds, the text's FLOPs."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=measure, args=(rank, args.processes, port, pp, args, queue))
        for rank in range(args.processes)
    ]
    for process in processes:
        process.start()
    answers = sorted((queue.get(timeout=900) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    _, _, alone, flops_per_token = answers[0]
    return [results for _, results, _, _ in answers], alone, flops_per_token


COLUMNS = (
    "side", "pictures", "median s", "min - max s", "efficiency", "min - max", "arithmetic limit",
    "measured limit", "max / mean rank", "sent MiB", "peak MiB",
)  # fmt: skip


def report(pp: int, args: Any) -> None:
    """Measure one layout and print its table."""
    ranks, alone, flops_per_token = run(pp, args)
    text_flops = 3 * flops_per_token * NUM_ROWS * ROW_TOKENS
    text_s = times_of(ranks, ("text", "-"), args.clock)
    layout = f"{args.processes} processes, pp {pp}; encoder `{args.encoder}`"
    print(f"\n{layout}; {args.rounds} rounds; {args.clock} clock\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}")
    for side, name in ranks[0]:
        mine_s = times_of(ranks, (side, name), args.clock)
        ratios = [text / mine for text, mine in zip(text_s, mine_s, strict=True)]
        measured = [rank[side, name] for rank in ranks]
        busy = [statistics.median(one.cpu_s) for one in measured]
        limits = ("-", "-")
        if side != "text":
            forwards = 2 if side == "decoupled" else 1
            flops = (forwards + 2) * encoder_flops(args.encoder, EVEN if name == "even" else SKEWED)
            median_s = statistics.median(text_s)
            limits = (
                f"{text_flops / (text_flops + flops):.1%}",
                f"{median_s / (median_s + alone[name, forwards]):.1%}",
            )
        cells = (
            side, name, f"{statistics.median(mine_s):.3f}",
            f"{min(mine_s):.3f} - {max(mine_s):.3f}", f"{statistics.median(ratios):.1%}",
            f"{min(ratios):.1%} - {max(ratios):.1%}", *limits,
            f"{max(busy) / statistics.mean(busy):.2f}",
            f"{sum(one.sent_bytes for one in measured) / 2**20:.1f}",
            f"{max(one.grown_bytes for one in measured) / 2**20:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def times_of(ranks: list[dict], case: tuple[str, str], clock: str) -> list[float]:
    """Return a step's seconds in every round."""
    if clock == "wall":
        return ranks[0][case].wall_s
    return [max(of_round) for of_round in zip(*(rank[case].cpu_s for rank in ranks), strict=True)]


def main() -> None:
    """Measure pp 1 and pp 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--encoder", choices=sorted(ENCODERS), default="light")
    args = parser.parse_args()
    began = time.perf_counter()
    print(f"{os.cpu_count()} cores of {platform.machine()}; torch {torch.__version__}; gloo")
    print(f"load average before: {os.getloadavg()[0]:.1f}")
    for pp in (1, 2):
        report(pp, args)
    print(f"\n{time.perf_counter() - began:.0f} s; load average after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
