"""The ledger: owns every physical byte of the pool on paper, decides, and emits commands.

Logical pages 1..N are what SGLang allocates. Each is mapped in every arena of every layer group
from its birth, as a 16-bit superblock, to the moment SGLang frees it. ``extend`` and ``append``
stand for one forward each: they advance the tick, allocate, and shrink older pages where bytes are
short; ``drain`` hands out the commands that must run ahead of that forward. Nothing here looks at a
clock or at device memory: the same calls give the same commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import PoolGeometry
from sglang_pmkvq.ledger.arena import Arena
from sglang_pmkvq.ledger.errors import LedgerError
from sglang_pmkvq.ledger.group import Group
from sglang_pmkvq.ledger.integrity import check_integrity
from sglang_pmkvq.ledger.pages import FREE, HARD, PAGE_MASK, PageBook
from sglang_pmkvq.ledger.policy import PolicyConfig, Shrinker
from sglang_pmkvq.ledger.requests import RequestTable
from sglang_pmkvq.ledger.stats import BitMeter, LedgerStats, collect
from sglang_pmkvq.ledger.waves import MAX_ARENAS, CommandLog


class Ledger:
    """Host side of the pool.

    Args:
        geometry: sizes; N, R and the superblocks of every arena.
        policy: order and depth of shrinking.
        max_requests: highest request slot.
        evict: frees about n cached pages by calling :meth:`free` before it returns, and returns how
            many it freed; may be set later through :attr:`evict`.

    Raises:
        ValueError: the geometry has too many pages or arenas for the command format.
    """

    def __init__(
        self,
        geometry: PoolGeometry,
        policy: PolicyConfig,
        max_requests: int,
        evict: Callable[[int], int] | None = None,
    ) -> None:
        if not 1 <= geometry.num_pages < PAGE_MASK:
            raise ValueError(f"num_pages must be in 1..{PAGE_MASK - 1}, got {geometry.num_pages}")
        if sum(map(len, geometry.superblocks)) > MAX_ARENAS:
            raise ValueError(f"at most {MAX_ARENAS} arenas, got {sum(map(len, geometry.superblocks))}")
        self.geometry = geometry
        self.policy = policy
        self.num_pages = geometry.num_pages
        self.page_size = geometry.shape.page_size
        self.log = CommandLog(len(geometry.groups))
        self.book = PageBook(self.num_pages, policy.policy == "static")
        groups: list[Group] = []
        arenas: list[Arena] = []
        for index, (spec, counts) in enumerate(zip(geometry.groups, geometry.superblocks, strict=True)):
            groups.append(Group(index, spec, counts, self.num_pages, len(arenas), self.log, self.book))
            arenas.extend(groups[-1].arenas)
        self.groups = tuple(groups)
        self.arenas = tuple(arenas)
        self.book.attach(self._queue, self._steps)
        self.requests = RequestTable(
            max_requests,
            self.book,
            self.page_size,
            policy.window_tokens,
            policy.sink_tokens,
            policy.protect == "hard",
        )
        self.shrinker = Shrinker(policy, self.groups, self.book, self.page_size)
        self.shrinker.evict = evict
        self.meter = BitMeter(geometry, self.groups)
        self.tick = 0
        # Forwards issued so far; a call that found no pages advances the tick, but writes nothing.
        self._forwards = 0
        # Requests whose chunk the last forward wrote; (page, generation, forwards) of ownerless pages.
        self._issued = True
        self._extended: list[int] = []
        self._loose: list[tuple[int, int, int]] = []

    def _queue(self, pages: list[int]) -> None:
        for group in self.groups:
            group.queue(pages)

    def _steps(self, page: int) -> list[int]:
        return [group.step[page] for group in self.groups]

    @property
    def evict(self) -> Callable[[int], int] | None:
        return self.shrinker.evict

    @evict.setter
    def evict(self, evict: Callable[[int], int] | None) -> None:
        self.shrinker.evict = evict

    @property
    def free_page_count(self) -> int:
        """Logical pages that nobody holds; O(1)."""
        return len(self.book.free)

    # ---------------------------------------------------------------- allocation

    def extend(
        self,
        slots: Sequence[int],
        prefix_pages: Sequence[np.ndarray],
        prefix_lens: Sequence[int] | np.ndarray,
        seq_lens: Sequence[int] | np.ndarray,
    ) -> np.ndarray | None:
        """Pages for one prefill batch; decode rows of a MIXED batch are extends by one token.

        Advances the tick. Each request's list becomes its ``prefix_pages``; pages that it did not
        list before count as hit now. Then ⌈seq / P⌉ − ⌈prefix / P⌉ pages are born for each.

        Args:
            slots: request slots.
            prefix_pages: per request, integer array of the pages of its prefix in sequence order,
                the partial last one included.
            prefix_lens, seq_lens: tokens before and after.

        Returns:
            int64 page ids in batch order, or None if logical pages are lacking; then nothing but
            the lists of the requests has changed.

        Raises:
            ValueError: lengths do not fit. LedgerError: a prefix page is free, or R is exceeded.
        """
        if not len(slots) == len(prefix_pages) == len(prefix_lens) == len(seq_lens):
            raise ValueError(
                f"expected {len(slots)} prefixes, prefix_lens and seq_lens, got {len(prefix_pages)}, "
                f"{len(prefix_lens)}, {len(seq_lens)}"
            )
        size = self.page_size
        rows: list[tuple[int, int, int, int]] = []
        for slot, before, after, pages in zip(slots, prefix_lens, seq_lens, prefix_pages, strict=True):
            slot, before, after = int(slot), int(before), int(after)
            self.requests.check_slot(slot)
            if not 0 <= before < after:
                raise ValueError(f"request {slot}: expected 0 <= prefix < seq, got {before}, {after}")
            if len(pages) != -(-before // size):
                raise ValueError(f"request {slot}: a prefix of {before} tokens in {len(pages)} pages")
            rows.append((slot, before, after, -(-after // size) - -(-before // size)))
        self._next_tick(None)
        requests = self.requests
        for (slot, before, _, _), pages in zip(rows, prefix_pages, strict=True):
            requests.bind(slot, np.asarray(pages, np.int64), before, self.tick)
        total = sum(row[3] for row in rows)
        if total > self.free_page_count:
            return None
        for slot, before, after, _ in rows:
            requests.tick[slot] = self.tick
            requests.tokens[slot] = after
            requests.set_bounds(slot, requests.window_start(after), before // size)
        try:
            born = self._born(total, 1)
        except BaseException:
            self._take_back((slot, before) for slot, before, _, _ in rows)
            raise
        start = 0
        for slot, _, _, new in rows:
            requests.grow(slot, born[start : start + new])
            self._extended.append(slot)
            start += new
        self.meter.sample(self.book.mapped_pages)
        return np.array(born, np.int64)

    def append(self, slots: np.ndarray, seq_lens: np.ndarray) -> np.ndarray | None:
        """Pages for one decode step: every request grows by one token. Advances the tick.

        Args:
            slots: int64 [n], request slots, each once. seq_lens: int64 [n], tokens with the new one.

        Returns:
            int64 page ids, one per request whose new token starts a page, in batch order; None if
            logical pages are lacking, then nothing has changed but the tick.

        Raises:
            ValueError: a request's pages do not fit its length. LedgerError: R is exceeded.
        """
        requests = self.requests
        slots = np.asarray(slots, np.int64)
        seq_lens = np.asarray(seq_lens, np.int64)
        size = self.page_size
        over = seq_lens - requests.listed[slots] * size
        if len(slots) and (over.max() > 1 or over.min() <= -size):
            bad = ((over > 1) | (over <= -size)).nonzero()[0][0]
            raise ValueError(
                f"request {slots[bad]}: {seq_lens[bad]} tokens do not follow {requests.tokens[slots[bad]]} "
                f"in {requests.listed[slots[bad]]} pages"
            )
        self._next_tick(slots.tolist() if self._extended else ())
        rows = (over == 1).nonzero()[0]
        if len(rows) > self.free_page_count:
            return None
        growing = slots[rows]
        if len(rows):
            # The page before is full, and was written by an earlier forward.
            requests.turn(growing)
        requests.slide(slots, seq_lens)
        requests.tokens[slots] = seq_lens
        requests.tick[slots] = self.tick
        try:
            born = self._born(len(rows), 1)
        except BaseException:
            self._take_back(zip(slots.tolist(), (seq_lens - 1).tolist(), strict=True))
            raise
        if born:
            requests.grow_by_one(growing, born)
        self.meter.sample(self.book.mapped_pages)
        return np.array(born, np.int64)

    def alloc(self, n: int) -> np.ndarray | None:
        """int64 ids of ``n`` pages of no request: hard-protected for the coming forward, then cached.

        Returns None if logical pages are lacking. Does not advance the tick.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        if n > self.free_page_count:
            return None
        born = self._born(n, 0)
        self._loose.extend((page, self.book.gen[page], self._forwards) for page in born)
        return np.array(born, np.int64)

    def _next_tick(self, mixed: Sequence[int] | None) -> None:
        """What the last forward wrote is written: release it, except partial tails.

        ``mixed`` are the requests of an ``append``. SGLang's MIXED batch is an ``extend`` and an ``append``
        before one forward, so after an ``extend`` that was not drained yet only their pages are written.
        """
        self.tick += 1
        requests, book = self.requests, self.book
        waiting: list[int] = []
        for slot in self._extended:
            if mixed is not None and not self._issued and slot not in mixed:
                waiting.append(slot)
            elif requests.lives(slot):
                requests.set_bounds(
                    slot, requests.window_from[slot].item(), requests.tokens[slot].item() // self.page_size
                )
        self._extended = waiting
        self._issued = False
        pending = self._loose
        self._loose = [loose for loose in pending if loose[2] == self._forwards]
        for page, gen, forwards in pending:
            if forwards < self._forwards and book.gen[page] == gen:
                book.hard[page] -= 1
                book.reclass(page)

    def _take_back(self, rows: Iterable[tuple[int, int]]) -> None:
        """No pages could be had: (request, tokens before) are as they were, and the books agree."""
        for slot, before in rows:
            self.requests.tokens[slot] = before
            self.requests.set_bounds(slot, self.requests.window_start(before), before // self.page_size)

    def _born(self, n: int, refs: int) -> list[int]:
        """``n`` free pages, mapped at 16 bits in every group."""
        self.shrinker.settle(n)
        if not n:
            return []
        self.shrinker.make_room(n)
        pages = self.book.birth(n, self.tick, refs)
        for group in self.groups:
            group.birth(pages)
        return pages

    # ---------------------------------------------------------------- what SGLang tells

    def free(self, pages: np.ndarray) -> None:
        """SGLang frees logical pages; requests that still list them lose nothing by it.

        Raises:
            LedgerError: a page is out of 1..N, free already or named twice; nothing was freed then.
        """
        ids = np.asarray(pages, np.int64).tolist()
        cls = self.book.cls
        for page in ids:
            if not 1 <= page <= self.num_pages:
                raise LedgerError(f"free of page {page}, expected 1..{self.num_pages}")
            if cls[page] == FREE:
                raise LedgerError(f"double free of page {page}")
        if len(ids) > 1 and len(set(ids)) < len(ids):
            raise LedgerError(f"free of {len(ids)} pages names only {len(set(ids))} different ones")
        for group in self.groups:
            for page in ids:
                group.unmap(page)
        for page in ids:
            self.book.release(page)

    def rebind(self, slot: int, pages: np.ndarray) -> None:
        """The radix tree replaced pages of a running request: ``pages`` are now the first of its list.

        What is listed beyond them stays, so the complete list may be given, or only the part that the
        tree knows while a page for a token in flight is listed already. Replacing pages are hits. Call
        it after the forward of the last ``extend`` or ``append`` was launched: what that forward writes
        is no longer protected as being written, except the partial tail page.

        Raises:
            ValueError: the slot has no request, or lists fewer pages. LedgerError: a page is free.
        """
        requests = self.requests
        requests.check_slot(slot)
        pages = np.asarray(pages, np.int64)
        if not requests.lives(slot) or len(pages) > len(requests.pages[slot]):
            raise ValueError(f"rebind of slot {slot} to {len(pages)} pages, which lists {len(requests.pages[slot])}")
        requests.replace(slot, pages, self.tick)

    def finish(self, slot: int) -> None:
        """The request ended, was aborted or retracted. Its pages stay mapped until freed."""
        self.requests.check_slot(slot)
        if self.requests.lives(slot):
            self.requests.finish(slot)

    def clear(self) -> None:
        """Flush: every page free, no request, no pending command; the next drain resets the tables."""
        self.log.drop()
        self._issued = True
        self.book.reset()
        self.shrinker.reset()
        self.requests.clear()
        self._extended.clear()
        self._loose.clear()
        for group in self.groups:
            group.reset()

    def drain(self) -> CommandBatch:
        """Commands since the last call, to run ahead of the coming forward.

        Call it when that forward is issued: an ``append`` after an undrained ``extend`` joins its forward.
        """
        self._issued = True
        self._forwards += 1
        return self.log.drain(self.arenas)

    @property
    def pending(self) -> bool:
        """True if the device is behind: there are commands that ``drain`` has not handed out."""
        log = self.log
        return bool(log.keys or log.whole_table or any(log.dirty))

    # ---------------------------------------------------------------- looking

    def stats(self) -> LedgerStats:
        return collect(
            self.geometry, self.groups, self.book, self.shrinker, self.meter, self.tick, self.running_requests
        )

    def free_page_ids(self) -> np.ndarray:
        """int64, ids of the free logical pages, in no particular order."""
        return np.array(self.book.free, np.int64)

    def written_pages(self) -> np.ndarray:
        """int64, ascending ids of pages that were written whole and that no coming forward writes.

        Hard-protected pages are left out, those of a window that never shrinks among them.
        """
        cls = self.book.cls_np
        return np.flatnonzero((cls != FREE) & (cls != HARD)).astype(np.int64)

    @property
    def running_requests(self) -> int:
        """Slots with a live request; O(slots)."""
        return int((self.requests.tokens >= 0).sum())

    @property
    def running_bytes(self) -> int:
        """Bytes of the pages that running requests list, a shared page once for each; O(their pages)."""
        return self.meter.running_bytes(self.requests)

    def pages_of(self, slot: int) -> np.ndarray:
        """int64 [n], the request's list as bound and grown, stale entries included."""
        self.requests.check_slot(slot)
        return np.array(self.requests.pages[slot], np.int64)

    def page_steps(self, pages: np.ndarray) -> np.ndarray:
        """int8 [groups, n], step of each page; −1 where free."""
        return np.stack([group.step_np[pages] for group in self.groups])

    def request_bits(self, slot: int) -> tuple[int, float]:
        """(lowest tier, mean payload bits per element) over the request's pages, groups and sides.

        (16, 16.0) for a request without pages.
        """
        self.requests.check_slot(slot)
        pages = self.requests.valid_pages(slot)
        if not len(pages):
            return 16, 16.0
        lowest, bits, layers = 16, 0.0, 0
        for group in self.groups:
            tiers = np.array(group.spec.steps)[group.step_np[pages]]
            lowest = min(lowest, int(tiers.min()))
            bits += float(tiers.mean()) * len(group.spec.layers)
            layers += len(group.spec.layers)
        return lowest, bits / layers

    def entries(self, group: int, arena: int) -> np.ndarray:
        """int32 [N + 1], copy of the page table as it is after the pending commands."""
        return self.groups[group].arenas[arena].entry_np.copy()

    def check_integrity(self) -> None:
        """Recompute every count from scratch.

        Raises:
            IntegrityError: books that must agree do not; with numbers.
        """
        check_integrity(self.groups, self.book, self.requests, self._loose)
