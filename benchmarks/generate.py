"""Sampling with the native engine against transformers' ``generate`` and its continuous batching.

Same weights, same 64 prompts of mixed length, float32, two threads, one process, rounds interleaved
so that a slow minute of the machine falls on every side alike. No side stops early: an answer has
as many tokens as the workload says. The first greedy tokens of all sides are compared before the
timing.

    python benchmarks/generate.py                        # everything, about 10 minutes on 2 cores
    python benchmarks/generate.py --size tiny --workload equal --rounds 2
    python benchmarks/generate.py --threads 1 --clock cpu    # on a machine that is busy

The paged cache of transformers wants keys and values of one width, so all sides run with values as
wide as keys (48 in ``tiny`` instead of 32).

Workloads, 64 prompts of 16 to 512 tokens each:
    equal    64 new tokens for every prompt: nobody waits for the longest answer.
    mixed    16 to 112 new tokens, 64 on average: ``generate`` pads to the longest, as a batch must.
Both are sampled at temperature 1 with top-p 0.95, or without top-p (``--top-p 1``).
"""

import argparse
import asyncio
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import transformers
from train_step import CLOCKS, ENCODER, SEED, SHAPES, Clock
from transformers import ContinuousBatchingConfig, DeepseekV3ForCausalLM, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from moonlit.models.kimi import Kimi
from moonlit.rl.engines.base import Request, Sampling
from moonlit.rl.engines.native import NativeEngine

sys.path.append(str(Path(__file__).parents[1] / "tests" / "models"))
from oracle import oracle_of  # the parity tests' copy of our weights into transformers' class

NUM_PROMPTS = 64
NEW_TOKENS = {
    "equal": [64] * NUM_PROMPTS,
    "mixed": [16 + round(i * 96 / (NUM_PROMPTS - 1)) for i in range(NUM_PROMPTS)],
}
STARTED: list[ContinuousBatchingManager] = []
"""Their threads must be stopped before the interpreter can end."""
Answers = list[list[int]]
Side = Callable[[list[list[int]], list[int], float, float], Answers]
"""Prompts, new tokens of each, temperature, top-p -> sampled ids."""


def build_model(size: str) -> Kimi:
    """The same weights at every call."""
    torch.manual_seed(SEED)
    shape = SHAPES[size]
    return Kimi(decoder=replace(shape, v_width=shape.qk_width), vision=ENCODER).eval()


