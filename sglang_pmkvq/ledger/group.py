"""One layer group on the host: its arenas, the step of each page, and queues of who may shrink."""

from __future__ import annotations

from array import array
from functools import partial
from heapq import heappop, heappush

import numpy as np

from sglang_pmkvq.formats import LayerGroup, block_order, tier_units
from sglang_pmkvq.ledger.agequeue import AgeQueue
from sglang_pmkvq.ledger.arena import Arena
from sglang_pmkvq.ledger.pages import NUM_QUEUED, PAGE_BITS, PAGE_MASK, PageBook
from sglang_pmkvq.ledger.waves import CommandLog, copy_tag

UNMAPPED_STEP = -1


class Group:
    """Pages of one layer group.

    Attributes:
        step: int8 [N + 1], step of each page, −1 where free; step_np: the same memory as a numpy array.
        step_pages: mapped pages at each step, page 0 not counted.
        shrinks: ``shrinks[s][t]`` pages ever shrunk from step s to step t.
    """

    def __init__(
        self,
        index: int,
        spec: LayerGroup,
        superblocks: tuple[int, ...],
        num_pages: int,
        first_aid: int,
        log: CommandLog,
        book: PageBook,
    ) -> None:
        self.index = index
        self.spec = spec
        self.final = spec.final_step
        self.arenas = tuple(
            Arena(index, a, first_aid + a, count, num_pages, log) for a, count in enumerate(superblocks)
        )
        self.step = array("b", [UNMAPPED_STEP]) * (num_pages + 1)
        self.step_np = np.frombuffer(self.step, np.int8)
        self.step_pages = [0] * (self.final + 1)
        self.shrinks = [[0] * (self.final + 1) for _ in range(self.final + 1)]
        self._dirty = log.dirty[index]
        self._book = book
        # Age keys per class and step: a key counts only while the page still has that class, step
        # and age. Every page that may shrink has at least one key that counts.
        self.queues = [[AgeQueue() for _ in range(self.final)] for _ in range(NUM_QUEUED)]
        self._plans = [[self._plan(s, t) for t in range(self.final + 1)] for s in range(self.final + 1)]
        self._finals = [tier_units(spec.arena_tier(a, self.final)) for a in range(len(self.arenas))]
        self.map_page_zero()

    def _plan(self, s: int, t: int) -> list[tuple[Arena, int, int, int]]:
        """(arena, source order, destination order, tag) per arena; tag −1 where the tier stays."""
        plan = []
        for a, arena in enumerate(self.arenas):
            src, dst = self.spec.arena_tier(a, s), self.spec.arena_tier(a, t)
            tag = -1 if src == dst else copy_tag(arena.aid, src, dst)
            plan.append((arena, block_order(src), block_order(dst), tag))
        return plan

    def map_page_zero(self) -> None:
        """Page 0, the sink of padded tokens: unit 0 of every arena, 16 bits for ever."""
        self.step[0] = 0
        for arena in self.arenas:
            # All free now, and the longest-free superblock is unit 0.
            arena.queues[-1].reverse()
            arena.birth([0])
            arena.queues[-1].reverse()
        self._dirty[0] = None

    def reset(self) -> None:
        """All pages free, page 0 mapped; totals stay."""
        for arena in self.arenas:
            arena.reset()
        self.step_np.fill(UNMAPPED_STEP)
        self.step_pages = [0] * (self.final + 1)
        for queues in self.queues:
            for queue in queues:
                queue.clear()
        self.map_page_zero()

    def birth(self, pages: list[int]) -> None:
        """Map ``pages`` at step 0 in every arena; superblocks were made free before."""
        for arena in self.arenas:
            arena.birth(pages)
        step = self.step
        for page in pages:
            step[page] = 0
        self.step_pages[0] += len(pages)
        self._dirty.update(dict.fromkeys(pages))

    def unmap(self, page: int) -> None:
        for arena in self.arenas:
            arena.unmap(page)
        self.step_pages[self.step[page]] -= 1
        self.step[page] = UNMAPPED_STEP
        self._dirty[page] = None

    def shrink(self, pages: list[int], at: int, to: int) -> None:
        """Take ``pages``, all at step ``at``, down to step ``to`` and queue them there."""
        for arena, src_order, dst_order, tag in self._plans[at][to]:
            if tag < 0:
                arena.restep(pages, to)
            else:
                arena.shrink(pages, src_order, dst_order, tag, to)
        step = self.step
        for page in pages:
            step[page] = to
        self._dirty.update(dict.fromkeys(pages))
        self.step_pages[at] -= len(pages)
        self.step_pages[to] += len(pages)
        self.shrinks[at][to] += len(pages)
        self.queue(pages)

    def shrink_oldest(self, cls: int, at: int, need: int) -> bool:
        """Shrink pages of a class at step ``at`` by one step, oldest first, while an arena is short.

        Returns True once ``need`` units are free in every arena.
        """
        want = 0
        for arena, src_order, dst_order, _ in self._plans[at][at + 1]:
            lacking = need - arena.free_units
            if lacking > 0:
                # An arena that gains nothing at this step takes the whole level, and then the next.
                gain = (1 << src_order) - (1 << dst_order)
                want = max(want, -(-lacking // gain) if gain else self.step_pages[at])
        pages = self.take_oldest(cls, at, want)
        if pages:
            try:
                self.shrink(pages, at, at + 1)
            except BaseException:
                # They are off their queue, and nobody else would ever find them.
                self.queue(pages)
                raise
        return not self.short(need)

    def take_oldest(self, cls: int, step: int, n: int) -> list[int]:
        """At most ``n`` pages of a class at ``step``, oldest first; off their queue if they have one."""
        if cls >= NUM_QUEUED:
            return self._unqueued(cls, step)[:n]
        queue = self.queues[cls][step]
        classes, steps, ages = self._book.cls, self.step, self._book.age
        pages: list[int] = []
        last = -1
        line, heap = queue.line, queue.heap
        while len(pages) < n:
            # The lower of the two heads, as ``AgeQueue`` asks its owner to.
            if heap and (not line or heap[0] < line[0]):
                key = heappop(heap)
            elif line:
                key = line.popleft()
            else:
                break
            page = key & PAGE_MASK
            # A key may be queued twice.
            if key != last and classes[page] == cls and steps[page] == step and ages[page] == key >> PAGE_BITS:
                pages.append(page)
                last = key
        return pages

    def _unqueued(self, cls: int, step: int) -> list[int]:
        """SOFT pages have no queue: only the worst shortage asks for them."""
        pages = ((self._book.cls_np == cls) & (self.step_np == step)).nonzero()[0]
        return pages[self._book.age_np[pages].argsort(kind="stable")].tolist()

    def short(self, need: int) -> bool:
        """True if an arena has fewer than ``need`` free units."""
        return min(arena.free_units for arena in self.arenas) < need

    def pages_short(self, need: int) -> int:
        """Final-step pages whose blocks would cover what is missing; at least 1."""
        return max(1, *(-(-(need - a.free_units) // c) for a, c in zip(self.arenas, self._finals, strict=True)))

    def queue(self, pages: list[int]) -> None:
        """Enter pages whose class, step or age is new, if they may shrink; SOFT has no queue."""
        steps, final, queues = self.step, self.final, self.queues
        classes, ages = self._book.cls, self._book.age
        for page in pages:
            step, cls = steps[page], classes[page]
            if step < final and cls < NUM_QUEUED:
                # In order at the end of the line, else on the heap, as ``AgeQueue`` asks its owner to.
                queue = queues[cls][step]
                key = ages[page] << PAGE_BITS | page
                line = queue.line
                if not line or key >= line[-1]:
                    line.append(key)
                else:
                    heappush(queue.heap, key)
        for cls, steps_of_class in enumerate(queues):
            for step, queue in enumerate(steps_of_class):
                if len(queue.line) + len(queue.heap) > queue.limit:
                    queue.sweep(partial(self._holds, cls, step))

    def _holds(self, cls: int, step: int, key: int) -> bool:
        page = key & PAGE_MASK
        book = self._book
        return book.cls[page] == cls and self.step[page] == step and book.age[page] == key >> PAGE_BITS
