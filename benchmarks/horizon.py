"""The ledger over ten million random events: time per event, fragmentation, bytes moved, resident memory.

    python -m benchmarks.ledger --horizon 10000000 --out benchmarks/results/horizon.json

An event is one call that changes the ledger (``extend``, ``append``, ``free``, ``finish``, ``rebind``, ``alloc``,
``clear``). They come from a small serving world without models: requests of up to 24 pages of prompt in chunks of
8, shared prefixes, least recently used eviction, aborts, retraction where logical pages run out, ownerless pages,
flushes. Every hundredth of the run is a block; CPU time includes the world, whose work per event does not grow.

* fragmentation: free units that are not in a whole free superblock, as a share of the arena, over all arenas and
  looked at after every 16th event, before anything is compacted for the next birth;
* bytes moved per born page: units moved by compaction / units of the superblocks born, 1 = one superblock.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.figures import new_figure
from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import UNITS_PER_SUPERBLOCK, PageShape, geometry_for_pages, groups_from_finals
from sglang_pmkvq.ledger import Ledger, PolicyConfig

P, PAGES = 16, 4096  # tokens per page, logical pages
REQUESTS, CHUNK, PROMPT, LOOSE = 16, 8, 24, 2  # at a time; pages of a chunk, of the longest prompt, without an owner
BLOCKS, LOOK_EVERY = 100, 16
WEIGHTS = {
    "decode": 0.87, "admit": 0.04, "finish": 0.03, "abort": 0.01, "evict": 0.012, "rebind": 0.02, "loose": 0.01798,
    "flush": 0.00002,
}  # fmt: skip
SHARES = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())


@dataclass(eq=False)
class Chain:
    """Cached pages of a finished request, and how many running requests use some of them."""

    pages: list[int]
    locks: int = 0


@dataclass(eq=False)
class Running:
    """A request: its first ``shared`` pages are those of a chain, ``pages`` are its own."""

    slot: int
    length: int
    chain: Chain
    shared: int
    pages: list[int] = field(default_factory=list)


class Traffic:
    """Random events over a ledger, in O(1) per event.

    Attributes:
        events: so far. born: pages so far. retractions: requests dropped because logical pages ran out.
    """

    def __init__(self, seed: int, groups: Sequence[tuple[int, int]] = ((8, 8), (4, 2)), pages: int = PAGES) -> None:
        shape = PageShape(page_size=P, num_kv_heads=1, head_dim=128, group_size=128)
        geometry = geometry_for_pages(shape, groups_from_finals(list(groups)), pages, REQUESTS + CHUNK + 2 * LOOSE)
        self.ledger = Ledger(geometry, PolicyConfig(), REQUESTS, self._free_cached)
        self._rng = np.random.default_rng(seed)
        self.events = self.born = self.retractions = self.forwards = 0
        self.clear()

    def clear(self) -> None:
        self.running: list[Running] = []
        self.slots = list(range(REQUESTS, -1, -1))
        # In order of the last use; a chain that a running request uses stays.
        self.chains: OrderedDict[Chain, None] = OrderedDict()
        self.recent: list[Chain] = []
        self.loose: list[int] = []
        self.loose_forward = -1

    def run(self, events: int) -> None:
        """``events`` more, or a few beyond: a prompt of several chunks is not cut."""
        end = self.events + events
        while self.events < end:
            ops = self._rng.choice(list(WEIGHTS), 1024, p=SHARES).tolist()
            numbers = self._rng.integers(0, 1 << 20, (1024, 2)).tolist()
            for op, (a, b) in zip(ops, numbers, strict=True):
                getattr(self, "_" + op)(a, b)
                if self.events >= end:
                    break

    def fragmentation(self) -> float:
        """Free units outside whole free superblocks, as a share of all units."""
        arenas = self.ledger.arenas
        loose = sum(a.free_units - UNITS_PER_SUPERBLOCK * a.count[-1] for a in arenas)
        return loose / sum(a.units for a in arenas)

    def moved_per_born(self) -> float:
        """Units moved per unit of a born superblock, in the arena that moved most."""
        return max(a.moved_units for a in self.ledger.arenas) / (UNITS_PER_SUPERBLOCK * max(1, self.born))

    # ------------------------------------------------------------ events

    def _decode(self, a: int, b: int) -> None:
        rows = self.running
        if not rows:
            self._admit(a, b)
            return
        while not self._room(sum(r.length % P == 0 for r in rows)):
            self._retract(rows[-1])
        if not rows:
            return
        slots, lengths = (np.array(x, np.int64) for x in ([r.slot for r in rows], [r.length + 1 for r in rows]))
        new = self.ledger.append(slots, lengths)
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
        chain = self.recent[a // 2 % len(self.recent)] if a % 2 and self.recent else Chain([])
        prefix = chain.pages[: (prompt - 1) // P]
        request = Running(self.slots.pop(), len(prefix) * P, chain, len(prefix))
        chain.locks += bool(prefix)
        self.running.append(request)
        while request.length < prompt:
            after = min(prompt, request.length + CHUNK * P)
            if not self._room(-(-after // P) - -(-request.length // P)):
                self._retract(request)
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
        self._end(request)
        self._free(request.pages[full:])
        if full:
            chain = Chain(request.pages[:full])
            self.chains[chain] = None
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
        for chain in list(self.chains)[: 2 * REQUESTS + pages]:
            if chain.locks:
                self.chains.move_to_end(chain)
                continue
            while chain.pages and len(freed) < pages:
                freed.append(chain.pages.pop())
            if not chain.pages:
                del self.chains[chain]
            if len(freed) == pages:
                break
        self.events += bool(freed)
        return self._free(freed)

    def _rebind(self, a: int, b: int) -> None:
        if self.running:
            request = self.running[a % len(self.running)]
            self.ledger.rebind(request.slot, self.ledger.pages_of(request.slot))
            self.events += 1

    def _loose(self, a: int, b: int) -> None:
        if self.loose:
            self._free(self.loose)
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

    def _free(self, pages: list[int]) -> int:
        """Give them back; how many they were."""
        if pages:
            self.ledger.free(np.array(pages, np.int64))
        return len(pages)

    def _end(self, request: Running) -> None:
        self.ledger.finish(request.slot)
        self.running.remove(request)
        self.slots.append(request.slot)
        request.chain.locks -= bool(request.shared)

    def _drop(self, request: Running) -> None:
        self._end(request)
        self._free(request.pages)
        self.events += 2

    def _retract(self, request: Running) -> None:
        self.retractions += 1
        self._drop(request)

    def _forward(self, new: np.ndarray) -> None:
        self.events += 1
        self.forwards += 1
        self.born += len(new)
        self._note(new, self.ledger.drain())

    def _note(self, new: np.ndarray, batch: CommandBatch | None = None) -> None:
        """Told of every answer and its commands, for tests."""


def measure(events: int, seed: int = 0, blocks: int = BLOCKS) -> dict[str, Any]:
    """Run and measure; the books are checked after every block.

    Raises:
        IntegrityError: they do not agree.
    """
    traffic, process, rows = Traffic(seed), psutil.Process(), []
    ledger = traffic.ledger
    for _ in range(blocks):
        before, start, shares = traffic.events, time.process_time(), []
        while traffic.events - before < events // blocks:
            traffic.run(LOOK_EVERY)
            shares.append(traffic.fragmentation())
        seconds = time.process_time() - start
        ledger.check_integrity()
        rows.append({
            "events": traffic.events,
            "us_per_event": round(1e6 * seconds / (traffic.events - before), 2),
            "fragmentation_max": max(shares),
            "fragmentation_mean": sum(shares) / len(shares),
            "moved_per_born": traffic.moved_per_born(),
            "rss_mib": round(process.memory_info().rss / 2**20, 1),
        })  # fmt: skip
    times, tenth = [row["us_per_event"] for row in rows], max(1, blocks // 10)
    return {
        "events": traffic.events,
        "seed": seed,
        "pages": PAGES,
        "requests": REQUESTS,
        "groups": [g.name() for g in ledger.geometry.groups],
        "born": traffic.born,
        "retractions": traffic.retractions,
        "shrinks": sum(sum(map(sum, g.shrinks)) for g in ledger.groups),
        "moves": sum(a.moves for a in ledger.arenas),
        "moved_per_born": traffic.moved_per_born(),
        "fragmentation_end": traffic.fragmentation(),
        "fragmentation_max": max(r["fragmentation_max"] for r in rows),
        "fragmentation_mean": sum(r["fragmentation_mean"] for r in rows) / len(rows),
        "us_first_tenth": float(np.median(times[:tenth])),
        "us_last_tenth": float(np.median(times[-tenth:])),
        "ticks": ledger.tick,
        "blocks": rows,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Three panels over events: time, fragmentation, moved."""
    figure, axes = new_figure(13, 4, 3)
    panels = (
        ("CPU µs per event", 1, ("us_per_event",)),
        ("fragmentation, % of arena", 100, ("fragmentation_max", "fragmentation_mean")),
        ("superblocks moved per born page", 1, ("moved_per_born",)),
    )
    million = [r["events"] / 1e6 for r in result["blocks"]]
    for axis, (label, factor, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(million, [factor * r[name] for r in result["blocks"]], label=name.rpartition("_")[2])
        axis.set(xlabel="million events", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[1].axhline(5, color="black", linewidth=0.6, label="5 %")
    axes[1].legend()
    figure.savefig(path)
