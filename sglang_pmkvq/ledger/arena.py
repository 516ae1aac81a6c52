"""One arena: buddy blocks of four orders, who owns them, and moves that undo fragmentation.

A unit is the codes of one page at 2 bits; a block of order k is 2^k aligned units; order 3 is a
superblock, which a 16-bit page fills. The arena also holds its page table (entry per logical
page), because a move changes nothing else.

Compaction: two free blocks x and y of one order k become one of order k + 1 by moving what lies in
the buddy of x to y. The parent of x is split, so its buddy holds only blocks of order ≤ k: never a
16-bit page, hence never a hard-protected one. Without a block of order ≥ k and with one superblock
of bytes free there must be two of some lower order (one of each is at most 7 of 8 units), so moves
alone make any block that is asked for. A superblock made out of nothing but single units costs
4 moves of 1 unit, 2 of 2 and 1 of 4: 12 units at the worst, and no more is ever moved for one.
"""

from __future__ import annotations

from array import array
from collections import deque

import numpy as np

from sglang_pmkvq.formats import MIN_TIER, STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, UNMAPPED, block_order
from sglang_pmkvq.ledger.errors import LedgerError
from sglang_pmkvq.ledger.waves import LOC_SHIFT, PAGE_SHIFT, WAVE_SHIFT, CommandLog, copy_tag

TOP_ORDER = block_order(16)
# Values of ``head[unit]``: 0 inside a block, BLOCK_FREE + order or BLOCK_USED + order where a block starts.
BLOCK_FREE = 1
BLOCK_USED = BLOCK_FREE + TOP_ORDER + 1
_SLACK = 1024


