"""What one GPU does with the model: tokens/s, MFU, experts by backend, images/s, peak memory.

    python benchmarks/gpu.py                 # bf16 on CUDA, at most 8 minutes; prints markdown
    python benchmarks/gpu.py --tiny          # the same path, tiny sizes, also on a CPU

- Model: forward and backward of one packed row, without an optimizer, of the ``small`` preset and
  of the first layers of Moonlight's and of K2.5's shapes (all experts, all vocabulary). Model FLOPs
  are three times the forward's, ``moonlit.models.accounting``; MFU is their share of the largest
  matrix product measured here.
- Experts: one layer's experts, forward and backward, rows routed by the real router: as it is at
  initialisation (nearly even), and with its selection bias pushing all tokens to one expert in
  eight (never fewer than top-k).
- Encoder: forward and backward of K2.5's tower over pictures of one size, by attention backend.

Backends of one case take turns, round by round; the figure is the median round. What does not fit
the device's memory, or the time, is named, not left out in silence.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moonlit.losses.language_modeling import next_token_loss
from moonlit.models.accounting import forward_flops_per_token
from moonlit.models.kimi import Kimi
from moonlit.models.moe.layer import EXPERTS
from moonlit.models.moe.router import Router
from moonlit.models.segment_attention import attention_named
from moonlit.models.shapes import DecoderShape, EncoderShape
from moonlit.models.vision.moonvit3d import MoonViT3D

CONF = Path(__file__).parents[1] / "conf" / "model"
LAYERS = {"small": None, "moonlight_16b_a3b": 4, "kimi_k2_5": 2}
MEMORY_SHARE = 0.8
"""Of the device, for weights and their gradients; the rest is for activations."""
Step = Callable[[], None]


class Bench:
    """A device, a clock and the time that is left."""

    def __init__(self, *, tiny: bool, budget_s: float, rounds: int) -> None:
        self.tiny, self.rounds = tiny, rounds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.ends = time.perf_counter() + budget_s

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean anything."""
        return self.device.type == "cuda"

    def medians(self, steps: dict[str, Step]) -> dict[str, float]:
        """Time steps in turns; return each one's median [s]."""
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()  # compiles, tunes, allocates
        for _ in range(self.rounds):
            for name, step in steps.items():
                self.wait()
                start = time.perf_counter()
                step()
                self.wait()
                seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(times) for name, times in seconds.items()}

    def wait(self) -> None:
        """Let the device finish."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def reason_to_skip(self, num_bytes: float) -> str | None:
        """Say why a case of this size is not run, if it is not."""
        if time.perf_counter() > self.ends:
            return "not run: out of time"
        if self.on_gpu:
            room = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory
            if num_bytes > room:
                return f"not run: needs {num_bytes / 2**30:.0f} GiB of {room / 2**30:.0f}"
        return None

    def peak_gib(self, step: Step) -> float:
        """Return the most memory that a step holds at once [GiB]; 0 on a CPU."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30


def shapes_of(name: str, *, tiny: bool) -> tuple[DecoderShape, EncoderShape]:
    """Return a preset's shapes, cut to its first layers; ``tiny`` keeps the proportions only."""
    conf = OmegaConf.load(CONF / f"{'tiny' if tiny else name}.yaml")
    decoder, vision = instantiate(conf["decoder"]), instantiate(conf["vision"])
    layers = 2 if tiny else LAYERS[name]
    return (decoder if layers is None else replace(decoder, num_layers=layers)), vision


def largest_product(bench: Bench) -> float:
    """Measure the FLOP/s of one large matrix product."""
    size = 256 if bench.tiny else 8192
    a, b = torch.randn(2, size, size, device=bench.device, dtype=bench.dtype)
    return 2 * size**3 / bench.medians({"": lambda: torch.mm(a, b)})[""]


