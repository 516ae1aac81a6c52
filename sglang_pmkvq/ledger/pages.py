"""State of logical pages: references, protections, class, age."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from sglang_pmkvq.ledger.errors import LedgerError

# Classes. The first two have queues of pages that may shrink.
NUM_CLASSES = 5
RUN, CACHED, SOFT, HARD, FREE = range(NUM_CLASSES)
NUM_QUEUED = 2

# Age key: tick of the last write or hit above, page below: ascending order is oldest first.
PAGE_BITS = 29
PAGE_MASK = (1 << PAGE_BITS) - 1


class PageBook:
    """What is known of each logical page, whatever its bytes. Page 0 is HARD for ever.

    Attributes:
        refs, soft, hard: int32 [N + 1], running requests that list the page, that protect it softly,
            that protect it hard.
        age: int64 [N + 1], tick of the last write or hit.
        gen: int64 [N + 1], how often the page was freed; tells a stale listing from a live one.
        cls: uint8 [N + 1], class. ``age_np``, ``gen_np``, ``cls_np``: the same memory as numpy arrays.
        class_pages: pages in each class, page 0 not counted.
        free: stack of free page ids, lowest on top at start.
        ripe: pages that became unprotected above their final step (policy ``static`` only).
    """

    def __init__(self, num_pages: int, static: bool) -> None:
        self.num_pages = num_pages
        size = num_pages + 1
        self.refs = array("i", [0]) * size
        self.soft = array("i", [0]) * size
        self.hard = array("i", [0]) * size
        self.age = array("q", [0]) * size
        self.age_np = np.frombuffer(self.age, np.int64)
        self.gen = array("q", [0]) * size
        self.gen_np = np.frombuffer(self.gen, np.int64)
        self.cls = bytearray(size)
        self.cls_np = np.frombuffer(self.cls, np.uint8)
        self.class_pages = [0] * NUM_CLASSES
        self.free: list[int] = []
        self.ripe: list[int] = []
        self._static = static
        self._queue: Callable[[list[int]], None] = lambda pages: None
        self._steps: Callable[[int], list[int]] = lambda page: []
        self.reset()

    def attach(self, queue: Callable[[list[int]], None], steps: Callable[[int], list[int]]) -> None:
        """Who queues pages that may shrink, and who knows a page's step in each layer group."""
        self._queue = queue
        self._steps = steps

    def reset(self) -> None:
        """All pages free. Generations go on, so that old listings stay stale."""
        for counts in (self.refs, self.soft, self.hard):
            np.frombuffer(counts, np.int32).fill(0)
        self.gen_np += 1
        self.cls_np.fill(FREE)
        self.cls[0] = HARD
        self.class_pages = [0] * NUM_CLASSES
        self.class_pages[FREE] = self.num_pages
        self.free = list(range(self.num_pages, 0, -1))
        self.ripe.clear()

    @property
    def hard_pages(self) -> int:
        return self.class_pages[HARD]

    @property
    def mapped_pages(self) -> int:
        return self.num_pages - self.class_pages[FREE]

    def check_whole(self, page: int) -> None:
        """A page that is written must be at 16 bits in every group.

        Raises:
            LedgerError: it is not.
        """
        steps = self._steps(page)
        if any(steps):
            raise LedgerError(f"page {page} is to be written, but its steps are {steps}, expected all 0")

    def reclass(self, page: int, requeue: bool = False) -> None:
        """Set the class that the counters say; queue the page if that or its age changed."""
        if self.hard[page]:
            cls = HARD
        elif self.soft[page]:
            cls = SOFT
        else:
            cls = RUN if self.refs[page] else CACHED
        old = self.cls[page]
        if cls != old:
            self.class_pages[old] -= 1
            self.class_pages[cls] += 1
            self.cls[page] = cls
        elif not requeue:
            return
        if cls < NUM_QUEUED:
            self.enqueue([page])

    def enqueue(self, pages: list[int]) -> None:
        """Pages that may shrink from now on, or whose age changed."""
        if self._static:
            self.ripe.extend(pages)
            return
        self._queue(pages)

    def birth(self, n: int, tick: int, refs: int) -> list[int]:
        """Take ``n`` free pages, which the coming forward writes: hard-protected, ``refs`` references."""
        free = self.free
        pages = free[: -n - 1 : -1]
        del free[-n:]
        age, ref, hard, cls = self.age, self.refs, self.hard, self.cls
        for page in pages:
            age[page] = tick
            ref[page] = refs
            hard[page] = 1
            cls[page] = HARD
        self.class_pages[FREE] -= n
        self.class_pages[HARD] += n
        return pages

    def release(self, page: int) -> None:
        """The page is free; listings of it are stale from now on."""
        self.class_pages[self.cls[page]] -= 1
        self.class_pages[FREE] += 1
        self.cls[page] = FREE
        self.refs[page] = self.soft[page] = self.hard[page] = 0
        self.gen[page] += 1
        self.free.append(page)
