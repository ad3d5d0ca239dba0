"""What a sandbox costs: start, a call, memory, and many that wait.

    python benchmarks/sandbox.py                 # about a minute
    python benchmarks/sandbox.py --idle 50

Measured in one run: the template's start with the first worker (cold), a worker forked from it
until it is confined (warm), a call that does nothing, calls a second over two workers at once, and
the memory of workers that wait: PSS, where pages shared with the template count in part. Beside
them the start without a template: a new interpreter that imports what the template holds.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from moonlit.agents.sandbox.kernel import PRELOADED
from moonlit.agents.sandbox.pool import Pool
from moonlit.agents.sandbox.worker import Worker

NUM_SPAWNS, NUM_CALLS, NUM_PLAIN = 20, 500, 3
MIB = 2**20


async def seconds(action: Callable[[], Awaitable[object]]) -> float:
    """Time one action [s]."""
    start = time.perf_counter()
    await action()
    return time.perf_counter() - start


def plain_start_s() -> float:
    """Time an interpreter that imports what the template holds [s]."""
    code = "; ".join(f"import {name}" for name in PRELOADED)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    return time.perf_counter() - start


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def measure_calls(worker: Worker) -> dict[str, float]:
    """Time calls that do nothing."""
    await worker.run("1")
    times = [await seconds(lambda: worker.run("1")) for _ in range(NUM_CALLS)]
    return {
        "call_median_ms": 1000 * statistics.median(times),
        "call_p99_ms": 1000 * sorted(times)[int(0.99 * NUM_CALLS)],
    }


async def measure(num_idle: int) -> dict[str, float]:
    """Run everything once."""
    results: dict[str, float] = {
        "plain_interpreter_s": statistics.median(plain_start_s() for _ in range(NUM_PLAIN))
    }
    pool = Pool(num_warm=0, max_workers=num_idle + 8)
    results["cold_start_s"] = await seconds(pool.__aenter__)
    print(f"layers: {pool.report}", flush=True)

    spawned: list[Worker] = []

    async def spawn() -> None:
        spawned.append(await pool.spawn())

    times = [await seconds(spawn) for _ in range(NUM_SPAWNS)]
    results["warm_start_median_ms"] = 1000 * statistics.median(times)
    results |= await measure_calls(spawned[0])

    async def call(worker: Worker) -> None:
        for _ in range(NUM_CALLS):
            await worker.run("1")

    took = await seconds(lambda: asyncio.gather(*map(call, spawned[:2])))
    results["calls_per_s_two_workers"] = 2 * NUM_CALLS / took

    start = time.perf_counter()
    while len(spawned) < num_idle:
        await spawn()
    results["idle_workers"] = len(spawned)
    results["idle_spawn_s"] = time.perf_counter() - start
    assert pool.template is not None
    sizes = [pss_bytes(worker.pid) for worker in spawned]
    results["template_pss_mib"] = pss_bytes(pool.template.pid) / MIB
    results["idle_worker_pss_mib"] = statistics.mean(sizes) / MIB
    results["idle_total_pss_mib"] = (sum(sizes) + pss_bytes(pool.template.pid)) / MIB
    answers = await asyncio.gather(*(worker.run("6 * 7") for worker in spawned))
    assert all(answer.text == "42\n" for answer in answers), "an idle worker does not answer"
    closing = time.perf_counter()
    await asyncio.gather(*(worker.close() for worker in spawned))
    results["close_all_s"] = time.perf_counter() - closing
    await pool.close()
    return results


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--idle", type=int, default=200, help="workers that wait")
    chosen = arguments.parse_args()
    results = asyncio.run(measure(chosen.idle))
    print(f"{platform.processor() or platform.machine()}, Linux {platform.release()}")
    for name, value in results.items():
        print(f"{name:26} {value:10.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
