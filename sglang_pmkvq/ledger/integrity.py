"""The books, recomputed from scratch and compared: nothing lost, nothing owned twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, UNMAPPED, block_order
from sglang_pmkvq.ledger.arena import BLOCK_FREE, BLOCK_USED, TOP_ORDER, Arena
from sglang_pmkvq.ledger.errors import IntegrityError
from sglang_pmkvq.ledger.group import Group
from sglang_pmkvq.ledger.pages import CACHED, FREE, HARD, NUM_CLASSES, NUM_QUEUED, PAGE_BITS, RUN, SOFT, PageBook
from sglang_pmkvq.ledger.requests import RequestTable


def _same(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise IntegrityError(f"{what}: expected {expected}, got {got}")


def _same_array(what: str, expected: np.ndarray, got: np.ndarray) -> None:
    if not np.array_equal(expected, got):
        bad = np.flatnonzero(expected != got)
        raise IntegrityError(
            f"{what}: {len(bad)} differ, first at {bad[0]}: expected {expected[bad[0]]}, got {got[bad[0]]}"
        )


def check_integrity(
    groups: Sequence[Group], book: PageBook, requests: RequestTable, loose: Iterable[tuple[int, int, int]]
) -> None:
    """Raise IntegrityError unless all books of a ledger agree; changes nothing.

    Args:
        loose: (page, generation, forwards) of pages of no request that are being written.
    """
    _check_pages(groups, book, requests, loose)
    for group in groups:
        _check_group(book, group)
        for arena in group.arenas:
            _check_arena(group, arena)


def _check_pages(
    groups: Sequence[Group], book: PageBook, requests: RequestTable, loose: Iterable[tuple[int, int, int]]
) -> None:
    """References, protections, classes and the free list, from the requests' own lists."""
    size = book.num_pages + 1
    refs, soft, hard = (np.zeros(size, np.int32) for _ in range(3))
    hard[0] = 0
    for slot in range(requests.slots):
        listed = len(requests.pages[slot])
        _same(f"request {slot}: listed", listed, int(requests.listed[slot]))
        _same(f"request {slot}: generations", listed, len(requests.gens[slot]))
        tokens = int(requests.tokens[slot])
        if tokens < 0:
            _same(f"request {slot} lives not, pages", 0, listed)
            continue
        _same(f"request {slot}: pages for {tokens} tokens", -(-tokens // requests.page_size), listed)
        _same(f"request {slot}: window", requests.window_start(tokens), int(requests.window_from[slot]))
        pages = np.array(requests.pages[slot], np.int64)
        live = np.array(requests.gens[slot], np.int64) == book.gen_np[pages]
        index = np.arange(listed)
        written = index >= requests.hard_from[slot]
        shield = ((index < requests.sinks) | (index >= requests.window_from[slot])) & ~written
        np.add.at(refs, pages[live], 1)
        np.add.at(hard, pages[live & written], 1)
        np.add.at(hard if requests.protect_hard else soft, pages[live & shield], 1)
        if tokens % requests.page_size and not written[-1]:
            raise IntegrityError(f"request {slot}: partial tail page {pages[-1]} is not hard-protected")
        for group in groups:
            steps = group.step_np[pages[live & written]]
            if steps.any():
                raise IntegrityError(f"request {slot}: pages being written have steps {steps.tolist()}")
    for page, gen, _ in loose:
        hard[page] += book.gen[page] == gen
    _same_array("references", refs, np.frombuffer(book.refs, np.int32))
    _same_array("soft protections", soft, np.frombuffer(book.soft, np.int32))
    _same_array("hard protections", hard, np.frombuffer(book.hard, np.int32))
    free = np.array(book.free, np.int64)
    _same("different free pages", len(free), len(np.unique(free)))
    cls = np.where(hard > 0, HARD, np.where(soft > 0, SOFT, np.where(refs > 0, RUN, CACHED)))
    cls[free] = FREE
    cls[0] = HARD
    _same_array("classes", cls.astype(np.uint8), book.cls_np)
    _same("pages per class", np.bincount(cls[1:], minlength=NUM_CLASSES).tolist(), book.class_pages)
    if (refs + soft + hard)[free].any():
        raise IntegrityError("a free page is referenced or protected")


def _check_group(book: PageBook, group: Group) -> None:
    """Steps against classes, and that every page that may shrink is queued."""
    mapped = book.cls_np != FREE
    _same_array(f"group {group.index}: mapped pages", mapped, group.step_np >= 0)
    counts = np.bincount(group.step_np[1:][mapped[1:]], minlength=group.final + 1).tolist()
    _same(f"group {group.index}: pages per step", counts, group.step_pages)
    _same(f"group {group.index}: step of page 0", 0, group.step[0])
    ripe = set(book.ripe)
    queued = [[set(queue.keys()) for queue in queues] for queues in group.queues]
    may_shrink = (book.cls_np < NUM_QUEUED) & (group.step_np < group.final)
    for page in np.flatnonzero(may_shrink).tolist():
        cls, step = book.cls[page], group.step[page]
        if book.age[page] << PAGE_BITS | page in queued[cls][step]:
            continue
        if page not in ripe:
            raise IntegrityError(f"group {group.index}: page {page}, class {cls}, step {step} is not queued")


def _check_arena(group: Group, arena: Arena) -> None:
    """Blocks tile the arena; each is free once or owned by the page whose entry names it."""
    what = f"group {arena.group} arena {arena.index}"
    orders = [block_order(group.spec.arena_tier(arena.index, s)) for s in range(group.final + 1)]
    free_blocks = [0] * (TOP_ORDER + 1)
    free_at: list[set[int]] = [set() for _ in free_blocks]
    free_units = owned = unit = 0
    while unit < arena.units:
        mark = arena.head[unit]
        if not mark:
            raise IntegrityError(f"{what}: no block starts at unit {unit}: {bytes(arena.head[unit : unit + 8])!r}")
        order = mark - (BLOCK_USED if mark >= BLOCK_USED else BLOCK_FREE)
        if unit % (1 << order):
            raise IntegrityError(f"{what}: block of order {order} at unit {unit} is not aligned")
        if any(arena.head[unit + 1 : unit + (1 << order)]):
            raise IntegrityError(f"{what}: a block starts inside the one at unit {unit}, order {order}")
        if mark >= BLOCK_USED:
            page = arena.owner[unit]
            step = group.step[page]
            if step < 0:
                raise IntegrityError(f"{what}: unit {unit} belongs to page {page}, which is free")
            if arena.entry[page] != unit << STEP_BITS | step or orders[step] != order:
                raise IntegrityError(
                    f"{what}: entry of page {page}: expected unit {unit}, step {step}, order {orders[step]}, "
                    f"got {arena.entry[page]}, order {order}"
                )
            owned += 1
        else:
            free_blocks[order] += 1
            free_at[order].add(unit)
            free_units += 1 << order
            buddy = unit ^ (1 << order)
            if order < TOP_ORDER and arena.head[buddy] == mark:
                raise IntegrityError(f"{what}: free buddies {unit} and {buddy} of order {order} are apart")
        unit += 1 << order
    _same(f"{what}: free blocks per order", free_blocks, arena.count)
    _same(f"{what}: free units", free_units, arena.free_units)
    for order, units in enumerate(free_at):
        missing = units.difference(arena.queues[order])
        if missing:
            raise IntegrityError(f"{what}: free blocks of order {order} not listed: {sorted(missing)[:8]}")
    entries = arena.entry_np
    _same(f"{what}: mapped entries", owned, int((entries != UNMAPPED).sum()))
    _same_array(f"{what}: unmapped entries", group.step_np < 0, entries == UNMAPPED)
    mapped = entries[entries != UNMAPPED]
    _same_array(f"{what}: steps in entries", group.step_np[entries != UNMAPPED], (mapped & STEP_MASK).astype(np.int8))
    _same(f"{what}: entry of page 0", 0, arena.entry[0])
    if arena.free_units < UNITS_PER_SUPERBLOCK:
        raise IntegrityError(f"{what}: {arena.free_units} free units, expected one superblock at least")
