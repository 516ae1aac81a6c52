"""The ledger's contract, event by event: allocation, sharing, protection, order, figures, errors."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_pmkvq.formats import STEP_BITS, UNMAPPED, page_bytes, page_elements
from sglang_pmkvq.ledger import Ledger, LedgerError, PolicyConfig, Replay
from sglang_pmkvq.ledger.pages import CACHED, FREE, HARD, RUN, SOFT
from sglang_pmkvq.ledger.policy import active_step
from tests.ledger_driver import GROUPS, SHAPE, P, make_geometry

NONE = np.empty(0, np.int64)


def ledger(groups: str = "4", pages: int = 32, hard: int = 8, **policy: object) -> Ledger:
    config = PolicyConfig(**{"window_tokens": 32, **policy})  # type: ignore[arg-type]
    return Ledger(make_geometry(groups, pages, hard), config, max_requests=4)


def prefill(book: Ledger, slot: int, tokens: int, prefix: np.ndarray = NONE) -> np.ndarray:
    pages = book.extend([slot], [prefix], [len(prefix) * P], [tokens])
    assert pages is not None
    return pages


def steps(book: Ledger, pages: np.ndarray) -> list[int]:
    return book.page_steps(pages)[0].tolist()


def decode_to(book: Ledger, slot: int, tokens: int) -> None:
    while book.requests.tokens[slot] < tokens:
        now = int(book.requests.tokens[slot]) + 1
        assert book.append(np.array([slot]), np.array([now])) is not None


def test_page_zero_is_mapped_at_start_and_never_allocated() -> None:
    book = ledger("8+k4v2")
    batch = book.drain()
    assert not batch.waves
    assert {(u.group, u.arena) for u in batch.table} == {(0, 0), (1, 0), (1, 1)}
    for update in batch.table:
        assert update.page.tolist() == [0]
        assert update.entry.tolist() == [0]
    born = prefill(book, 0, 8 * P).tolist()
    for n in range(8 * P + 1, 32 * P + 1):
        new = book.append(np.array([0]), np.array([n]))
        assert new is not None
        born.extend(new.tolist())
    assert sorted(born) == list(range(1, 33))
    assert book.free_page_count == 0
    book.check_integrity()
    assert all(book.entries(g, a)[0] == 0 for g, a in ((0, 0), (1, 0), (1, 1)))


@pytest.mark.parametrize("tokens", [1, P - 1, P, P + 1, 3 * P])
def test_extend_and_append_allocate_as_a_paged_allocator_does(tokens: int) -> None:
    book = ledger("8", pages=64)
    pages = prefill(book, 1, tokens)
    assert pages.dtype == np.int64
    assert len(pages) == -(-tokens // P)
    for n in range(tokens + 1, tokens + 2 * P + 1):
        new = book.append(np.array([1]), np.array([n]))
        assert new is not None
        assert len(new) == (n % P == 1)
    assert len(book.pages_of(1)) == -(-(tokens + 2 * P) // P)
    assert book.free_page_count == 64 - len(book.pages_of(1))


def test_new_pages_come_in_batch_order() -> None:
    book = ledger("8", pages=64)
    new = book.extend([2, 0, 3], [NONE] * 3, [0, 0, 0], [P + 1, 3, 2 * P])
    assert new is not None
    assert len(new) == 2 + 1 + 2
    assert np.concatenate([book.pages_of(s) for s in (2, 0, 3)]).tolist() == new.tolist()
    slots, lens = np.array([3, 2, 0]), np.array([2 * P + 1, P + 2, 4])
    born = book.append(slots, lens)
    assert born is not None
    assert book.pages_of(3)[-1] == born[0]
    assert len(born) == 1


def test_entries_equal_what_the_batches_wrote() -> None:
    book = ledger("8+k4v2", pages=24)
    replay = Replay(book.geometry)
    replay.run(book.drain())
    for slot in range(2):
        born = prefill(book, slot, 8 * P)
        replay.run(book.drain(), born)
    decode = [(np.array([0, 1]), np.array([n, n])) for n in range(8 * P + 1, 12 * P + 1)]
    for slots, lens in decode:
        new = book.append(slots, lens)
        assert new is not None
        replay.run(book.drain(), new)
    assert book.free_page_count == 0
    for g, arenas in enumerate(replay.tables):
        for a, table in enumerate(arenas):
            assert np.array_equal(table, book.entries(g, a))
    assert replay.copies > 0


def test_none_when_logical_pages_are_lacking_changes_nothing_else() -> None:
    book = ledger("4", pages=4)
    held = prefill(book, 0, 3 * P)
    assert book.extend([1], [NONE], [0], [2 * P]) is None
    assert book.extend([1], [held[:1]], [P], [4 * P]) is None
    assert book.pages_of(1).tolist() == held[:1].tolist()
    book.finish(1)
    assert book.append(np.array([0]), np.array([3 * P + 1])) is not None
    decode_to(book, 0, 4 * P)
    assert book.append(np.array([0]), np.array([4 * P + 1])) is None
    assert book.requests.tokens[0] == 4 * P
    book.check_integrity()


def test_double_free_and_bad_pages_raise_and_free_nothing() -> None:
    book = ledger()
    pages = prefill(book, 0, 3 * P)
    book.free(pages[:1])
    for bad in ([pages[1], pages[0]], [pages[1], 0], [pages[1], 33], [pages[1], -1], [pages[1], pages[1]]):
        with pytest.raises(LedgerError, match=r"free of|double free"):
            book.free(np.array(bad))
        assert book.free_page_count == 32 - 2
    book.free(NONE)


def test_freed_pages_still_listed_are_harmless_even_when_reborn() -> None:
    book = ledger("4", pages=8)
    mine = prefill(book, 0, 2 * P)
    book.free(mine[:1])
    other = prefill(book, 1, 7 * P)
    assert mine[0] in other
    book.rebind(0, np.array([other[0], mine[1]]))
    book.check_integrity()
    book.finish(0)
    assert book.book.cls[mine[1]] == CACHED
    assert book.book.refs[other[0]] == 1
    book.check_integrity()


def test_extending_over_free_pages_is_refused() -> None:
    book = ledger()
    pages = prefill(book, 0, 2 * P)
    book.finish(0)
    book.free(pages[:1])
    with pytest.raises(LedgerError, match="free pages"):
        book.extend([1], [pages], [2 * P], [3 * P])


def test_arguments_are_checked() -> None:
    book = ledger()
    with pytest.raises(ValueError, match="slot must be in 0..4"):
        book.extend([5], [NONE], [0], [3])
    with pytest.raises(ValueError, match="prefix of 17 tokens in 1 pages"):
        book.extend([0], [np.array([1])], [17], [18])
    with pytest.raises(ValueError, match="0 <= prefix < seq"):
        book.extend([0], [NONE], [0], [0])
    with pytest.raises(ValueError, match="do not follow"):
        book.append(np.array([0]), np.array([2]))
    prefill(book, 0, P)
    with pytest.raises(ValueError, match="do not follow"):
        book.append(np.array([0]), np.array([P + 2]))
    with pytest.raises(ValueError, match="rebind of slot 0 to 2 pages, which lists 1"):
        book.rebind(0, np.array([1, 2]))
    with pytest.raises(ValueError, match="rebind of slot 1"):
        book.rebind(1, NONE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "lru"), ("protect", "none"), ("min_active_bits", 3), ("window_tokens", -1), ("sink_tokens", -1)],
)
def test_policy_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        PolicyConfig(**{field: value})  # type: ignore[arg-type]


def test_protection_of_a_running_request() -> None:
    book = ledger("4", pages=64, window_tokens=32, sink_tokens=1)
    prefill(book, 0, 10 * P + 3)
    pages = book.pages_of(0)
    assert [book.book.cls[p] for p in pages] == [HARD] * 11
    # The next tick: the chunk is written; 3 + 32 tokens of window start in page 8.
    prefill(book, 1, 1)
    assert [book.book.cls[p] for p in pages] == [SOFT] + [RUN] * 7 + [SOFT] * 2 + [HARD]
    decode_to(book, 0, 11 * P)
    assert [book.book.cls[p] for p in book.pages_of(0)] == [SOFT] + [RUN] * 8 + [SOFT] + [HARD]
    decode_to(book, 0, 11 * P + 1)
    assert [book.book.cls[p] for p in book.pages_of(0)] == [SOFT] + [RUN] * 8 + [SOFT] * 2 + [HARD]
    stats = book.stats()
    assert (stats.hard_pages, stats.soft_pages, stats.running_requests) == (2, 3, 2)
    book.finish(0)
    assert [book.book.cls[p] for p in pages] == [CACHED] * 11
    book.free(pages)
    assert [book.book.cls[p] for p in pages] == [FREE] * 11


def test_window_zero_leaves_only_the_partial_tail() -> None:
    book = ledger("4", pages=64, window_tokens=0, sink_tokens=0)
    prefill(book, 0, 3 * P)
    decode_to(book, 0, 4 * P + 1)
    assert [book.book.cls[p] for p in book.pages_of(0)] == [RUN] * 4 + [HARD]


def test_a_shared_page_keeps_the_strongest_protection_and_shrinks_once() -> None:
    book = ledger("4", pages=64, hard=1, window_tokens=32, sink_tokens=0)
    prefix = prefill(book, 0, 4 * P)
    book.finish(0)
    for slot in (1, 2, 3):
        prefill(book, slot, (5 + 5 * (slot == 3)) * P, prefix)
    prefill(book, 0, 1)
    # In the window of requests 1 and 2 (tokens 48..80), not of request 3.
    assert book.book.cls[prefix[3]] == SOFT
    assert book.book.refs[prefix[3]] == 3
    book.finish(1)
    book.finish(2)
    assert book.book.cls[prefix[3]] == RUN
    book.finish(3)
    assert [book.book.cls[p] for p in prefix] == [CACHED] * 4
    # Under pressure it is one page for all: each of the prefix shrinks once, for whoever shares it.
    prefill(book, 1, 5 * P, prefix)
    prefill(book, 2, 5 * P, prefix)
    while not book.page_steps(prefix[:3]).all():
        prefill(book, 3, P)
        book.finish(3)
    assert steps(book, prefix) == [1] * 3 + [0]
    assert all(book.pages_of(slot)[:4].tolist() == prefix.tolist() for slot in (1, 2))
    book.check_integrity()


def test_cached_pages_shrink_first_and_oldest_first() -> None:
    book = ledger("4", pages=32, hard=1, window_tokens=0, sink_tokens=0, min_active_bits=2)
    old = prefill(book, 0, 4 * P)
    young = prefill(book, 1, 4 * P)
    book.finish(1)
    book.finish(0)
    running = prefill(book, 2, 2 * P)
    while not any(steps(book, np.concatenate([old, young, running]))):
        prefill(book, 3, P)
        book.finish(3)
    assert steps(book, old)[0] == 1
    while book.page_steps(running).max() == 0:
        prefill(book, 3, P)
        book.finish(3)
    cached = np.flatnonzero((book.book.cls_np == CACHED) & (book.book.age_np < book.tick))
    assert len(cached) > 8
    assert (book.page_steps(cached) == 2).all(), "cached pages reach their final step before a running one shrinks"


def test_a_hit_makes_a_prefix_young_again() -> None:
    book = ledger("8", pages=64, window_tokens=0, sink_tokens=0)
    first = prefill(book, 0, 4 * P)
    book.finish(0)
    second = prefill(book, 0, 4 * P)
    book.finish(0)
    assert book.book.age[first[0]] < book.book.age[second[0]]
    prefill(book, 1, 5 * P, first)
    book.finish(1)
    assert book.book.age[first[0]] > book.book.age[second[0]]
    while not book.page_steps(np.concatenate([first, second])).any():
        prefill(book, 2, P)
        book.finish(2)
    assert steps(book, second)[0] == 1
    assert steps(book, first) == [0] * 4


def test_cached_pages_are_evicted_before_running_ones_fall_below_the_floor() -> None:
    book = ledger("2", pages=64, window_tokens=0, sink_tokens=0, min_active_bits=8)
    cached: list[int] = []

    def evict(n: int) -> int:
        gone, cached[:] = cached[:n], cached[n:]
        book.free(np.array(gone, np.int64))
        return len(gone)

    book.evict = evict
    for _ in range(4):
        cached.extend(prefill(book, 0, 5 * P).tolist())
        book.finish(0)
    for n in range(1, 40 * P):
        if n == 1:
            prefill(book, 1, 1)
        else:
            assert book.append(np.array([1]), np.array([n])) is not None
        lowest, mean = book.request_bits(1)
        if cached:
            assert lowest >= 8
        book.check_integrity()
    assert not cached
    assert book.stats().evict_requests > 0
    assert book.stats().evicted_pages == 20
    assert lowest < 8
    assert mean < 16


def test_an_evict_that_frees_nothing_is_asked_once_and_never_harms() -> None:
    calls: list[int] = []
    book = ledger("2", pages=32, hard=1, window_tokens=0, sink_tokens=0)
    book.evict = lambda n: calls.append(n) or 0  # type: ignore[func-returns-value]
    prefill(book, 0, 4 * P)
    book.finish(0)
    prefill(book, 1, 4 * P)
    decode_to(book, 1, 28 * P)
    assert book.request_bits(1)[0] == 2
    assert 0 < len(calls) <= 24
    assert book.stats().evict_requests == 0
    book.check_integrity()


def test_uniform_shrinks_a_whole_step_at_once() -> None:
    book = ledger("4", pages=32, policy="uniform", window_tokens=0, sink_tokens=0)
    prefill(book, 0, 4 * P)
    counts = set()
    for n in range(4 * P + 1, 32 * P + 1):
        assert book.append(np.array([0]), np.array([n])) is not None
        now = steps(book, book.pages_of(0)[:-1])
        assert now == sorted(now, reverse=True)
        if max(now) and now.count(now[0]) < len(now):
            counts.add(now.count(now[0]))
    # Three quantization events at most lie between 16 and 4 bits for a pool that fills once.
    assert 1 <= len(counts) <= 8


def test_static_goes_to_its_final_step_when_it_leaves_the_window() -> None:
    book = ledger("k4v2", pages=64, policy="static", window_tokens=2 * P, sink_tokens=0)
    prefill(book, 0, 6 * P)
    assert steps(book, book.pages_of(0)) == [0] * 6
    decode_to(book, 0, 6 * P + 1)
    assert steps(book, book.pages_of(0)) == [3] * 4 + [0] * 3
    batch = book.drain()
    tiers = {
        (c.arena, int(s), int(d)) for w in batch.waves for c in w for s, d in zip(c.src_tier, c.dst_tier, strict=True)
    }
    assert tiers == {(0, 16, 4), (1, 16, 2)}
    book.finish(0)
    prefill(book, 1, 1)
    assert steps(book, np.array([1, 2, 3, 4, 5, 6])) == [3] * 6


def test_static_waits_once_until_enough_tokens_may_shrink() -> None:
    book = ledger("4", pages=64, policy="static", window_tokens=0, sink_tokens=0, first_shrink_tokens=8 * P - 1)
    prefill(book, 0, 5 * P)
    prefill(book, 1, 3 * P, book.pages_of(0)[:2])
    book.drain()
    decode_to(book, 0, 7 * P)
    assert not any(steps(book, book.pages_of(0))), "shared pages count once, and one is being written"
    decode_to(book, 0, 7 * P + 1)
    assert steps(book, book.pages_of(0)) == [2] * 7 + [0] and steps(book, book.pages_of(1))[2] == 2
    book.clear()
    prefill(book, 0, P)
    decode_to(book, 0, P + 1)
    assert steps(book, book.pages_of(0)) == [2, 0], "it had waited long enough"
    book.check_integrity()


def test_static_does_not_wait_once_bytes_are_short() -> None:
    """Nothing is retracted for it; after a flush it waits again."""
    book = ledger("2", pages=64, policy="static", window_tokens=0, sink_tokens=0, first_shrink_tokens=1 << 20)
    for _ in range(2):
        prefill(book, 0, 4 * P)
        decode_to(book, 0, 5 * P)
        assert not any(steps(book, book.pages_of(0)))
        decode_to(book, 0, 64 * P)
        assert steps(book, book.pages_of(0)) == [3] * 63 + [0]
        book.check_integrity()
        book.clear()


def test_hard_protection_keeps_sinks_and_window_at_16_bits() -> None:
    book = ledger("2", pages=64, hard=4, protect="hard", window_tokens=2 * P, sink_tokens=1)
    prefill(book, 0, 3 * P)
    decode_to(book, 0, 64 * P)
    final = steps(book, book.pages_of(0))
    assert final[0] == 0
    assert final[-2:] == [0, 0]
    assert max(final) == 3


def test_more_hard_pages_than_the_bound_is_an_error_with_numbers() -> None:
    book = ledger("2", pages=64, hard=4)
    with pytest.raises(LedgerError, match="hard-protected pages"):
        prefill(book, 0, 30 * P)


def test_a_partial_page_must_still_be_whole_to_be_written_again() -> None:
    book = ledger("8", pages=32, window_tokens=0, sink_tokens=0)
    page = prefill(book, 0, 3)
    book.finish(0)
    while not book.page_steps(page).any():
        prefill(book, 1, P)
        book.finish(1)
    with pytest.raises(LedgerError, match="to be written"):
        book.extend([2], [page], [3], [4])


def test_rebind_keeps_the_page_of_a_token_in_flight() -> None:
    book = ledger("8", pages=32)
    tree = prefill(book, 0, 2 * P)
    book.finish(0)
    mine = prefill(book, 1, 2 * P)
    decode_to(book, 1, 2 * P + 1)
    tail = book.pages_of(1)[2]
    book.free(mine)
    book.rebind(1, tree)
    assert book.pages_of(1).tolist() == [*tree.tolist(), tail]
    assert book.book.cls[tail] == HARD
    assert book.append(np.array([1]), np.array([2 * P + 2])) is not None
    book.check_integrity()


def test_ownerless_pages_stay_hard_while_no_forward_is_issued() -> None:
    """Calls that find no pages and are made again advance the tick, but nothing was written yet."""
    book = ledger("8", pages=32)
    held = NONE
    for chunk in range(1, 10):
        held = np.concatenate((held, prefill(book, 0, 3 * chunk * P, held)))
        book.drain()
    pages = book.alloc(2)
    assert pages is not None
    for _ in range(3):
        assert book.extend([1], [np.empty(0, np.int64)], [0], [8 * P]) is None
    assert [book.book.cls[p] for p in pages] == [HARD] * 2


def test_ownerless_pages_are_hard_for_one_forward() -> None:
    book = ledger("8", pages=32)
    pages = book.alloc(2)
    assert pages is not None
    assert [book.book.cls[p] for p in pages] == [HARD] * 2
    prefill(book, 0, 1)
    assert [book.book.cls[p] for p in pages] == [HARD] * 2
    book.drain()
    decode_to(book, 0, 2)
    assert [book.book.cls[p] for p in pages] == [CACHED] * 2
    assert book.alloc(40) is None
    with pytest.raises(ValueError, match="negative"):
        book.alloc(-1)


def test_clear_brings_every_table_entry() -> None:
    book = ledger("8+k4v2", pages=24)
    replay = Replay(book.geometry)
    born = prefill(book, 0, 6 * P)
    replay.run(book.drain(), born)
    prefill(book, 1, 7 * P)
    book.clear()
    batch = book.drain()
    assert batch.waves == ()
    replay.run(batch)
    for arenas in replay.tables:
        for table in arenas:
            assert table[0] == 0
            assert (table[1:] == UNMAPPED).all()
    assert book.free_page_count == 24
    assert book.running_requests == 0
    book.check_integrity()
    born = prefill(book, 0, 6 * P)
    replay.run(book.drain(), born)
    replay.check(book.book.cls_np != FREE)


@pytest.mark.parametrize("groups", sorted(GROUPS))
def test_stats_agree_with_the_page_arithmetic(groups: str) -> None:
    book = ledger(groups, pages=40)
    layers = len(GROUPS[groups])
    prefill(book, 0, 6 * P)
    samples: list[tuple[int, int]] = []
    for n in range(6 * P + 1, 36 * P):
        assert book.append(np.array([0]), np.array([n])) is not None
        pages = book.pages_of(0)
        total = sum(page_bytes(SHAPE, g.spec, int(s)) for g in book.groups for s in g.step_np[pages])
        samples.append((total, len(pages)))
        stats = book.stats()
        assert stats.used_bytes == total
        assert book.running_bytes == total
        assert stats.effective_bits == pytest.approx(8 * total / (len(pages) * page_elements(SHAPE, layers)))
        assert sum(stats.pages.values()) == pytest.approx(len(pages))
        assert sum(stats.block_bytes.values()) + stats.side_bytes == total
        assert all(0 <= arena.free_units <= arena.units for arena in book.arenas)
    first = sum(page_bytes(SHAPE, g.spec, 0) for g in book.groups)
    weights = [(6 * first, 6), *samples]
    bits = 8 / page_elements(SHAPE, layers)
    assert stats.effective_bits_avg == pytest.approx(bits * sum(t for t, _ in weights) / sum(p for _, p in weights))
    assert stats.effective_bits_peak == pytest.approx(bits * max(t / p for t, p in weights))
    assert stats.used_bytes_avg == pytest.approx(sum(t for t, _ in weights) / len(weights))
    assert stats.used_bytes_peak == max(t for t, _ in weights)
    assert stats.tick == len(samples) + 1
    lowest, mean = book.request_bits(0)
    assert lowest == min(t for t, n in stats.pages.items() if n)
    assert mean == pytest.approx(sum(t * n for t, n in stats.pages.items()) / stats.mapped_pages)
    shrunk = sum(stats.shrunk_bytes.values())
    assert shrunk == len(pages) * first - sum(stats.block_bytes.values())


def test_running_bytes_count_a_shared_page_for_each_reader_and_no_cached_one() -> None:
    book = ledger("2", pages=40, window_tokens=0, sink_tokens=0)
    one = page_bytes(SHAPE, book.groups[0].spec, 0)
    shared = prefill(book, 0, 4 * P)
    prefill(book, 1, 6 * P, shared)
    assert book.running_bytes == (4 + 6) * one
    book.finish(0)
    assert book.running_bytes == 6 * one
    assert book.stats().mapped_pages == 6
    book.finish(1)
    assert book.running_bytes == 0


def test_active_step_is_clamped_by_what_the_group_can_do() -> None:
    assert active_step(((16, 16), (8, 8)), 8) == 1
    assert active_step(((16, 16), (8, 8), (4, 4)), 8) == 1
    assert active_step(((16, 16), (16, 8), (8, 4), (4, 2)), 8) == 1
    assert active_step(((16, 16), (16, 8), (8, 4), (4, 2)), 2) == 3
    assert active_step(((16, 16), (8, 8)), 16) == 0
    assert active_step(((16, 16),), 2) == 0


def test_entry_packs_unit_and_step() -> None:
    book = ledger("4", pages=16, window_tokens=0, sink_tokens=0)
    prefill(book, 0, 4 * P)
    decode_to(book, 0, 16 * P)
    entries = book.entries(0, 0)
    pages = book.pages_of(0)
    assert (entries[pages] & 3).tolist() == steps(book, pages)
    units = entries[pages] >> STEP_BITS
    assert len(set(units.tolist())) == 16


def test_mixed_batch_protects_the_chunk_until_its_forward() -> None:
    """An ``extend`` and an ``append`` before one forward: the chunk's pages are not written yet."""
    book = ledger("4", pages=64, window_tokens=0, sink_tokens=0)
    prefill(book, 0, 2 * P)
    book.drain()
    chunk = prefill(book, 1, 4 * P)
    assert book.append(np.array([0]), np.array([2 * P + 1])) is not None
    assert [book.book.cls[p] for p in chunk] == [HARD] * 4
    book.drain()
    assert book.append(np.array([0, 1]), np.array([2 * P + 2, 4 * P + 1])) is not None
    assert [book.book.cls[p] for p in chunk] == [RUN] * 4


def test_written_pages_are_whole_and_nobody_writes_them() -> None:
    """Not what a forward is about to write, nor a partial tail, nor what is free."""
    book = ledger()
    first = prefill(book, 1, 3 * P + 5)
    assert book.written_pages().tolist() == []
    book.drain()
    second = prefill(book, 2, P)
    assert book.written_pages().tolist() == sorted(first[:3].tolist())
    book.drain()
    book.finish(1)
    book.free(first[2:])
    decode_to(book, 2, P + 1)
    assert book.written_pages().tolist() == sorted([*first[:2].tolist(), *second.tolist()])
