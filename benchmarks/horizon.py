"""The ledger over ten million random events: time per event, fragmentation, bytes moved, resident memory.

    python -m benchmarks.horizon --events 10000000 --out benchmarks/results/horizon.json

An event is one call that changes the ledger (``extend``, ``append``, ``free``, ``finish``, ``rebind``, ``alloc``,
``clear``). They come from a small serving world without models: requests of up to 24 pages of prompt in chunks of
8, shared prefixes, least recently used eviction, aborts, retraction where logical pages run out, ownerless pages,
flushes. Every hundredth of the run is a block; CPU time includes the world, whose work per event does not grow.

* fragmentation: free units that are not in a whole free superblock, as a share of the arena, over all arenas and
  looked at after every 16th event, before anything is compacted for the next birth;
* bytes moved per born page: units moved by compaction / units of the superblocks born, 1 = one superblock.

``--digest`` prints the SHA-256 of every answer and command instead: two runs must print the same, whatever the
hash seed of the process or its clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.ledger import _cpu
from benchmarks.result import versions, write
from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import UNITS_PER_SUPERBLOCK, PageShape, geometry_for_pages, groups_from_finals
from sglang_pmkvq.ledger import Ledger, PolicyConfig

P = 16
PAGES = 4096
REQUESTS = 16
CHUNK = 8
PROMPT = 24
LOOSE = 2
BLOCKS = 100
LOOK_EVERY = 16
OPS = ("decode", "admit", "finish", "abort", "evict", "rebind", "loose", "flush")
WEIGHTS = (0.87, 0.04, 0.03, 0.01, 0.012, 0.02, 0.01798, 0.00002)
EMPTY = np.empty(0, np.int64)


@dataclass(eq=False)
class Chain:
    """Cached pages of a finished request, and how many running requests use some of them."""

    pages: list[int]
    locks: int = 0


@dataclass(eq=False)
class Running:
    slot: int
    length: int
    prompt: int
    chain: Chain | None
    shared: int
    pages: list[int]


class Traffic:
    """Random events over a ledger, in O(1) per event.

    Attributes:
        events: so far. born: pages so far. retractions: requests dropped because logical pages ran out.
    """

    def __init__(
        self,
        seed: int,
        digest: bool = False,
        groups: Sequence[tuple[int, int]] = ((8, 8), (4, 2)),
        pages: int = PAGES,
    ) -> None:
        shape = PageShape(page_size=P, num_kv_heads=1, head_dim=128, group_size=128)
        hard = REQUESTS + CHUNK + 2 * LOOSE
        geometry = geometry_for_pages(shape, groups_from_finals(list(groups)), pages, hard)
        self.ledger = Ledger(geometry, PolicyConfig(), REQUESTS, self._free_cached)
        self._rng = np.random.default_rng(seed)
        self._hash = hashlib.sha256() if digest else None
        self.events = self.born = self.retractions = self.forwards = 0
        self.clear()

    def clear(self) -> None:
        self.running: list[Running] = []
        self.slots = list(range(REQUESTS, -1, -1))
        # In order of the last use; a chain that a running request uses stays.
        self.chains: OrderedDict[int, Chain] = OrderedDict()
        self.recent: list[Chain] = []
        self.serial = 0
        self.loose: list[int] = []
        self.loose_forward = -1

    def run(self, events: int) -> None:
        """``events`` more, or a few beyond: a prompt of several chunks is not cut."""
        end = self.events + events
        while self.events < end:
            ops = self._rng.choice(len(OPS), 1024, p=np.array(WEIGHTS) / sum(WEIGHTS)).tolist()
            numbers = self._rng.integers(0, 1 << 20, (1024, 2)).tolist()
            for op, (a, b) in zip(ops, numbers, strict=True):
                getattr(self, "_" + OPS[op])(a, b)
                if self.events >= end:
                    break

    def fragmentation(self) -> float:
        """Free units outside whole free superblocks, as a share of all units."""
        arenas = self.ledger.arenas
        loose = sum(a.free_units - UNITS_PER_SUPERBLOCK * a.count[-1] for a in arenas)
        return loose / sum(a.units for a in arenas)

    def digest(self) -> str:
        assert self._hash is not None
        return self._hash.hexdigest()

    # ------------------------------------------------------------ events

    def _decode(self, a: int, b: int) -> None:
        rows = self.running
        if not rows:
            self._admit(a, b)
            return
        need = sum(r.length % P == 0 for r in rows)
        while not self._room(need):
            self.retractions += 1
            self._drop(rows[-1])
            need = sum(r.length % P == 0 for r in rows)
        if not rows:
            return
        new = self.ledger.append(
            np.array([r.slot for r in rows], np.int64), np.array([r.length + 1 for r in rows], np.int64)
        )
        assert new is not None
        fresh = iter(new.tolist())
        for r in rows:
            if r.length % P == 0:
                r.pages.append(next(fresh))
            r.length += 1
        self._forward(new)

    def _admit(self, a: int, b: int) -> None:
        if not self.slots:
            self._finish(a, b)
            return
        prompt = 1 + b % (PROMPT * P)
        chain, shared = None, 0
        if a % 2 and self.recent:
            chain = self.recent[a // 2 % len(self.recent)]
            shared = min(len(chain.pages), (prompt - 1) // P)
        if not shared:
            chain = None
        request = Running(self.slots.pop(), shared * P, prompt, chain, shared, [])
        if chain is not None:
            chain.locks += 1
        self.running.append(request)
        prefix = [] if chain is None else chain.pages[:shared]
        while request.length < prompt:
            after = min(prompt, request.length + CHUNK * P)
            need = -(-after // P) - -(-request.length // P)
            if not self._room(need):
                self.retractions += 1
                self._drop(request)
                return
            listed = np.array(prefix + request.pages, np.int64)
            new = self.ledger.extend([request.slot], [listed], [request.length], [after])
            assert new is not None
            request.pages.extend(new.tolist())
            request.length = after
            self._forward(new)

    def _finish(self, a: int, b: int) -> None:
        if not self.running:
            return
        request = self.running[a % len(self.running)]
        full = request.length // P - request.shared
        kept, tail = request.pages[:full], request.pages[full:]
        self._end(request)
        if tail:
            self.ledger.free(np.array(tail, np.int64))
        if kept:
            chain = Chain(kept)
            self.serial += 1
            self.chains[self.serial] = chain
            self.recent = [*self.recent[-15:], chain]
        self.events += 2

    def _abort(self, a: int, b: int) -> None:
        if self.running:
            self._drop(self.running[a % len(self.running)])

    def _evict(self, a: int, b: int) -> None:
        self._free_cached(1 + a % 64)

    def _free_cached(self, pages: int) -> int:
        """Free up to ``pages`` of the longest unused chains, last pages first; how many were."""
        freed: list[int] = []
        for key in list(self.chains)[: 2 * REQUESTS + pages]:
            chain = self.chains[key]
            if chain.locks:
                self.chains.move_to_end(key)
                continue
            while chain.pages and len(freed) < pages:
                freed.append(chain.pages.pop())
            if not chain.pages:
                del self.chains[key]
            if len(freed) == pages:
                break
        if freed:
            self.ledger.free(np.array(freed, np.int64))
            self.events += 1
        return len(freed)

    def _rebind(self, a: int, b: int) -> None:
        if self.running:
            request = self.running[a % len(self.running)]
            self.ledger.rebind(request.slot, self.ledger.pages_of(request.slot))
            self.events += 1

    def _loose(self, a: int, b: int) -> None:
        if self.loose:
            self.ledger.free(np.array(self.loose, np.int64))
            self.loose = []
        elif self.loose_forward != self.forwards and self._room(LOOSE):
            pages = self.ledger.alloc(LOOSE)
            assert pages is not None
            self.loose_forward = self.forwards
            self.loose = pages.tolist()
            self.born += LOOSE
            self._note(pages)
        self.events += 1

    def _flush(self, a: int, b: int) -> None:
        for request in list(self.running):
            self._drop(request)
        self.ledger.clear()
        self.clear()
        self.events += 1

    # ------------------------------------------------------------ inside

    def _room(self, pages: int) -> bool:
        """True once that many logical pages are free, evicting if they are not."""
        short = pages - self.ledger.free_page_count
        return short <= 0 or self._free_cached(short) >= short

    def _end(self, request: Running) -> None:
        self.ledger.finish(request.slot)
        self.running.remove(request)
        self.slots.append(request.slot)
        if request.chain is not None:
            request.chain.locks -= 1

    def _drop(self, request: Running) -> None:
        self._end(request)
        if request.pages:
            self.ledger.free(np.array(request.pages, np.int64))
        self.events += 2

    def _forward(self, new: np.ndarray) -> None:
        self.events += 1
        self.forwards += 1
        self.born += len(new)
        batch = self.ledger.drain()
        if self._hash is not None:
            self._note(new, batch)

    def _note(self, new: np.ndarray, batch: CommandBatch | None = None) -> None:
        """Put an answer and its commands into the digest."""
        if self._hash is None:
            return
        self._hash.update(new.tobytes())
        for number, wave in enumerate(batch.waves if batch else ()):
            for c in wave:
                self._hash.update(bytes([number & 255, c.group, c.arena]))
                for part in (c.page, c.src_unit, c.dst_unit, c.src_tier, c.dst_tier):
                    self._hash.update(part.tobytes())
        for t in batch.table if batch else ():
            self._hash.update(bytes([t.group, t.arena]) + t.page.tobytes() + t.entry.tobytes())


def measure(events: int, seed: int = 0, blocks: int = BLOCKS) -> dict[str, Any]:
    """Run and measure; the books are checked after every block.

    Raises:
        IntegrityError: they do not agree.
    """
    traffic = Traffic(seed)
    process = psutil.Process()
    rows = []
    for _ in range(blocks):
        before = traffic.events
        start = time.process_time()
        worst = total = looks = 0.0
        while traffic.events - before < events // blocks:
            traffic.run(LOOK_EVERY)
            share = traffic.fragmentation()
            worst, total, looks = max(worst, share), total + share, looks + 1
        seconds = time.process_time() - start
        traffic.ledger.check_integrity()
        rows.append(
            {
                "events": traffic.events,
                "us_per_event": round(1e6 * seconds / (traffic.events - before), 2),
                "fragmentation_max": worst,
                "fragmentation_mean": total / looks,
                "moved_per_born": _moved(traffic),
                "rss_mib": round(process.memory_info().rss / 2**20, 1),
                "queued_keys": sum(len(q) for g in traffic.ledger.groups for qs in g.queues for q in qs),
            }
        )
    return {
        "events": traffic.events,
        "seed": seed,
        "pages": PAGES,
        "requests": REQUESTS,
        "groups": [g.name() for g in traffic.ledger.geometry.groups],
        "born": traffic.born,
        "retractions": traffic.retractions,
        "shrinks": sum(sum(map(sum, g.shrinks)) for g in traffic.ledger.groups),
        "moves": sum(a.moves for a in traffic.ledger.arenas),
        "moved_per_born": _moved(traffic),
        "fragmentation_end": traffic.fragmentation(),
        "fragmentation_max": max(r["fragmentation_max"] for r in rows),
        "fragmentation_mean": sum(r["fragmentation_mean"] for r in rows) / len(rows),
        "us_first_tenth": _tenth(rows, 0),
        "us_last_tenth": _tenth(rows, 9),
        "ticks": traffic.ledger.tick,
        "blocks": rows,
    }


def _moved(traffic: Traffic) -> float:
    """Units moved per unit of a born superblock, in the arena that moved most."""
    return max(a.moved_units for a in traffic.ledger.arenas) / (UNITS_PER_SUPERBLOCK * max(1, traffic.born))


def _tenth(rows: Sequence[dict[str, Any]], index: int) -> float:
    """Median time per event over a tenth of the blocks."""
    size = max(1, len(rows) // 10)
    part = rows[index * size : (index + 1) * size] or rows[-size:]
    return float(np.median([r["us_per_event"] for r in part]))


def draw(result: dict[str, Any], path: Path) -> None:
    """Three panels over events: time, fragmentation, moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["blocks"]
    x = [r["events"] / 1e6 for r in rows]
    figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    axes[0].plot(x, [r["us_per_event"] for r in rows])
    axes[0].set_ylabel("CPU µs per event")
    axes[1].plot(x, [100 * r["fragmentation_max"] for r in rows], label="highest")
    axes[1].plot(x, [100 * r["fragmentation_mean"] for r in rows], label="mean")
    axes[1].axhline(5, color="black", linewidth=0.6)
    axes[1].set_ylabel("fragmentation, % of arena")
    axes[1].legend()
    axes[2].plot(x, [r["moved_per_born"] for r in rows])
    axes[2].set_ylabel("superblocks moved per born page")
    axes[2].set_xlabel("million events")
    for axis in axes:
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digest", action="store_true", help="print the SHA-256 of all commands, measure nothing")
    parser.add_argument("--out", type=Path, help="result file; the plot goes beside it as .png")
    options = parser.parse_args(argv)
    if options.digest:
        traffic = Traffic(options.seed, digest=True)
        traffic.run(options.events)
        print(traffic.digest())
        return 0
    result = {
        "command": " ".join(["python -m benchmarks.horizon", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "cpu": _cpu(),
        **measure(options.events, options.seed),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "blocks"}, indent=1))
    write(result, options.out)
    if options.out:
        draw(result, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
