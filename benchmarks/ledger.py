"""Host time of the ledger per decode step, with shrinking active, over pool sizes.

    python -m benchmarks.ledger --out benchmarks/results/ledger.json

The state: three quarters of the logical pages are mapped, half of them by 256 running requests that
start 16 pages per step, the rest cached pages of finished requests, of which the 16 least recently used
are freed before each step. So every step shrinks. In the long run a page shrinks once per step of each
group during its life, so with 16 pages born in a decode step there are 16 page shrinks for a group with
final 8 bits, 32 for 4 bits, 48 for k4v2 and none for 16 bits; the result states what really happened.

Timed is ``append`` + ``drain``, by the wall clock and, for busy machines, in CPU time of the thread;
``free`` is stated apart; prefills that replace finished requests are not timed. There is no result if
the books do not agree at the end, or if a step shrank fewer pages than were born.
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
from pathlib import Path

import numpy as np

from benchmarks.result import write
from sglang_pmkvq.formats import PageShape, geometry_for_pages, groups_from_finals
from sglang_pmkvq.ledger import Ledger, PolicyConfig

REQUESTS = 256
BORN = 16
PAGE = 16
CHUNK_PAGES = 64
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
        none = np.empty(0, np.int64)
        mapped = pages * 3 // 4
        while len(self.cached) < mapped // 2:
            new = self.ledger.extend([0], [none], [0], [CHUNK_PAGES * PAGE])
            assert new is not None
            self.ledger.finish(0)
            self.ledger.drain()
            self.cached.extend(new.tolist())
        # Every 16th running request starts a page in a given step.
        each = (mapped - len(self.cached)) // REQUESTS - 1
        for slot in range(REQUESTS):
            self._prefill(slot, max(0, each) * PAGE + 1 + slot % PAGE)

    def _prefill(self, slot: int, length: int) -> None:
        held = np.empty(0, np.int64)
        done = 0
        while done < length:
            step = min(CHUNK_PAGES * PAGE, length - done)
            self._free_for(-(-step // PAGE))
            new = self.ledger.extend([slot], [held], [done], [done + step])
            assert new is not None
            self.ledger.drain()
            held = np.concatenate([held, new])
            done += step
        self.lens[slot] = length

    def _free_for(self, pages: int) -> None:
        while self.ledger.free_page_count < pages:
            self.ledger.free(np.array([self.cached.popleft() for _ in range(BORN)]))

    def _grow(self) -> int:
        self.lens += 1
        new = self.ledger.append(self.slots, self.lens)
        assert new is not None
        return len(new)

    def step(self) -> tuple[float, float, float, int, int]:
        """Seconds of free, wall and CPU seconds of append + drain, pages born, page shrinks."""
        while len(self.cached) < 4 * BORN:
            slot = int(self.lens.argmax())
            self.cached.extend(self.ledger.pages_of(slot).tolist())
            self.ledger.finish(slot)
            # The same place in a page, so that 16 requests go on to start a page in every step.
            self._prefill(slot, PAGE + int(self.lens[slot]) % PAGE)
        victims = np.array([self.cached.popleft() for _ in range(BORN)])
        before = self._shrinks()
        start = time.perf_counter()
        self.ledger.free(victims)
        freed = time.perf_counter()
        cpu = time.thread_time()
        middle = time.perf_counter()
        born = self._grow()
        self.ledger.drain()
        end = time.perf_counter()
        cpu = time.thread_time() - cpu
        return freed - start, end - middle, cpu, born, self._shrinks() - before

    def _shrinks(self) -> int:
        return sum(sum(map(sum, group.shrinks)) for group in self.ledger.groups)


def measure(groups: str, tokens: int, steps: int) -> dict[str, object]:
    """Percentiles in microseconds of one pool size, and the work that each step did."""
    bench = Bench(groups, tokens)
    for _ in range(100):
        bench.step()
    gc.collect()
    rows = [bench.step() for _ in range(steps)]
    bench.ledger.check_integrity()
    free, decode, cpu = (np.array([row[i] for row in rows]) * 1e6 for i in (0, 1, 2))
    born, shrinks = (np.array([row[i] for row in rows]) for i in (3, 4))
    if (born != BORN).any() or shrinks.min() < BORN:
        raise SystemExit(f"{groups}, {tokens} tokens: born {set(born.tolist())}, fewest shrinks {shrinks.min()}")
    stats = bench.ledger.stats()
    return {
        "groups": groups,
        "logical_tokens": tokens,
        "requests": REQUESTS,
        "steps": steps,
        "born_per_step": BORN,
        "freed_per_step": BORN,
        "shrinks_per_step_mean": round(float(shrinks.mean()), 1),
        "shrinks_per_step_min": int(shrinks.min()),
        "moves_total": stats.moves,
        "effective_bits": round(stats.effective_bits, 3),
        "append_drain_us": {f"p{q}": round(float(np.percentile(decode, q)), 1) for q in (20, 50, 80, 99)},
        "append_drain_cpu_us": {f"p{q}": round(float(np.percentile(cpu, q)), 1) for q in (20, 50, 80, 99)},
        "free_us": {f"p{q}": round(float(np.percentile(free, q)), 1) for q in (50, 99)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22])
    parser.add_argument("--groups", nargs="+", default=["8+16", "8+4", "8+k4v2"], choices=sorted(LAYERS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # What an empty Python loop costs per turn: says how loaded or slow the machine is (quiet: about 13).
    loop = round(min(timeit.repeat("for i in range(1000): pass", number=200, repeat=5)) * 1e9 / 200_000, 1)
    rows = []
    for groups in args.groups:
        for tokens in args.tokens:
            rows.append(measure(groups, tokens, args.steps))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        result = {
            "command": f"python -m benchmarks.ledger --steps {args.steps} --groups {' '.join(args.groups)}"
            f" --tokens {' '.join(map(str, args.tokens))}",
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "machine": platform.machine(),
            "cpu": _cpu(),
            "load_average_at_end": os.getloadavg()[0],
            "empty_loop_ns": loop,
            "rows": rows,
        }
        write(result, args.out)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