def prompts_of(size: str) -> list[list[int]]:
    """Random words in an order that does not rise with their length."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [16 + round(i * (512 - 16) / (NUM_PROMPTS - 1)) for i in range(NUM_PROMPTS)]
    order = torch.randperm(NUM_PROMPTS, generator=generator).tolist()
    upper = SHAPES[size].media_pad_id - 3
    return [torch.randint(upper, (lengths[i],), generator=generator).tolist() for i in order]


def ours(size: str) -> Side:
    """The native engine."""
    engine = NativeEngine(build_model(size))

    def run(prompts: list[list[int]], new: list[int], temperature: float, top_p: float) -> Answers:
        async def gather() -> Answers:
            requests = [
                Request(
                    input_ids=ids,
                    seed=seed,
                    sampling=Sampling(
                        max_new_tokens=num,
                        stop_ids=frozenset(),
                        temperature=temperature,
                        top_p=top_p,
                    ),
                )
                for seed, (ids, num) in enumerate(zip(prompts, new, strict=True))
            ]
            completions = await asyncio.gather(*(engine.generate(r) for r in requests))
            return [completion.token_ids for completion in completions]

        return asyncio.run(gather())

    return run


def their_model(size: str, experts: str) -> DeepseekV3ForCausalLM:
    """Text alone: nothing of the encoder costs transformers time."""
    oracle = oracle_of(build_model(size)).eval()
    text = DeepseekV3ForCausalLM(oracle.config.text_config).eval()
    text.model.load_state_dict(oracle.model.language_model.state_dict())
    text.lm_head.load_state_dict(oracle.lm_head.state_dict())
    text.set_experts_implementation(experts)
    text.config.head_dim = SHAPES[size].qk_width  # read by the paged cache alone from here on
    return text


def generation_config(num: int, temperature: float, top_p: float) -> GenerationConfig:
    """Exactly ``num`` new tokens."""
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=num,
        eos_token_id=-1,
        pad_token_id=0,
        bos_token_id=None,
        **(sampled if temperature else {"do_sample": False}),
    )


def their_generate(size: str, experts: str) -> Side:
    """One padded batch, as long as its longest answer."""
    model = their_model(size, experts)

    def run(prompts: list[list[int]], new: list[int], temperature: float, top_p: float) -> Answers:
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        is_token = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in prompts])
        rows = model.generate(
            input_ids=input_ids,
            attention_mask=is_token,
            generation_config=generation_config(max(new), temperature, top_p),
        )
        return [row[longest : longest + num] for row, num in zip(rows.tolist(), new, strict=True)]

    return run


def their_continuous_batching(size: str, experts: str) -> Side:
    """Paged attention, requests that leave when they are done."""
    model = their_model(size, experts)
    settings = ContinuousBatchingConfig(
        page_size=64, num_blocks=1024, max_batch_tokens=4096, max_requests_per_batch=NUM_PROMPTS
    )

    @cache
    def manager(temperature: float, top_p: float) -> ContinuousBatchingManager:
        """Start once: its start takes seconds, and a server would not start again either."""
        started = model.init_continuous_batching(
            generation_config=generation_config(1, temperature, top_p),
            continuous_batching_config=settings,
        )
        started.start()
        STARTED.append(started)
        return started

    def run(prompts: list[list[int]], new: list[int], temperature: float, top_p: float) -> Answers:
        server, answers = manager(temperature, top_p), {}
        for place, (ids, num) in enumerate(zip(prompts, new, strict=True)):
            server.add_request(ids, request_id=str(place), max_new_tokens=num)
        while len(answers) < len(prompts):
            result = server.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise SystemExit(f"transformers' continuous batching: {result.error}")
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[str(place)] for place in range(len(prompts))]

    return run


def require_equal_starts(sides: dict[str, Side], size: str) -> None:
    """All sides must compute the same policy: compare greedy answers to short prompts."""
    prompts = [ids[:40] for ids in prompts_of(size)[:4]]
    answers = {name: side(prompts, [4] * 4, 0.0, 1.0) for name, side in sides.items()}
    if any(answer != answers["ours"] for answer in answers.values()):
        raise SystemExit(f"the sides do not compute the same policy: {answers}")
    print(f"greedy answers, every side: {answers['ours'][0]} ...")


def report(size: str, workload: str, top_p: float, rounds: int, clock: Clock, experts: str) -> None:
    """Measure one size and workload and print its table."""
    sides: dict[str, Side] = {
        "ours": ours(size),
        "transformers generate": their_generate(size, experts),
        "transformers continuous batching": their_continuous_batching(size, experts),
    }
    prompts, new = prompts_of(size), NEW_TOKENS[workload]
    print(f"\n### {size}, {workload}: {sum(map(len, prompts))} prompt tokens, {sum(new)} sampled")
    print(f"top-p {top_p}; transformers' experts: {experts}")
    require_equal_starts(sides, size)
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for side in sides.values():
        side(prompts[:2], [2, 2], 1.0, top_p)  # what is started once
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            answers = sides[name](prompts, new, 1.0, top_p)
            times[name].append(clock() - start)
            if [len(answer) for answer in answers] != new:
                raise SystemExit(f"{name} did not sample what was asked for")
    baseline = statistics.median(times["transformers generate"])
    print("\n| side | median s | min - max s | sampled tokens/s | speed-up |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in names:
        median = statistics.median(times[name])
        print(
            f"| {name} | {median:.2f} | {min(times[name]):.2f} - {max(times[name]):.2f}"
            f" | {sum(new) / median:.0f} | {baseline / median:.2f}x |",
            flush=True,
        )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--workload", choices=[*NEW_TOKENS, "all"], default="all")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--experts", default="grouped_mm")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__},", end=" ")
    print(f"{platform.machine()}, {args.threads} threads, {args.clock} time, float32")
    for size in SHAPES if args.size == "all" else [args.size]:
        for workload in NEW_TOKENS if args.workload == "all" else [args.workload]:
            report(size, workload, args.top_p, args.rounds, CLOCKS[args.clock], args.experts)
            while STARTED:
                STARTED.pop().stop(block=True)


if __name__ == "__main__":
    main()
