"""Pending commands of one batch: hazards, waves and the arrays that the device receives.

Hazards are tracked by *stamps*, integers that only grow. A command of the pending batch that runs
in wave ``w`` has stamp ``base + w``; everything below ``base`` belongs to batches that were handed
out already. Every block carries one stamp:

* a block in use: the stamp of the command that wrote it (a page born in this batch is written by
  the forward, after all waves, so its block keeps the stamp it had when it was free);
* a free block: the highest stamp of any command that read or wrote a byte of it.

A copy from ``src`` to ``dst`` gets stamp ``max(stamp[src], stamp[dst], base - 1) + 1``: it reads
after the source was written, and writes after the destination's last reader and writer. That is
the whole rule; a block freed while a command is pending needs no case of its own. Copies take the
block that has been free longest, and a shrink frees twice what it needs, so the space open to
wave ``w`` at least doubles with ``w``: n shrinks take O(log n) waves.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.ledger.errors import LedgerError

# A pending copy is two ints: wave | arena | page | source tier | destination tier, and
# source unit | destination unit. Sorting the first groups copies by wave and arena.
DST_TIER_BITS = 5
PAGE_SHIFT = 10
ARENA_SHIFT = 40
WAVE_SHIFT = 47
LOC_SHIFT = 32
MAX_ARENAS = 1 << (WAVE_SHIFT - ARENA_SHIFT)
MAX_WAVES = 1 << (63 - WAVE_SHIFT)
_PAGE_MASK = (1 << (ARENA_SHIFT - PAGE_SHIFT)) - 1
_TIER_MASK = (1 << DST_TIER_BITS) - 1
_LOC_MASK = (1 << LOC_SHIFT) - 1


def copy_tag(arena_id: int, src_tier: int, dst_tier: int) -> int:
    """The part of a copy's key that does not depend on page and wave."""
    return arena_id << ARENA_SHIFT | src_tier << DST_TIER_BITS | dst_tier


class Table(Protocol):
    """What is needed of an arena: where it is, and its page table as ``arena.Arena`` documents it."""

    group: int
    index: int
    entry: array[int]
    entry_np: np.ndarray


class CommandLog:
    """Copies and changed table entries since the last drain.

    Attributes:
        base: stamp of wave 0 of the pending batch.
        top: highest stamp given so far.
        keys, locs: the pending copies, packed (see above).
        dirty: per group, pages whose entry changed, in order of first change.
        whole_table: the next batch must bring every entry of every table.
    """

    __slots__ = ("base", "dirty", "keys", "locs", "top", "whole_table")

    def __init__(self, num_groups: int) -> None:
        self.base = 1
        self.top = 0
        self.keys: list[int] = []
        self.locs: list[int] = []
        self.dirty: tuple[dict[int, None], ...] = tuple({} for _ in range(num_groups))
        self.whole_table = False

    def drop(self) -> None:
        """Forget what is pending; the next batch brings every table entry."""
        self.keys.clear()
        self.locs.clear()
        for pages in self.dirty:
            pages.clear()
        self.base = self.top = self.top + 1
        self.whole_table = True

    def drain(self, arenas: Sequence[Table]) -> CommandBatch:
        """The pending batch, which is pending no more. ``arenas`` in the order of their ids.

        Raises:
            LedgerError: more waves than a copy's key has room for.
        """
        waves = self._waves(arenas) if self.keys else ()
        table = self._table(arenas)
        self.base = self.top + 1
        return CommandBatch(waves, table)

    def _waves(self, arenas: Sequence[Table]) -> tuple[tuple[ArenaCopies, ...], ...]:
        if self.top - self.base >= MAX_WAVES:
            raise LedgerError(f"{self.top - self.base + 1} waves in one batch, the command format knows {MAX_WAVES}")
        keys = np.array(self.keys, np.int64)
        locs = np.array(self.locs, np.int64)
        self.keys.clear()
        self.locs.clear()
        order = keys.argsort()
        keys = keys[order]
        locs = locs[order]
        page = ((keys >> PAGE_SHIFT) & _PAGE_MASK).astype(np.int32)
        src_unit = (locs >> LOC_SHIFT).astype(np.int32)
        dst_unit = (locs & _LOC_MASK).astype(np.int32)
        src_tier = ((keys >> DST_TIER_BITS) & _TIER_MASK).astype(np.uint8)
        dst_tier = (keys & _TIER_MASK).astype(np.uint8)
        spot = keys >> ARENA_SHIFT
        cuts = (spot[1:] != spot[:-1]).nonzero()[0]
        ends = [*(cuts + 1).tolist(), len(keys)]
        waves: list[list[ArenaCopies]] = []
        start = 0
        last_wave = -1
        for end, where in zip(ends, spot[[*cuts.tolist(), len(keys) - 1]].tolist(), strict=True):
            wave = where >> (WAVE_SHIFT - ARENA_SHIFT)
            if wave != last_wave:
                # Stamps of a batch leave no gaps: a copy in wave w follows one in wave w - 1.
                assert wave == last_wave + 1, f"wave {wave} follows wave {last_wave}"
                waves.append([])
                last_wave = wave
            arena = arenas[where & (MAX_ARENAS - 1)]
            waves[-1].append(
                ArenaCopies(
                    arena.group,
                    arena.index,
                    page[start:end],
                    src_unit[start:end],
                    dst_unit[start:end],
                    src_tier[start:end],
                    dst_tier[start:end],
                )
            )
            start = end
        return tuple(map(tuple, waves))

    def _table(self, arenas: Sequence[Table]) -> tuple[TableUpdate, ...]:
        table = []
        pages: dict[int, np.ndarray] = {}
        for arena in arenas:
            group = arena.group
            if self.whole_table:
                table.append(
                    TableUpdate(
                        group,
                        arena.index,
                        np.arange(len(arena.entry), dtype=np.int32),
                        arena.entry_np.copy(),
                    )
                )
                continue
            if group not in pages:
                dirty = self.dirty[group]
                if not dirty:
                    continue
                pages[group] = np.fromiter(dirty, np.int32, len(dirty))
            table.append(TableUpdate(group, arena.index, pages[group], arena.entry_np[pages[group]]))
        self.whole_table = False
        for dirty in self.dirty:
            dirty.clear()
        return tuple(table)
