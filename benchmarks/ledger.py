"""Host time of the ledger per decode step, with shrinking active, over pool sizes.

    python -m benchmarks.ledger --out benchmarks/results/ledger.json
    python -m benchmarks.ledger --horizon 10000000 --out benchmarks/results/horizon.json    random events: `horizon.py`

The state: three quarters of the logical pages are mapped, half of them by 256 running requests that start 16 pages per
step, the rest cached pages of finished requests, of which the 16 least recently used are freed before each step. So
every step shrinks. In the long run a page shrinks once per step of each group during its life, so with 16 pages born in
a decode step there are 16 page shrinks for a group with final 8 bits, 32 for 4 bits, 48 for k4v2 and none for 16 bits;
the result states what really happened.

Timed is ``append`` + ``drain``, by the wall clock and, for busy machines, in CPU time of the thread; ``free`` is stated
apart; prefills that replace finished requests are not timed. There is no result if the books do not agree at the end,
or if a step shrank fewer pages than were born.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import timeit
from collections import deque
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import horizon
from benchmarks.harness.results import versions, write
from sglang_pmkvq.formats import PageShape, geometry_for_pages, groups_from_finals
from sglang_pmkvq.ledger import Ledger, PolicyConfig

REQUESTS, BORN, PAGE, CHUNK_PAGES = 256, 16, 16, 64
LAYERS = {
    "8+4": [(8, 8)] * 8 + [(4, 4)] * 24,
    "8+k4v2": [(8, 8)] * 8 + [(4, 2)] * 24,
    "8+16": [(8, 8)] * 24 + [(16, 16)] * 8,
}


class Bench:
    """A ledger with 256 requests in steady decode."""

    def __init__(self, groups: str, tokens: int) -> None:
        pages = tokens // PAGE
        shape = PageShape(page_size=PAGE, num_kv_heads=8, head_dim=128, group_size=128)
        geometry = geometry_for_pages(shape, groups_from_finals(LAYERS[groups]), pages, REQUESTS + CHUNK_PAGES)
        self.ledger = Ledger(geometry, PolicyConfig(), REQUESTS)
        self.cached: deque[int] = deque()
        self.slots = np.arange(REQUESTS)
        self.lens = np.zeros(REQUESTS, np.int64)
        mapped = pages * 3 // 4
        while len(self.cached) < mapped // 2:
            self._prefill(0, CHUNK_PAGES * PAGE)
            self._finish(0)
        # Every 16th running request starts a page in a given step.
        each = (mapped - len(self.cached)) // REQUESTS - 1
        for slot in range(REQUESTS):
            self._prefill(slot, max(0, each) * PAGE + 1 + slot % PAGE)

    def _prefill(self, slot: int, length: int) -> None:
        held = np.empty(0, np.int64)
        done = 0
        while done < length:
            step = min(CHUNK_PAGES * PAGE, length - done)
            while self.ledger.free_page_count < -(-step // PAGE):
                self.ledger.free(self._oldest())
            new = self.ledger.extend([slot], [held], [done], [done + step])
            assert new is not None
            self.ledger.drain()
            held = np.concatenate([held, new])
            done += step
        self.lens[slot] = length

    def _finish(self, slot: int) -> None:
        self.cached.extend(self.ledger.pages_of(slot).tolist())
        self.ledger.finish(slot)

    def _oldest(self) -> np.ndarray:
        return np.array([self.cached.popleft() for _ in range(BORN)])

    def step(self) -> dict[str, float]:
        """Microseconds of ``free``, of ``append`` + ``drain`` by the wall clock and in CPU time, and what was done."""
        while len(self.cached) < 4 * BORN:
            slot = int(self.lens.argmax())
            self._finish(slot)
            # The same place in a page, so that 16 requests go on to start a page in every step.
            self._prefill(slot, PAGE + int(self.lens[slot]) % PAGE)
        victims, before = self._oldest(), self._shrinks()
        start = time.perf_counter()
        self.ledger.free(victims)
        freed = time.perf_counter()
        cpu_start, middle = time.thread_time(), time.perf_counter()
        self.lens += 1
        new = self.ledger.append(self.slots, self.lens)
        assert new is not None
        self.ledger.drain()
        end, cpu_end = time.perf_counter(), time.thread_time()
        times = {"free": freed - start, "append_drain": end - middle, "append_drain_cpu": cpu_end - cpu_start}
        return {n: 1e6 * t for n, t in times.items()} | {"born": len(new), "shrinks": self._shrinks() - before}

    def _shrinks(self) -> int:
        return sum(sum(map(sum, group.shrinks)) for group in self.ledger.groups)


def measure(groups: str, tokens: int, steps: int) -> dict[str, Any]:
    """Percentiles in microseconds of one pool size, and the work that each step did."""
    bench = Bench(groups, tokens)
    for _ in range(100):
        bench.step()
    gc.collect()
    rows = [bench.step() for _ in range(steps)]
    bench.ledger.check_integrity()
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    born, shrinks = columns["born"], columns["shrinks"]
    if (born != BORN).any() or shrinks.min() < BORN:
        raise SystemExit(f"{groups}, {tokens} tokens: born {set(born.tolist())}, fewest shrinks {shrinks.min()}")

    def percentiles(name: str, *of: int) -> dict[str, float]:
        return {f"p{q}": round(float(np.percentile(columns[name], q)), 1) for q in of}

    stats = bench.ledger.stats()
    return {
        "groups": groups,
        "logical_tokens": tokens,
        "steps": steps,
        "shrinks_per_step_mean": round(float(shrinks.mean()), 1),
        "shrinks_per_step_min": int(shrinks.min()),
        "moves_total": stats.moves,
        "effective_bits": round(stats.effective_bits, 3),
        "append_drain_us": percentiles("append_drain", 20, 50, 80, 99),
        "append_drain_cpu_us": percentiles("append_drain_cpu", 20, 50, 80, 99),
        "free_us": percentiles("free", 50, 99),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22])
    parser.add_argument("--groups", nargs="+", default=["8+16", "8+4", "8+k4v2"], choices=sorted(LAYERS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--horizon", type=int, metavar="EVENTS", help="instead: so many random events")
    parser.add_argument("--seed", type=int, default=0, help="of the random events")
    parser.add_argument("--out", type=Path, help="result file; the plot of the random events goes beside it as .png")
    options = parser.parse_args(argv)
    head = {
        "command": " ".join(["python -m benchmarks.ledger", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions() | {"numpy": np.__version__},
        "cpu": cpu(),
    }
    if options.horizon:
        result = head | horizon.measure(options.horizon, options.seed)
        print(json.dumps({k: v for k, v in result.items() if k != "blocks"}, indent=1))
        if options.out:
            horizon.draw(result, options.out.with_suffix(".png"))
    else:
        # What an empty Python loop costs per turn: says how loaded or slow the machine is (quiet: about 13).
        loop = round(min(timeit.repeat("for i in range(1000): pass", number=200, repeat=5)) * 1e9 / 200_000, 1)
        rows = []
        for groups, tokens in product(options.groups, options.tokens):
            rows.append(measure(groups, tokens, options.steps))
            print(json.dumps(rows[-1]), flush=True)
        result = head | {"load_average_at_end": os.getloadavg()[0], "empty_loop_ns": loop, "rows": rows}
    write(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
