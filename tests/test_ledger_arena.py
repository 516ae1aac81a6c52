"""Buddy blocks, compaction, waves, and the checkers themselves: planted faults must be found."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_pmkvq.commands import ArenaCopies, CommandBatch
from sglang_pmkvq.formats import UNITS_PER_SUPERBLOCK, tier_units
from sglang_pmkvq.ledger import IntegrityError, Ledger, LedgerError, PolicyConfig, Replay, ReplayError
from sglang_pmkvq.ledger.agequeue import AgeQueue
from sglang_pmkvq.ledger.arena import TOP_ORDER, Arena
from sglang_pmkvq.ledger.pages import FREE
from sglang_pmkvq.ledger.waves import LOC_SHIFT, MAX_WAVES, PAGE_SHIFT, CommandLog, copy_tag
from tests.ledger_driver import GROUPS, OPS, WEIGHTS, P, World, make_geometry

NONE = np.empty(0, np.int64)


def drive(world: World, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ops = rng.choice(len(OPS), steps, p=np.array(WEIGHTS) / sum(WEIGHTS))
    for op, (a, b, c) in zip(ops, rng.integers(0, 1 << 16, (steps, 3)).tolist(), strict=True):
        world.step(OPS[op], a, b, c)


@pytest.mark.parametrize("policy", ["age", "uniform", "static"])
@pytest.mark.parametrize("groups", sorted(GROUPS))
def test_every_group_can_be_driven_to_exactly_full(groups: str, policy: str) -> None:
    """N pages exist at once, R of them hard at 16 bits, and no byte is lacking on the way."""
    pages, requests, chunk = 96, 4, 4 * P
    hard = requests + chunk // P
    geometry = make_geometry(groups, pages, hard)
    config = PolicyConfig(policy=policy, window_tokens=3 * P)  # type: ignore[arg-type]
    book, replay = Ledger(geometry, config, requests), Replay(geometry)
    replay.run(book.drain())
    lens = [0] * requests
    most_hard = 0
    # Chunk after chunk for the request that is behind, then single tokens to the last page.
    while book.free_page_count >= chunk // P:
        slot = min(range(requests), key=lambda s: lens[s])
        held = book.pages_of(slot)
        new = book.extend([slot], [held], [lens[slot]], [lens[slot] + chunk])
        assert new is not None
        lens[slot] += chunk
        most_hard = max(most_hard, book.book.hard_pages)
        replay.run(book.drain(), new)
        book.check_integrity()
    while True:
        new = book.append(np.arange(requests), np.array(lens) + 1)
        if new is None:
            break
        lens = [n + 1 for n in lens]
        replay.run(book.drain(), new)
        replay.check(book.book.cls_np != FREE)
        book.check_integrity()
    assert book.free_page_count < requests
    while book.free_page_count:
        # The last pages, one request at a time.
        slot = requests - book.free_page_count
        target = (lens[slot] // P) * P + P + 1
        while lens[slot] < target:
            lens[slot] += 1
            new = book.append(np.array([slot]), np.array([lens[slot]]))
            assert new is not None
            replay.run(book.drain(), new)
            if len(new):
                break
    replay.check(book.book.cls_np != FREE)
    book.check_integrity()
    assert book.stats().mapped_pages == pages
    assert most_hard <= hard
    if groups != "16":
        for arena in book.arenas:
            # Of the reserve, only what is hard now is still spent.
            assert arena.units - arena.free_units <= arena.units - UNITS_PER_SUPERBLOCK


@pytest.mark.parametrize("groups", ["8", "4", "2", "k4v2"])
@pytest.mark.parametrize("policy", ["age", "uniform", "static"])
def test_n_shrinks_take_log_n_waves(groups: str, policy: str) -> None:
    """One large chunk at the fullest moment shrinks hundreds of pages in one batch."""
    pages, chunk = 2048, 256
    geometry = make_geometry(groups, pages, chunk + 2)
    book = Ledger(geometry, PolicyConfig(policy=policy, window_tokens=0, sink_tokens=0), 2)  # type: ignore[arg-type]
    replay = Replay(geometry)
    replay.run(book.drain())
    most = 0
    while book.free_page_count >= chunk:
        new = book.extend([0], [NONE], [0], [chunk * P])
        assert new is not None
        book.finish(0)
        batch = book.drain()
        copies = sum(len(c.page) for wave in batch.waves for c in wave)
        most = max(most, copies)
        # Space doubles per wave of one level of shrinks, a batch crosses two levels at most per
        # arena, and a superblock made by moves takes three waves more.
        assert len(batch.waves) <= 2 * math.log2(copies + 1) + 3, f"{copies} copies"
        replay.run(batch, new)
        replay.check(book.book.cls_np != FREE)
    assert most > 100


def test_moves_make_a_superblock_out_of_single_units() -> None:
    """Free units scattered over all superblocks: the worst case for compaction, at its stated cost."""
    geometry = make_geometry("2", 128, 2)
    book = Ledger(geometry, PolicyConfig(window_tokens=0, sink_tokens=0, min_active_bits=2), 2)
    replay = Replay(geometry)
    replay.run(book.drain())
    while book.free_page_count:
        new = book.extend([0], [NONE], [0], [P])
        assert new is not None
        book.finish(0)
        replay.run(book.drain(), new)
    arena = book.arenas[0]
    # One page of each superblock that holds eight goes: no buddies, single units only.
    singles: dict[int, int] = {}
    for page in range(1, 129):
        unit = int(arena.entry[page]) >> 2
        if book.groups[0].step[page] == 3:
            singles.setdefault(unit // UNITS_PER_SUPERBLOCK, page)
    assert len(singles) > 8
    book.free(np.array(list(singles.values())))
    while True:
        before = (arena.moves, arena.moved_units)
        whole = arena.count[TOP_ORDER]
        if book.free_page_count < 8:
            break
        new = book.extend([0], [NONE], [0], [P])
        assert new is not None
        made = max(0, 1 - whole)
        assert arena.moved_units - before[1] <= 12 * max(1, made)
        book.finish(0)
        replay.run(book.drain(), new)
        replay.check(book.book.cls_np != FREE)
        book.check_integrity()
    assert arena.moves > 0


def test_moves_stay_below_a_superblock_per_born_page_in_service() -> None:
    for groups in ("2", "k4v2", "4"):
        world = World(groups, PolicyConfig(window_tokens=32), num_pages=64, checks=False)
        drive(world, 4000, 3)
        born = world.ledger.book.gen_np.sum() + world.ledger.book.mapped_pages
        for arena in world.ledger.arenas:
            assert arena.moved_units <= UNITS_PER_SUPERBLOCK * born


def test_arena_without_room_says_so() -> None:
    book = Ledger(make_geometry("4", 8, 1), PolicyConfig(), 1)
    arena = book.arenas[0]
    arena.birth(list(range(1, arena.count[TOP_ORDER] + 1)))
    with pytest.raises(LedgerError, match="no block of order 2 can be made"):
        arena._take(2)


def test_age_queue_sweep_keeps_live_keys_once() -> None:
    queue = AgeQueue()
    queue.line.extend([1, 1, 4, 9])
    queue.heap.extend([2, 4, 3])
    queue.sweep(lambda key: key != 9)
    assert sorted(queue.keys()) == [1, 2, 3, 4]
    assert list(queue.line) == [1, 4]
    assert len(queue) == 4


def test_queues_stay_bounded_while_pages_come_and_go() -> None:
    """Lazy deletion must not remember every page that ever was."""
    world = World("2", PolicyConfig(window_tokens=32), num_pages=64, checks=False)
    drive(world, 12000, 5)
    ledger = world.ledger
    for group in ledger.groups:
        for queues in group.queues:
            assert all(len(queue) <= 2 * ledger.num_pages + 1100 for queue in queues)
    for arena in ledger.arenas:
        assert all(len(queue) <= 2 * arena.units + 1100 for queue in arena.queues)
    ledger.check_integrity()


def test_two_ledgers_fed_the_same_events_emit_the_same_commands() -> None:
    for policy in ("age", "uniform", "static"):
        worlds = []
        for _ in range(2):
            config = PolicyConfig(policy=policy, window_tokens=32)  # type: ignore[arg-type]
            world = World("8+k4v2", config, checks=False)
            world.keep_batches = True
            drive(world, 1500, 11)
            worlds.append(world)
        first, second = (world.batches for world in worlds)
        assert len(first) == len(second) > 500
        copies = 0
        for one, two in zip(first, second, strict=True):
            assert [len(wave) for wave in one.waves] == [len(wave) for wave in two.waves]
            for a, b in zip(
                [c for wave in one.waves for c in wave], [c for wave in two.waves for c in wave], strict=True
            ):
                copies += len(a.page)
                assert (a.group, a.arena) == (b.group, b.arena)
                for name in ("page", "src_unit", "dst_unit", "src_tier", "dst_tier"):
                    assert np.array_equal(getattr(a, name), getattr(b, name))
                    assert getattr(a, name).dtype == getattr(b, name).dtype
            for u, v in zip(one.table, two.table, strict=True):
                assert (u.group, u.arena) == (v.group, v.arena)
                assert np.array_equal(u.page, v.page)
                assert np.array_equal(u.entry, v.entry)
        assert copies > 200


def test_command_arrays_have_the_stated_types() -> None:
    world = World("k4v2", PolicyConfig(window_tokens=32), checks=False)
    world.keep_batches = True
    drive(world, 600, 2)
    copies = [c for batch in world.batches for wave in batch.waves for c in wave]
    assert copies
    for c in copies:
        assert (c.page.dtype, c.src_unit.dtype, c.dst_unit.dtype) == (np.int32,) * 3
        assert (c.src_tier.dtype, c.dst_tier.dtype) == (np.uint8,) * 2
        for unit, tier in zip(c.dst_unit.tolist(), c.dst_tier.tolist(), strict=True):
            assert unit % tier_units(tier) == 0
    for batch in world.batches:
        for update in batch.table:
            assert (update.page.dtype, update.entry.dtype) == (np.int32,) * 2


# ------------------------------------------------------------------ planted faults


def one_wave(batch: CommandBatch) -> CommandBatch:
    """All copies of a batch in a single wave: what a device that skips the wave barrier would do."""
    if len(batch.waves) < 2:
        return batch
    merged: dict[tuple[int, int], list[ArenaCopies]] = {}
    for wave in batch.waves:
        for copies in wave:
            merged.setdefault((copies.group, copies.arena), []).append(copies)
    wave = tuple(
        ArenaCopies(
            g,
            a,
            *(
                np.concatenate([getattr(c, name) for c in parts])
                for name in ArenaCopies.__dataclass_fields__
                if name not in ("group", "arena")
            ),
        )
        for (g, a), parts in merged.items()
    )
    return replace(batch, waves=(wave,))


def test_mutation_skipped_wave_is_found() -> None:
    world = World("2", PolicyConfig(policy="uniform", window_tokens=32))
    world.change_batch = one_wave
    with pytest.raises(ReplayError, match=r"in use in this wave|expected in unit"):
        drive(world, 2000, 1)


def test_mutation_dropped_wave_is_found() -> None:
    world = World("4", PolicyConfig(window_tokens=32))
    world.change_batch = lambda batch: replace(batch, waves=batch.waves[1:])
    with pytest.raises(ReplayError, match="expected in unit"):
        drive(world, 2000, 1)


def test_mutation_leaked_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Arena._release
    calls = 0

    def leaky(self: Arena, unit: int, order: int, stamp: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 40:
            release(self, unit, order, stamp)

    monkeypatch.setattr(Arena, "_release", leaky)
    with pytest.raises(IntegrityError, match=r"which is free|no block starts|free units|mapped entries|entry of page"):
        drive(World("4", PolicyConfig(window_tokens=32)), 2000, 1)


def test_mutation_lost_table_entry_is_found() -> None:
    world = World("4", PolicyConfig(window_tokens=32))
    world.change_batch = lambda batch: replace(
        batch, table=tuple(replace(u, page=u.page[1:], entry=u.entry[1:]) for u in batch.table)
    )
    with pytest.raises(ReplayError, match=r"against the books|expected in unit"):
        drive(world, 200, 1)


def test_mutation_forgotten_reference_is_found() -> None:
    world = World("4", PolicyConfig(window_tokens=32))
    drive(world, 60, 1)
    running = [r for r in world.running if r.pages]
    assert running
    world.ledger.book.refs[running[0].pages[0]] += 1
    with pytest.raises(IntegrityError, match="references: 1 differ"):
        world.ledger.check_integrity()


def test_mutation_unqueued_page_is_found() -> None:
    world = World("2", PolicyConfig(window_tokens=0))
    drive(world, 80, 4)
    for group in world.ledger.groups:
        for queues in group.queues:
            for queue in queues:
                queue.clear()
    with pytest.raises(IntegrityError, match="is not queued"):
        world.ledger.check_integrity()


def test_mutation_wrong_age_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_pmkvq.ledger.group import Group

    oldest = Group.take_oldest

    def youngest(self: Group, cls: int, step: int, n: int) -> list[int]:
        every = oldest(self, cls, step, 1 << 30)
        self.queue(every[: max(0, len(every) - n)])
        return every[max(0, len(every) - n) :]

    monkeypatch.setattr(Group, "take_oldest", youngest)
    with pytest.raises(AssertionError, match="a younger page shrank first"):
        drive(World("4", PolicyConfig(window_tokens=32)), 2000, 1)


def test_replay_refuses_a_move_of_a_hard_page_and_a_page_that_gains_precision() -> None:
    replay = Replay(make_geometry("4", 8, 2))
    one = np.array([1], np.int32)
    for src, dst in ((16, 16), (4, 8)):
        copies = ArenaCopies(0, 0, one, one * 8, one * 16, np.array([src], np.uint8), np.array([dst], np.uint8))
        with pytest.raises(ReplayError, match=f"from {src} to {dst} bits"):
            replay.run(CommandBatch(waves=((copies,),)))


def test_more_waves_than_a_key_has_room_for_are_refused():
    """Beyond them the key of a copy would no longer fit int64; up to there the batch is made."""
    arena = SimpleNamespace(group=0, index=0)
    for waves in (MAX_WAVES, MAX_WAVES + 1):
        log = CommandLog(1)
        log.keys, log.locs = [copy_tag(0, 16, 8) | 3 << PAGE_SHIFT], [8 << LOC_SHIFT | 4]
        log.top = log.base + waves - 1
        if waves > MAX_WAVES:
            with pytest.raises(LedgerError, match=f"{waves} waves in one batch, the command format knows {MAX_WAVES}"):
                log.drain([arena])
            continue
        ((copies,),) = log.drain([arena]).waves
        assert (copies.page.tolist(), copies.src_unit.tolist(), copies.dst_unit.tolist()) == ([3], [8], [4])
        assert (copies.src_tier.tolist(), copies.dst_tier.tolist()) == ([16], [8])
