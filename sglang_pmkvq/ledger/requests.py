"""Mirror of the running requests: which pages each one lists, and what it protects.

A request lists its pages in sequence order. Index i of the list is, in this order of precedence,

* hard-protected if i ≥ ``hard_from`` (being written by the coming forward, or the partial tail),
* protected as the policy says (soft, or hard) if it is a sink (i < ``sinks``) or touches the recent
  window (i ≥ ``window_from``),
* else merely referenced.

Listings carry the page's generation. A page that was freed meanwhile has another one, so stale
listings are skipped wherever references are taken back.
"""

from __future__ import annotations

from array import array

import numpy as np

from sglang_pmkvq.ledger.errors import LedgerError
from sglang_pmkvq.ledger.pages import FREE, HARD, RUN, SOFT, PageBook


class RequestTable:
    """All request slots.

    Attributes:
        tokens, listed, window_from: int64 [slots], tokens of the request (−1 if none lives there),
            pages listed, first page index of the window.
        tick: int64 [slots], tick of the last batch that the request was in.
        hard_from: first page index that is being written, per slot.
        pages, gens: per slot, listed pages and their generations.
    """

    def __init__(
        self,
        max_requests: int,
        book: PageBook,
        page_size: int,
        window_tokens: int,
        sink_tokens: int,
        protect_hard: bool,
    ) -> None:
        self.slots = max_requests + 1
        self.page_size = page_size
        self.window_tokens = window_tokens
        self.sinks = -(-sink_tokens // page_size)
        self._book = book
        self.protect_hard = protect_hard
        self._protected = book.hard if protect_hard else book.soft
        self.clear()

    def clear(self) -> None:
        """No request runs."""
        slots = self.slots
        self.tokens = np.full(slots, -1, np.int64)
        self.listed = np.zeros(slots, np.int64)
        self.window_from = np.zeros(slots, np.int64)
        self.tick = np.zeros(slots, np.int64)
        self.hard_from = [0] * slots
        self.pages: list[array[int]] = [array("q") for _ in range(slots)]
        self.gens: list[array[int]] = [array("q") for _ in range(slots)]

    def check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"request slot must be in 0..{self.slots - 1}, got {slot}")

    def lives(self, slot: int) -> bool:
        return bool(self.tokens[slot] >= 0)

    def window_start(self, tokens: int) -> int:
        """First page index that touches the last ``window_tokens`` of ``tokens``."""
        return max(0, tokens - self.window_tokens) // self.page_size

    def valid_pages(self, slot: int) -> np.ndarray:
        """int64 [n], listed pages that were not freed meanwhile, in sequence order."""
        pages = np.array(self.pages[slot], np.int64)
        return pages[self._book.gen_np[pages] == np.array(self.gens[slot], np.int64)]

    def bind(self, slot: int, pages: np.ndarray, tokens: int, tick: int) -> None:
        """Make int64 ``pages`` the complete list of the request, which has ``tokens`` tokens.

        Pages that it did not list before are hits: their age becomes ``tick``.

        Raises:
            LedgerError: a page is free or out of range, or the partial tail is not at 16 bits any more.
        """
        self._check_mapped(slot, pages)
        if tokens % self.page_size:
            self._book.check_whole(int(pages[-1]))
        keep = self._common(slot, pages)
        self._apply(slot, keep, len(self.pages[slot]), -1, 0)
        del self.pages[slot][keep:]
        del self.gens[slot][keep:]
        self.set_bounds(slot, self.window_start(tokens), tokens // self.page_size)
        fresh = pages[keep:]
        self.pages[slot].extend(fresh.tolist())
        self.gens[slot].extend(self._book.gen_np[fresh].tolist())
        self.listed[slot] = len(pages)
        self.tokens[slot] = tokens
        self._apply(slot, keep, len(pages), 1, tick)

    def replace(self, slot: int, pages: np.ndarray, tick: int) -> None:
        """Put int64 ``pages`` in place of as many of the first listed ones; what is new is a hit.

        Raises:
            LedgerError: a page is free or out of range.
        """
        self._check_mapped(slot, pages)
        tokens = int(self.tokens[slot])
        self.set_bounds(slot, int(self.window_from[slot]), tokens // self.page_size)
        keep, end = self._common(slot, pages), len(pages)
        self._apply(slot, keep, end, -1, 0)
        fresh = pages[keep:]
        self.pages[slot][keep:end] = array("q", fresh.tolist())
        self.gens[slot][keep:end] = array("q", self._book.gen_np[fresh].tolist())
        self._apply(slot, keep, end, 1, tick)

    def _check_mapped(self, slot: int, pages: np.ndarray) -> None:
        book = self._book
        if not len(pages):
            return
        if pages.min() < 1 or pages.max() > book.num_pages:
            raise LedgerError(f"request {slot} lists pages {pages.min()}..{pages.max()}, expected 1..{book.num_pages}")
        free = pages[book.cls_np[pages] == FREE]
        if len(free):
            raise LedgerError(f"request {slot} lists free pages {free[:8].tolist()}")

    def _common(self, slot: int, pages: np.ndarray) -> int:
        """Leading pages that are listed already, none of them stale."""
        n = min(len(pages), len(self.pages[slot]))
        if not n:
            return 0
        head = pages[:n]
        listed = np.array(self.pages[slot][:n], np.int64)
        gens = np.array(self.gens[slot][:n], np.int64)
        same = (listed == head) & (gens == self._book.gen_np[head])
        return n if same.all() else int(same.argmin())

    def grow(self, slot: int, pages: list[int]) -> None:
        """List pages that were just born (they carry this reference and its hard protection)."""
        gen = self._book.gen
        self.pages[slot].extend(pages)
        self.gens[slot].extend([gen[p] for p in pages])
        self.listed[slot] += len(pages)

    def grow_by_one(self, slots: np.ndarray, pages: list[int]) -> None:
        """As ``grow``, one page for each of ``slots``."""
        gen = self._book.gen
        for slot, page in zip(slots.tolist(), pages, strict=True):
            self.pages[slot].append(page)
            self.gens[slot].append(gen[page])
        self.listed[slots] += 1

    def turn(self, slots: np.ndarray) -> None:
        """Requests whose listed pages are all full and written: no page is being written any more."""
        book, protected, sinks = self._book, self._protected, self.sinks
        gen, hard, soft, age, cls = book.gen, book.hard, book.soft, book.age, book.cls
        softened = 0
        for slot, window, tick in zip(
            slots.tolist(), self.window_from[slots].tolist(), self.tick[slots].tolist(), strict=True
        ):
            pages = self.pages[slot]
            i = len(pages) - 1
            if self.hard_from[slot] > i:
                continue
            assert self.hard_from[slot] == i, f"request {slot} writes pages from {self.hard_from[slot]}, lists {i + 1}"
            self.hard_from[slot] = i + 1
            page = pages[i]
            if self.gens[slot][i] != gen[page]:
                continue
            hard[page] -= 1
            age[page] = tick
            if i >= window or i < sinks:
                protected[page] += 1
            if not hard[page] and soft[page]:
                # What ``reclass`` does, for the one case that decoding meets all the time.
                cls[page] = SOFT
                softened += 1
            else:
                book.reclass(page)
        book.class_pages[HARD] -= softened
        book.class_pages[SOFT] += softened

    def slide(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Windows follow the requests to int64 ``tokens``; pages that they leave lose protection."""
        starts = (tokens - self.window_tokens) // self.page_size
        old = self.window_from[slots]
        rows = (starts > old).nonzero()[0]
        if not len(rows):
            return
        moved, starts, old = slots[rows], starts[rows], old[rows]
        self.window_from[moved] = starts
        book, protected, sinks = self._book, self._protected, self.sinks
        gen, refs, hard, soft, cls = book.gen, book.refs, book.hard, book.soft, book.cls
        left = []
        for slot, start, first in zip(moved.tolist(), starts.tolist(), old.tolist(), strict=True):
            pages, gens = self.pages[slot], self.gens[slot]
            if first < sinks:
                first = sinks
            if start > self.hard_from[slot]:
                start = self.hard_from[slot]
            while first < start:
                page = pages[first]
                stale = gens[first] != gen[page]
                first += 1
                if stale:
                    continue
                protected[page] -= 1
                if cls[page] == SOFT and refs[page] and not hard[page] and not soft[page]:
                    # What ``reclass`` does, for the one case that decoding meets all the time.
                    cls[page] = RUN
                    left.append(page)
                else:
                    book.reclass(page)
        book.class_pages[SOFT] -= len(left)
        book.class_pages[RUN] += len(left)
        book.enqueue(left)

    def finish(self, slot: int) -> None:
        """The request ends: all it referenced and protected it does no more."""
        self._apply(slot, 0, int(self.listed[slot]), -1, 0)
        self.pages[slot] = array("q")
        self.gens[slot] = array("q")
        self.listed[slot] = 0
        self.window_from[slot] = 0
        self.hard_from[slot] = 0
        self.tokens[slot] = -1

    def set_bounds(self, slot: int, window_from: int, hard_from: int) -> None:
        """Move the borders of window and written part; what they pass changes its protection."""
        pages, gens, book = self.pages[slot], self.gens[slot], self._book
        gen, hard, protected = book.gen, book.hard, self._protected
        n = len(pages)
        old_window, old_hard = int(self.window_from[slot]), self.hard_from[slot]
        if hard_from != old_hard:
            self.hard_from[slot] = hard_from
            up = hard_from > old_hard
            sign = -1 if up else 1
            for i in range(min(hard_from, old_hard), min(n, max(hard_from, old_hard))):
                page = pages[i]
                if gens[i] != gen[page]:
                    continue
                hard[page] += sign
                if i < self.sinks or i >= old_window:
                    protected[page] -= sign
                if up:
                    book.age[page] = self.tick[slot].item()
                else:
                    book.check_whole(page)
                book.reclass(page)
        if window_from != old_window:
            self.window_from[slot] = window_from
            sign = -1 if window_from > old_window else 1
            first = max(self.sinks, min(window_from, old_window))
            for i in range(first, min(n, hard_from, max(window_from, old_window))):
                page = pages[i]
                if gens[i] != gen[page]:
                    continue
                protected[page] += sign
                book.reclass(page)

    def _apply(self, slot: int, start: int, end: int, sign: int, hit: int) -> None:
        """Add (sign 1, age becomes ``hit``) or take back (sign −1) what list indices stand for."""
        pages, gens, book = self.pages[slot], self.gens[slot], self._book
        gen, refs, hard, age, protected = book.gen, book.refs, book.hard, book.age, self._protected
        window, written, sinks = int(self.window_from[slot]), self.hard_from[slot], self.sinks
        last = self.tick[slot].item()
        for i in range(start, end):
            page = pages[i]
            if gens[i] != gen[page]:
                continue
            refs[page] += sign
            if i >= written:
                hard[page] += sign
                if sign < 0:
                    age[page] = last
            elif i < sinks or i >= window:
                protected[page] += sign
            if sign > 0:
                age[page] = hit
            book.reclass(page, sign > 0)
