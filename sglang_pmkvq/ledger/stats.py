"""Figures of the ledger: bytes and pages per tier, effective bits, counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_pmkvq.formats import (
    SIDES,
    TIERS,
    PoolGeometry,
    page_bytes,
    page_elements,
    page_side_bytes,
)
from sglang_pmkvq.ledger.group import Group
from sglang_pmkvq.ledger.pages import HARD, SOFT, PageBook
from sglang_pmkvq.ledger.policy import Shrinker
from sglang_pmkvq.ledger.requests import RequestTable


@dataclass(frozen=True)
class LedgerStats:
    """One look at the ledger; page 0 does not count.

    Attributes:
        pages: page equivalents per tier: a page at (K tier, V tier) in a group of l of L layers
            counts l / 2L at each of the two; the values sum to ``mapped_pages``.
        block_bytes: block bytes of mapped pages per tier, over all groups and arenas.
        side_bytes: (zero, range) bytes of sides below 16 bits.
        used_bytes: all of ``block_bytes`` and ``side_bytes``. used_bytes_avg, used_bytes_peak: its mean and maximum
            over the forwards that saw pages.
        mapped_pages: logical pages that somebody holds.
        hard_pages, soft_pages: protected pages.
        shrinks: shrinks so far by (from tier, to tier). One page that shrinks in one group counts
            once for each side (K, V) whose tier changes.
        shrunk_bytes: block bytes that those shrinks freed, same keys.
        moves: blocks moved to make room in one piece.
        evict_requests, evicted_pages: early evictions that freed pages, and the pages they freed.
        effective_bits: 8 · (block + side bytes) / elements of the mapped pages; 16 if there are none.
        effective_bits_avg: the same over all ticks so far, weighted by mapped pages.
        effective_bits_peak: highest of all ticks so far.
        tick: forwards so far (calls of ``extend`` and ``append``).
        running_requests: requests that list pages now.
    """

    pages: dict[int, float]
    block_bytes: dict[int, int]
    side_bytes: int
    used_bytes: int
    used_bytes_avg: float
    used_bytes_peak: int
    mapped_pages: int
    hard_pages: int
    soft_pages: int
    shrinks: dict[tuple[int, int], int]
    shrunk_bytes: dict[tuple[int, int], int]
    moves: int
    evict_requests: int
    evicted_pages: int
    effective_bits: float
    effective_bits_avg: float
    effective_bits_peak: float
    tick: int
    running_requests: int


class BitMeter:
    """Bytes that the mapped pages stand for, sampled once per forward; all sums exact integers."""

    def __init__(self, geometry: PoolGeometry, groups: Sequence[Group]) -> None:
        shape = geometry.shape
        self._groups = groups
        self._costs = [[page_bytes(shape, group.spec, s) for s in range(group.final + 1)] for group in groups]
        self._elements = page_elements(shape, sum(len(g.spec.layers) for g in groups))
        self._bytes_sum = self._pages_sum = 0
        self._peak_bytes, self._peak_pages = 0, 1
        self._forwards = 0
        self.most_bytes = 0

    def bytes_now(self) -> int:
        total = 0
        for group, costs in zip(self._groups, self._costs, strict=True):
            for pages, cost in zip(group.step_pages, costs, strict=True):
                total += pages * cost
        return total

    def running_bytes(self, requests: RequestTable) -> int:
        """Bytes that a decode step of all running requests reads, a shared page once for each; O(their pages)."""
        live = [requests.valid_pages(slot) for slot in (requests.tokens >= 0).nonzero()[0].tolist()]
        if not live:
            return 0
        pages = np.concatenate(live)
        return sum(
            int(np.array(costs, np.int64)[group.step_np[pages]].sum())
            for group, costs in zip(self._groups, self._costs, strict=True)
        )

    def sample(self, mapped: int) -> None:
        """Count the coming forward, which sees ``mapped`` pages."""
        if not mapped:
            return
        now = self.bytes_now()
        self._bytes_sum += now
        self._pages_sum += mapped
        self._forwards += 1
        self.most_bytes = max(self.most_bytes, now)
        if now * self._peak_pages > self._peak_bytes * mapped:
            self._peak_bytes, self._peak_pages = now, mapped

    def bits(self, size: int, pages: int) -> float:
        """Bits per element of ``size`` bytes in ``pages`` pages; 16 for none, as a birth would be."""
        return 8 * size / (pages * self._elements) if pages else 16.0

    @property
    def mean_bytes(self) -> float:
        return self._bytes_sum / self._forwards if self._forwards else 0.0

    @property
    def average(self) -> float:
        return self.bits(self._bytes_sum, self._pages_sum)

    @property
    def peak(self) -> float:
        return self.bits(self._peak_bytes, self._peak_pages) if self._peak_bytes else 16.0


def collect(
    geometry: PoolGeometry,
    groups: Sequence[Group],
    book: PageBook,
    shrinker: Shrinker,
    meter: BitMeter,
    tick: int,
    running_requests: int,
) -> LedgerStats:
    """Figures of a ledger's books in O(groups · steps)."""
    shape = geometry.shape
    layers = sum(len(g.spec.layers) for g in groups)
    pages = dict.fromkeys(TIERS, 0.0)
    size = dict.fromkeys(TIERS, 0)
    shrinks: dict[tuple[int, int], int] = {}
    shrunk_bytes: dict[tuple[int, int], int] = {}
    side_bytes = moves = 0
    for group in groups:
        spec = group.spec
        share = len(spec.layers) / (2 * layers)
        for step, count in enumerate(group.step_pages):
            side_bytes += count * page_side_bytes(shape, spec, step)
            for side in SIDES:
                tier = spec.steps[step][side]
                pages[tier] += count * share
                size[tier] += count * len(spec.layers) * shape.code_bytes(tier)
        for arena in group.arenas:
            moves += arena.moves
        for s, row in enumerate(group.shrinks):
            for t, count in enumerate(row):
                for side in SIDES if count else ():
                    key = (spec.steps[s][side], spec.steps[t][side])
                    if key[0] != key[1]:
                        freed = len(spec.layers) * (shape.code_bytes(key[0]) - shape.code_bytes(key[1]))
                        shrinks[key] = shrinks.get(key, 0) + count
                        shrunk_bytes[key] = shrunk_bytes.get(key, 0) + count * freed
    return LedgerStats(
        pages=pages,
        block_bytes=size,
        side_bytes=side_bytes,
        used_bytes=sum(size.values()) + side_bytes,
        used_bytes_avg=meter.mean_bytes,
        used_bytes_peak=meter.most_bytes,
        mapped_pages=book.mapped_pages,
        hard_pages=book.class_pages[HARD],
        soft_pages=book.class_pages[SOFT],
        shrinks=shrinks,
        shrunk_bytes=shrunk_bytes,
        moves=moves,
        evict_requests=shrinker.evict_requests,
        evicted_pages=shrinker.evicted_pages,
        effective_bits=meter.bits(meter.bytes_now(), book.mapped_pages),
        effective_bits_avg=meter.average,
        effective_bits_peak=meter.peak,
        tick=tick,
        running_requests=running_requests,
    )