class Arena:
    """Blocks of one arena of one layer group.

    Attributes:
        group, index: layer group and number of the arena in it; aid: number over all groups.
        units: size. free_units: units that no page owns.
        count: free blocks of each order.
        entry: page table, int32 [N + 1]; entry_np: the same memory as a numpy array.
        moves, moved_units: totals of compaction.
    """

    __slots__ = (
        "aid",
        "count",
        "entry",
        "entry_np",
        "free_units",
        "group",
        "head",
        "index",
        "log",
        "move_tags",
        "moved_units",
        "moves",
        "owner",
        "queues",
        "stamp",
        "units",
    )

    def __init__(self, group: int, index: int, aid: int, superblocks: int, num_pages: int, log: CommandLog) -> None:
        self.group = group
        self.index = index
        self.aid = aid
        self.log = log
        self.units = superblocks * UNITS_PER_SUPERBLOCK
        self.entry = array("i", [UNMAPPED]) * (num_pages + 1)
        self.entry_np = np.frombuffer(self.entry, np.int32)
        self.moves = 0
        self.moved_units = 0
        self.move_tags = [copy_tag(aid, MIN_TIER << k, MIN_TIER << k) for k in range(TOP_ORDER + 1)]
        self.reset()

    def reset(self) -> None:
        """Everything free and unmapped; totals stay."""
        units = self.units
        self.head = bytearray(units)
        self.head[::UNITS_PER_SUPERBLOCK] = bytes([BLOCK_FREE + TOP_ORDER]) * (units // UNITS_PER_SUPERBLOCK)
        self.owner = array("i", [-1]) * units
        self.stamp = array("q", [0]) * units
        # Free blocks, longest free first. An entry counts only while ``head`` still says that a
        # free block of this order starts there; stale ones are skipped and swept now and then.
        self.queues: tuple[deque[int], ...] = tuple(deque() for _ in range(TOP_ORDER + 1))
        self.queues[TOP_ORDER].extend(range(0, units, UNITS_PER_SUPERBLOCK))
        self.count = [0] * TOP_ORDER + [units // UNITS_PER_SUPERBLOCK]
        self.free_units = units
        self.entry_np.fill(UNMAPPED)

    def birth(self, pages: list[int]) -> None:
        """Map each of ``pages`` as a whole superblock. The caller made sure that there are enough.

        Births take the superblock freed last: the forward writes it after all waves, while the
        long-free ones let shrinks start in wave 0.
        """
        pop = self.queues[TOP_ORDER].pop
        head, owner, entry = self.head, self.owner, self.entry
        for page in pages:
            unit = pop()
            while head[unit] != BLOCK_FREE + TOP_ORDER:
                unit = pop()
            head[unit] = BLOCK_USED + TOP_ORDER
            owner[unit] = page
            entry[page] = unit << STEP_BITS
        self.count[TOP_ORDER] -= len(pages)
        self.free_units -= UNITS_PER_SUPERBLOCK * len(pages)

    def shrink(self, pages: list[int], src_order: int, dst_order: int, tag: int, step: int) -> None:
        """Copy each page's block to a smaller one, free the old one, enter ``step``."""
        head, stamp, count, owner, entry, log = (
            self.head,
            self.stamp,
            self.count,
            self.owner,
            self.entry,
            self.log,
        )
        add_key, add_loc, base, top = log.keys.append, log.locs.append, log.base, log.top
        freed, wanted = self.queues[src_order], self.queues[dst_order]
        free_src, free_dst, used_dst = BLOCK_FREE + src_order, BLOCK_FREE + dst_order, BLOCK_USED + dst_order
        src_size, dst_size = 1 << src_order, 1 << dst_order
        # Upper half of the last block split, in no list while this loop can use it next.
        spare = -1
        for page in pages:
            if spare >= 0:
                dst = spare
                spare = -1
            elif count[dst_order]:
                dst = wanted.popleft()
                while head[dst] != free_dst:
                    dst = wanted.popleft()
                count[dst_order] -= 1
            elif count[dst_order + 1]:
                bigger = self.queues[dst_order + 1]
                dst = bigger.popleft()
                while head[dst] != free_dst + 1:
                    dst = bigger.popleft()
                count[dst_order + 1] -= 1
                spare = dst + dst_size
                stamp[spare] = stamp[dst]
            else:
                log.top = top
                dst = self._take(dst_order)
                top = log.top
            # Read after taking: making room may have moved this very page.
            src = entry[page] >> STEP_BITS
            when = stamp[src]
            if stamp[dst] > when:
                when = stamp[dst]
            if when < base:
                when = base
            else:
                when += 1
            if when > top:
                top = when
            add_key((when - base) << WAVE_SHIFT | page << PAGE_SHIFT | tag)
            add_loc(src << LOC_SHIFT | dst)
            stamp[dst] = when
            head[dst] = used_dst
            owner[dst] = page
            entry[page] = dst << STEP_BITS | step
            if src_order < TOP_ORDER and head[src ^ src_size] == free_src:
                self._release(src, src_order, when)
            else:
                # What ``_insert`` does, without the sweep.
                head[src] = free_src
                stamp[src] = when
                freed.append(src)
                count[src_order] += 1
        log.top = top
        if spare >= 0:
            self._insert(spare, dst_order, stamp[spare])
        self.free_units += len(pages) * (src_size - dst_size)
        self._sweep(src_order)

    def restep(self, pages: list[int], step: int) -> None:
        """The step changed, the tier of this arena's side did not."""
        entry = self.entry
        for page in pages:
            entry[page] = entry[page] & ~STEP_MASK | step

    def unmap(self, page: int) -> None:
        """Free the page's block."""
        unit = self.entry[page] >> STEP_BITS
        self.entry[page] = UNMAPPED
        order = self.head[unit] - BLOCK_USED
        self.free_units += 1 << order
        self._release(unit, order, self.stamp[unit])

    def make_superblocks(self, n: int) -> None:
        """Move blocks until ``n`` superblocks are free; needs 8·(n + 1) free units to be sure."""
        while self.count[TOP_ORDER] < n:
            self._merge_below(TOP_ORDER)

    def _take(self, order: int) -> int:
        """Take a free block of ``order`` off the lists, splitting or merging; longest free first.

        ``free_units`` is the caller's to keep, here and in ``_release``.
        """
        head = self.head
        count = self.count
        for k in range(order, TOP_ORDER + 1):
            if count[k]:
                queue = self.queues[k]
                while True:
                    unit = queue.popleft()
                    if head[unit] == BLOCK_FREE + k:
                        break
                count[k] -= 1
                while k > order:
                    k -= 1
                    self._insert(unit + (1 << k), k, self.stamp[unit])
                return unit
        self._merge_below(order)
        return self._take(order)

    def _insert(self, unit: int, order: int, stamp: int) -> None:
        self.head[unit] = BLOCK_FREE + order
        self.stamp[unit] = stamp
        self.queues[order].append(unit)
        self.count[order] += 1
        self._sweep(order)

    def _sweep(self, order: int) -> None:
        """Drop stale entries once they are the greater part of a list."""
        queue = self.queues[order]
        if len(queue) > 2 * self.count[order] + _SLACK:
            live = dict.fromkeys(u for u in queue if self.head[u] == BLOCK_FREE + order)
            queue.clear()
            queue.extend(live)

    def _release(self, unit: int, order: int, stamp: int) -> None:
        """Free a block and join it with free buddies; the union is as old as its youngest part."""
        head = self.head
        head[unit] = 0
        while order < TOP_ORDER:
            buddy = unit ^ (1 << order)
            if head[buddy] != BLOCK_FREE + order:
                break
            head[buddy] = 0
            self.count[order] -= 1
            if self.stamp[buddy] > stamp:
                stamp = self.stamp[buddy]
            unit &= buddy
            order += 1
        self._insert(unit, order, stamp)

    def _merge_below(self, order: int) -> None:
        """Make one block of the highest order below ``order`` that has two free ones, by moves."""
        for k in range(order - 1, -1, -1):
            if self.count[k] >= 2:
                self._merge(k)
                return
        raise LedgerError(
            f"group {self.group} arena {self.index}: no block of order {order} can be made, "
            f"free blocks per order {self.count}, {self.free_units} free units of {self.units}"
        )

    def _pop_free(self, order: int) -> int:
        queue = self.queues[order]
        while True:
            unit = queue.popleft()
            if self.head[unit] == BLOCK_FREE + order:
                self.head[unit] = 0
                self.count[order] -= 1
                return unit

    def _blocks(self, unit: int, order: int) -> list[tuple[int, int, bool]]:
        """(unit, order, in use) of the blocks that tile a region."""
        blocks = []
        end = unit + (1 << order)
        while unit < end:
            mark = self.head[unit]
            used = mark >= BLOCK_USED
            k = mark - (BLOCK_USED if used else BLOCK_FREE)
            blocks.append((unit, k, used))
            unit += 1 << k
        return blocks

    def _merge(self, order: int) -> None:
        """Turn two free blocks of ``order`` into one of the next order; see the module docstring."""
        log = self.log
        kept = self._pop_free(order)
        filled = self._pop_free(order)
        blocks = self._blocks(kept ^ (1 << order), order)
        other = self._blocks(filled ^ (1 << order), order)
        if sum(used << k for _, k, used in other) < sum(used << k for _, k, used in blocks):
            kept, filled, blocks = filled, kept, other
        # Free again, but joined with its buddy before anything can ask for it: no queue entry.
        self.head[kept] = BLOCK_FREE + order
        self.count[order] += 1
        shift = filled - (kept ^ (1 << order))
        free_since = self.stamp[filled]
        for unit, k, used in blocks:
            dst = unit + shift
            if not used:
                self._insert(dst, k, free_since)
                continue
            page = self.owner[unit]
            when = max(self.stamp[unit], free_since, log.base - 1) + 1
            if when > log.top:
                log.top = when
            log.keys.append((when - log.base) << WAVE_SHIFT | page << PAGE_SHIFT | self.move_tags[k])
            log.locs.append(unit << LOC_SHIFT | dst)
            log.dirty[self.group][page] = None
            self.head[dst] = BLOCK_USED + k
            self.owner[dst] = page
            self.stamp[dst] = when
            self.entry[page] = dst << STEP_BITS | self.entry[page] & STEP_MASK
            self.moves += 1
            self.moved_units += 1 << k
            self._release(unit, k, when)
