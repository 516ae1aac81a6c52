"""Who shrinks next, and how far.

Classes of a mapped page: HARD (may not shrink), SOFT (sink or recent window of a running request),
RUN (of a running request, unprotected), CACHED (of no running request). In shortage a group walks:

1. CACHED above the final step, lowest step first, oldest first;
2. RUN while the result keeps both sides at ``min_active_bits`` or more;
3. eviction of cached pages through the caller's ``evict``, in chunks;
4. RUN down to the final step;
5. SOFT down to the final step, lowest step first, so to ``min_active_bits`` before going below.

``uniform`` (the paper, sec. 3.1) keeps these phases but shrinks a whole step at once: phases 1 and 2
together are one set, of which all pages at the lowest step shrink one step, then, if that was not
enough, all at the next; RUN pages take part only while ``min_active_bits`` allows. Phases 4 and 5 do
the same with their sets. ``static`` sends a page to its final step at the first ``extend`` or
``append`` that finds it unprotected, shortage or not; in shortage, phases 3 and 5 are what is left. The
first of all may have to wait for company (``first_shrink_tokens``), until bytes are short.

Why bytes never run out. Let c16 be a superblock and c the final block of an arena, which has
⌈(N·c + R·(c16 − c)) / c16⌉ + 2 superblocks, one of them page 0's. If only H ≤ R pages are hard, all
others can go to the final step, so with n births to come among at most N pages, of which the n are
hard already, the pages mapped before occupy at most (N − n)·c + (R − n)·(c16 − c). What is left is
at least n·c16 + c16: n superblocks and the spare. A shrink needs at most half a superblock free,
and the spare makes one by moves (see ``arena``), so every shrink on the way there succeeds, and so
do the moves that make the n superblocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sglang_pmkvq.formats import TIERS, UNITS_PER_SUPERBLOCK
from sglang_pmkvq.ledger.arena import TOP_ORDER
from sglang_pmkvq.ledger.errors import LedgerError
from sglang_pmkvq.ledger.group import Group
from sglang_pmkvq.ledger.pages import CACHED, RUN, SOFT, PageBook

Levels = Sequence[tuple[int, Sequence[int]]]
PolicyName = Literal["age", "uniform", "static"]
Protect = Literal["soft", "hard"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
PROTECTIONS: tuple[Protect, ...] = get_args(Protect)
# Pages asked of one call of ``evict``. The radix tree evicts whole leaves, so large requests would
# throw away far more than the bytes that are short.
EVICT_CHUNK = 64


@dataclass(frozen=True)
class PolicyConfig:
    """Order and depth of shrinking.

    Attributes:
        policy: ``age``, ``uniform`` or ``static``.
        window_tokens: last tokens of a running request whose pages are protected.
        sink_tokens: first tokens of a sequence whose pages are protected.
        protect: ``soft``: sinks and window shrink last; ``hard``: never, and count in R.
        min_active_bits: cached pages are evicted before running ones shrink below this width.
        first_shrink_tokens: ``static``: no page shrinks before so many tokens may, or bytes are short; what they have
            in common can then be measured while all are at 16 bits.

    Raises:
        ValueError: a value outside its range.
    """

    policy: PolicyName = "age"
    window_tokens: int = 128
    sink_tokens: int = 1
    protect: Protect = "soft"
    min_active_bits: int = 8
    first_shrink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {self.policy!r}")
        if self.protect not in PROTECTIONS:
            raise ValueError(f"protect must be one of {PROTECTIONS}, got {self.protect!r}")
        if self.window_tokens < 0 or self.sink_tokens < 0:
            raise ValueError(
                f"window_tokens and sink_tokens must not be negative, got {self.window_tokens}, {self.sink_tokens}"
            )
        if self.min_active_bits not in TIERS:
            raise ValueError(f"min_active_bits must be one of {TIERS}, got {self.min_active_bits}")


def active_step(steps: Sequence[tuple[int, int]], min_active_bits: int) -> int:
    """Deepest step whose narrower side keeps ``min_active_bits``; step 0 always does."""
    return max(s for s, pair in enumerate(steps) if s == 0 or min(pair) >= min_active_bits)


class Shrinker:
    """Makes room in all arenas by the policy's order.

    Attributes:
        evict: asks for n cached pages to be freed, returns how many were; may be None.
        evict_requests, evicted_pages: calls of ``evict`` and the pages it reported.
    """

    def __init__(self, config: PolicyConfig, groups: Sequence[Group], book: PageBook, page_size: int) -> None:
        self._first_pages = -(-config.first_shrink_tokens // page_size)
        self._waiting = self._first_pages > 0
        self.evict: Callable[[int], int] | None = None
        self.evict_requests = 0
        self.evicted_pages = 0
        self._groups = groups
        self._book = book
        self._uniform = config.policy == "uniform"
        # Levels (step, classes) before and after eviction: in shortage a level is drained page by
        # page, or, if uniform, all at once.
        self._before: list[Levels] = []
        self._after: list[Levels] = []
        for group in groups:
            active = active_step(group.spec.steps, config.min_active_bits)
            steps = range(group.final)
            if self._uniform:
                self._before.append([(s, (CACHED, RUN) if s < active else (CACHED,)) for s in steps])
            else:
                self._before.append([(s, (CACHED,)) for s in steps] + [(s, (RUN,)) for s in range(active)])
            self._after.append([(s, (RUN,)) for s in steps] + [(s, (SOFT,)) for s in steps])

    def reset(self) -> None:
        """Every page is free again. The first shrink waits once more if it could not wait long enough."""
        self._waiting = self._first_pages > 0

    def settle(self, births: int) -> None:
        """Shrink the pages that policy ``static`` found unprotected to their final step; ``births`` are to come."""
        ripe = self._book.ripe
        if not ripe:
            return
        cls = self._book.cls
        # A page may have ripened twice since.
        pages = [page for page in dict.fromkeys(ripe) if cls[page] == RUN or cls[page] == CACHED]
        if self._waiting:
            if len(pages) >= self._first_pages:
                self._first_pages = 0
            elif not any(group.short(UNITS_PER_SUPERBLOCK * (births + 1)) for group in self._groups):
                ripe[:] = pages
                return
            self._waiting = False
        for group in self._groups:
            step, final = group.step, group.final
            for page in pages:
                if step[page] < final:
                    group.shrink([page], step[page], final)
        ripe.clear()

    def make_room(self, n: int) -> None:
        """Have ``n`` whole superblocks free in every arena, and one more in bytes.

        Raises:
            LedgerError: nothing may shrink any further: more than R pages are hard-protected.
        """
        need = UNITS_PER_SUPERBLOCK * (n + 1)
        for index, group in enumerate(self._groups):
            if group.short(need):
                self._shrink(index, group, need)
        for group in self._groups:
            for arena in group.arenas:
                if arena.count[TOP_ORDER] < n:
                    arena.make_superblocks(n)

    def _shrink(self, index: int, group: Group, need: int) -> None:
        if self._walk(group, self._before[index], need):
            return
        if self._evict(group, need):
            return
        if self._walk(group, self._after[index], need):
            return
        raise LedgerError(
            f"group {group.index} ({group.spec.name()}): {need} free units needed, "
            f"{[a.free_units for a in group.arenas]} left with everything at its limit; "
            f"hard-protected pages: {self._book.hard_pages}"
        )

    def _walk(self, group: Group, levels: Levels, need: int) -> bool:
        """Shrink level after level until nothing is short; a shrink only feeds later levels."""
        for step, classes in levels:
            if not self._uniform:
                if group.shrink_oldest(classes[0], step, need):
                    return True
                continue
            pages = [page for cls in classes for page in group.take_oldest(cls, step, group.step_pages[step])]
            pages.sort(key=lambda page: (self._book.age[page], page))
            group.shrink(pages, step, step + 1)
            if not group.short(need):
                return True
        return False

    def _evict(self, group: Group, need: int) -> bool:
        """Evict cached pages in chunks; True once nothing is short."""
        if self.evict is None:
            return False
        class_pages = self._book.class_pages
        while class_pages[CACHED]:
            cached = class_pages[CACHED]
            self.evict(min(EVICT_CHUNK, cached, group.pages_short(need)))
            freed = cached - class_pages[CACHED]
            if freed <= 0:
                return False
            self.evict_requests += 1
            self.evicted_pages += freed
            if not group.short(need):
                return True
        return False