def model_rows(bench: Bench, peak: float) -> Iterator[str]:
    """Yield a table row for each model."""
    length = 64 if bench.tiny else 4096
    for name in LAYERS:
        decoder, _ = shapes_of(name, tiny=bench.tiny)
        with torch.device("meta"):
            meta = Kimi(decoder=decoder, vision=None)
        numel = sum(p.numel() for p in meta.parameters())
        label = f"| {name}, {decoder.num_layers} layers | {numel / 1e9:.2f} "
        if reason := bench.reason_to_skip(2 * numel * bench.dtype.itemsize):
            yield f"{label}| {reason} | | | | |"
            continue
        step, flops = (
            model_step(bench, decoder, length),
            3 * length * forward_flops_per_token(meta, num_positions=length // 2),
        )
        seconds = bench.medians({name: step})[name]
        yield (
            f"{label}| {seconds * 1e3:.1f} | {length / seconds:,.0f} "
            f"| {flops / seconds / 1e12:.1f} | {flops / seconds / peak:.1%} "
            f"| {bench.peak_gib(step):.1f} |"
        )


def model_step(bench: Bench, decoder: DecoderShape, length: int) -> Step:
    """Forward, loss and backward over one packed row of two documents."""
    with bench.device:
        model = Kimi(decoder=decoder, vision=None).to(bench.dtype).train()
        ids = torch.randint(0, decoder.media_pad_id, (length,))
        half = torch.arange(length // 2)
        positions, ends = torch.cat([half, half]), torch.tensor([0, length // 2, length])
        mask = torch.ones(length, dtype=torch.bool)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        hidden = model(ids, positions, ends).hidden_TD
        next_token_loss(hidden, model.language_model.lm_head.weight, ids.roll(-1), mask).backward()

    return step


def expert_rows(bench: Bench) -> Iterator[str]:
    """Yield a table row for each shape, load and backend of the experts."""
    num_tokens = 64 if bench.tiny else 8192
    backends = [name for name in EXPERTS if name != "megablocks" or megablocks_runs(bench)]
    for name in LAYERS:
        shape, _ = shapes_of(name, tiny=bench.tiny)
        numel = 3 * shape.num_experts * shape.model_width * shape.expert_width
        if reason := bench.reason_to_skip(2 * numel * bench.dtype.itemsize):
            yield f"| {name} | {reason} | | | |"
            continue
        flops = 18 * num_tokens * shape.top_k * shape.model_width * shape.expert_width
        for load in ("even", "skewed"):
            steps = expert_steps(bench, shape, num_tokens, load, backends)
            for backend, seconds in bench.medians(steps).items():
                yield (
                    f"| {name} | {load} | {backend} | {seconds * 1e3:.2f} "
                    f"| {flops / seconds / 1e12:.1f} |"
                )


def megablocks_runs(bench: Bench) -> bool:
    """Say whether MegaBlocks is installed and has a GPU (interpreted, it measures nothing)."""
    return bench.on_gpu and find_spec("megablocks") is not None


def expert_steps(
    bench: Bench, shape: DecoderShape, num_tokens: int, load: str, backends: list[str]
) -> dict[str, Step]:
    """Every backend with one set of weights, on the same rows."""
    sizes = {
        "model_width": shape.model_width,
        "expert_width": shape.expert_width,
        "num_experts": shape.num_experts,
    }
    with bench.device:
        router = Router(
            model_width=shape.model_width, num_experts=shape.num_experts,
            top_k=shape.top_k, routed_scale=shape.routed_scale,
        ).to(bench.dtype)  # fmt: skip
        if load == "skewed":
            router.e_score_correction_bias[: max(shape.top_k, shape.num_experts // 8)] = 2.0
        x = torch.randn(num_tokens, shape.model_width, dtype=bench.dtype)
        weights = dict(EXPERTS["reference"](**sizes).to(bench.dtype).named_parameters())
        routing = router(x, torch.zeros(num_tokens, dtype=torch.int64))
    combine = routing.weights_TK.detach().requires_grad_()
    x.requires_grad_()

    def step(experts: torch.nn.Module) -> None:
        for tensor in (x, combine, *weights.values()):
            tensor.grad = None
        experts(x, combine, routing.expert_ids_TK).sum().backward()

    steps: dict[str, Step] = {}
    for backend in backends:
        with torch.device("meta"):
            experts = EXPERTS[backend](**sizes)
        for name, weight in weights.items():
            setattr(experts, name, weight)
        steps[backend] = partial(step, experts)
    return steps


def encoder_rows(bench: Bench) -> Iterator[str]:
    """Yield a table row for each attention backend of the encoder."""
    side, pictures = (4, 2) if bench.tiny else (64, 8)
    _, shape = shapes_of("kimi_k2_5", tiny=bench.tiny)
    if reason := bench.reason_to_skip(0):
        yield f"| {reason} | | |"
        return
    with bench.device:
        pixels = torch.randint(256, (pictures * side**2, 3, 14, 14), dtype=torch.uint8)
        grids = torch.tensor([[1, side, side]] * pictures)
    steps: dict[str, Step] = {}
    for backend in ("sdpa", "xformers") if bench.on_gpu and find_spec("xformers") else ("sdpa",):
        with bench.device:
            tower = MoonViT3D(shape, attention=attention_named(backend)).to(bench.dtype)
        steps[backend] = partial(encoder_step, tower, pixels, grids)
    for backend, seconds in bench.medians(steps).items():
        memory = bench.peak_gib(steps[backend])
        yield f"| {backend} | {pictures / seconds:.1f} | {memory:.1f} |"


def encoder_step(tower: MoonViT3D, pixels: torch.Tensor, grids: torch.Tensor) -> None:
    """Forward and backward of the tower."""
    tower.zero_grad(set_to_none=True)
    tower(pixels, grids).sum().backward()


def main() -> None:
    """Print the tables as they fill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--budget-s", type=float, default=420.0, help="begin no case after it")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    bench = Bench(tiny=args.tiny, budget_s=args.budget_s, rounds=args.rounds)
    if not (bench.on_gpu or bench.tiny):
        parser.error("no CUDA device here: --tiny shows on a CPU that everything runs")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or "CPU"
    print(
        f"{device}; torch {torch.__version__}; {bench.dtype}",
        "(tiny shapes under every name: no figures)" if bench.tiny else "",
    )
    peak = largest_product(bench)
    print(f"Largest matrix product measured: {peak / 1e12:.3g} TFLOP/s.\n")
    print("| model | 10^9 weights | ms | tokens/s | TFLOP/s | MFU | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in model_rows(bench, peak):
        print(row, flush=True)
    print("\n| experts of | load | backend | ms | TFLOP/s |\n| --- | --- | --- | ---: | ---: |")
    for row in expert_rows(bench):
        print(row, flush=True)
    print("\n| encoder attention | images/s | peak GiB |\n| --- | ---: | ---: |")
    for row in encoder_rows(bench):
        print(row, flush=True)


if __name__ == "__main__":
    main()
