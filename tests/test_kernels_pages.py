"""Storage, new rows, block copies and tables: exact bytes, and nothing but what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_pmkvq.commands import CommandBatch, TableUpdate
from sglang_pmkvq.formats import (
    SIDES,
    STEP_BITS,
    UNITS_PER_SUPERBLOCK,
    UNMAPPED,
    LayerGroup,
    PageShape,
    geometry_for_pages,
    tier_units,
)
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.cpu import codes as codec
from sglang_pmkvq.kernels.cpu import copies as copies_module
from sglang_pmkvq.kernels.reference.inputs import copies, make_inputs
from sglang_pmkvq.kernels.storage import GroupStorage, allocate_pool
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled
from tests.kernel_checks import TRANSFORMS, check_page_layout

GROUPS = [LayerGroup((3, 5), *f) for f in ((8, 8), (4, 4), (2, 2), (4, 2), (2, 8), (16, 4), (16, 16))]
by_name = {"ids": lambda g: g.name()}


def snapshot(storage: GroupStorage) -> list[torch.Tensor]:
    """Arenas, side arrays (as bits: stale ones hold NaN) and table."""
    meta = [m.view(torch.int16) for m in storage.meta if m is not None]
    return [t.clone() for t in (*storage.arenas, *meta, storage.table)]


def written_bytes(storage: GroupStorage, side: int, unit: int, tier: int) -> torch.Tensor:
    """Mask over an arena's bytes: the block of a tier that starts at a unit."""
    mask = torch.zeros(storage.arenas[side].shape[1], dtype=torch.bool)
    start = unit * storage.shape.unit_bytes
    mask[start : start + tier_units(tier) * storage.shape.unit_bytes] = True
    return mask


@pytest.mark.parametrize("head_dim,group_size", [(64, 32), (128, 128), (256, 64)])
def test_bytes_are_those_of_the_geometry(head_dim, group_size):
    shape = PageShape(16, 2, head_dim, group_size)
    geometry = geometry_for_pages(shape, tuple(GROUPS), num_pages=20, hard_pages=4)
    pool = allocate_pool(geometry, torch.bfloat16)
    assert sum(s.nbytes for s in pool) == geometry.total_bytes
    for storage in pool:
        assert (storage.table == UNMAPPED).all()
        assert not any(t.any() for t in storage.arenas)
        for side in SIDES:
            assert (storage.meta[side] is None) == (storage.group.final_of(side) == 16)


def test_views_cover_the_arena():
    shape = PageShape(16, 3, 64, 32)
    storage = GroupStorage.allocate(shape, LayerGroup((0, 1), 4, 2), (5, 7), 9, torch.float16)
    for side, superblocks in ((0, 5), (1, 7)):
        size = superblocks * UNITS_PER_SUPERBLOCK * shape.unit_bytes
        assert storage.arenas[side].shape == (2, size)
        assert storage.pages16(side, 1).shape == (superblocks, 16, 3, 64)
        for tier in (8, 4, 2):
            blocks = superblocks * UNITS_PER_SUPERBLOCK // tier_units(tier)
            view = storage.codes(side, 1, tier)
            assert view.shape == (blocks, 3, 16, 64 * tier // 8)
            assert view.untyped_storage().data_ptr() == storage.arenas[side].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "change,match",
    [
        ({"dtype": torch.float32}, "16-bit pages need"),
        ({"superblocks": (3,)}, "expected 2 positive superblock counts"),
        ({"superblocks": (3, 0)}, "expected 2 positive superblock counts"),
        ({"superblocks": (3, 1 << 27)}, "at most"),
        ({"num_pages": 0}, "num_pages must be positive, got 0"),
        ({"coding": Coding(Scaled(torch.ones(1, 2, 64)))}, r"key scales must have shape \(2, 2, 64\), got \(1,"),
        ({"coding": Coding(Scaled(torch.zeros(2, 2, 64)))}, "positive and finite"),
        ({"coding": Coding(Hadamard(128))}, "a rotation of 128 channels does not fit head_dim 64"),
        ({"coding": Coding(key_clip=torch.ones(1, 2))}, r"clip factors of keys must have shape \(2, 2\), got"),
        ({"coding": Coding(key_clip=torch.zeros(2, 2))}, "clip factors of keys must be above 0"),
        ({"coding": Coding(key_clip=torch.full((2, 2), 1.5))}, "at most 1 everywhere"),
        ({"coding": Coding(key_clip=torch.full((2, 2), torch.nan))}, "at most 1 everywhere"),
    ],
)
def test_allocate_refuses(change, match):
    arguments = {"superblocks": (3, 3), "num_pages": 4, "dtype": torch.bfloat16, **change}
    with pytest.raises(ValueError, match=match):
        GroupStorage.allocate(PageShape(16, 2, 64, 64), LayerGroup((0, 1), 4, 2), **arguments)


@pytest.mark.parametrize("group", GROUPS, **by_name)
def test_store_writes_its_rows_and_nothing_else(group):
    shape = PageShape(16, 2, 64, 32)
    inputs = make_inputs(1, shape, group, [40, 3], steps=0)
    storage, before = inputs.storage, snapshot(inputs.storage)
    slots = torch.tensor([p * 16 + o for p in inputs.pages(0)[:2] for o in (0, 7, 15)])
    k, v = torch.randn(2, len(slots), 2, 64).bfloat16()
    TorchKernels().store(storage, 1, slots, k, v)
    after = snapshot(storage)
    for side, x in enumerate((k, v)):
        unit = storage.table[storage.arena_of(side)].long() >> STEP_BITS
        rows = unit[slots // 16] // UNITS_PER_SUPERBLOCK * 16 + slots % 16
        want = before[side].clone()
        want[1].view(torch.bfloat16).view(-1, 2, 64)[rows] = x
        assert torch.equal(after[side], want)
    assert all(torch.equal(a, b) for a, b in zip(after[2:-1], before[2:-1], strict=True))


def test_store_takes_strided_rows_and_converts_to_the_model_dtype():
    inputs = make_inputs(1, PageShape(16, 2, 64, 32), GROUPS[1], [16], steps=0)
    slots = torch.arange(16) + inputs.pages(0)[0] * 16
    kv = torch.randn(16, 2, 2, 64)
    TorchKernels().store(inputs.storage, 0, slots.int(), kv[:, 0], kv[:, 1])
    unit = int(inputs.storage.table[0, inputs.pages(0)[0]]) >> STEP_BITS
    for side in SIDES:
        page = inputs.storage.pages16(side, 0)[unit // UNITS_PER_SUPERBLOCK]
        assert torch.equal(page, kv[:, side].bfloat16())


@pytest.mark.parametrize("change", ["table", "slots"])
def test_rows_are_resolved_once_per_forward_and_anew_after_a_change(change):
    """One object over many forwards: the same slots tensor may mean other pages, by its values or by the table."""
    inputs = make_inputs(1, PageShape(16, 1, 64, 64), GROUPS[1], [32], steps=0)
    storage, (first, second) = inputs.storage, inputs.pages(0)
    kernels, slots = TorchKernels(), torch.tensor([first * 16 + 3])
    unit = {page: int(storage.table[0, page]) >> STEP_BITS for page in (first, second)}
    rows = torch.randn(2, 1, 1, 64).bfloat16()
    for layer in (0, 1):
        kernels.store(storage, layer, slots, rows[0], rows[0])
    if change == "table":
        swapped = np.array([unit[second], unit[first]]) << STEP_BITS
        kernels.update_table(storage, TableUpdate(0, 0, np.array([first, second]), swapped))
    else:
        slots[0] = second * 16 + 3
        kernels.begin_forward()
    for layer in (0, 1):
        kernels.store(storage, layer, slots, rows[1], rows[1])
        for side in SIDES:
            written = [storage.pages16(side, layer)[unit[p] // UNITS_PER_SUPERBLOCK][3] for p in (first, second)]
            assert torch.equal(written[0], rows[0, 0]) and torch.equal(written[1], rows[1, 0])


def test_store_refuses_shrunk_and_unmapped_pages():
    inputs = make_inputs(1, PageShape(16, 1, 64, 64), GROUPS[1], [32], steps=[0, 1])
    storage = inputs.storage
    whole, shrunk = inputs.pages(0)
    before = snapshot(storage)
    rows = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"got pages \[{shrunk}\]"):
        TorchKernels().store(storage, 0, torch.tensor([shrunk * 16]), rows, rows)
    TorchKernels().update_table(storage, TableUpdate(0, 0, np.array([whole]), np.array([UNMAPPED])))
    with pytest.raises(ValueError, match=rf"got pages \[{whole}\]"):
        TorchKernels().store(storage, 0, torch.tensor([whole * 16 + 3]), rows, rows)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 1, 64\)"):
        TorchKernels().store(storage, 0, torch.tensor([0]), rows[0], rows)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(storage)[:2], before[:2], strict=True))


@pytest.mark.parametrize("transform,clip", TRANSFORMS)
@pytest.mark.parametrize("group", GROUPS, **by_name)
def test_pages_hold_what_the_definition_says_at_every_step(group, transform, clip):
    steps = list(range(len(group.steps)))
    shape = PageShape(16, 2, 64, 32)
    inputs = make_inputs(2, shape, group, [16 * len(steps)], steps=steps, transform=transform, clip=clip)
    for page in inputs.pages(0):
        check_page_layout(inputs, page)


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("shape", [PageShape(32, 1, 128, 128), PageShape(64, 1, 64, 32), PageShape(16, 1, 256, 64)])
def test_other_shapes_hold_what_the_definition_says(shape, transform):
    p = shape.page_size
    inputs = make_inputs(4, shape, LayerGroup((0,), 2, 4), [p, p], steps=[1, 3], transform=transform)
    check_page_layout(inputs, inputs.pages(0)[0])
    check_page_layout(inputs, inputs.pages(1)[0])


@pytest.mark.parametrize("dst", [8, 4, 2])
@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_one_pass_from_16_bits_equals_the_chain(dst, kind):
    """16→4 and 16→2 at once, against 16→8→4→2 in three waves: same codes, same (zero, range)."""
    shape, group = PageShape(16, 2, 128, 64), LayerGroup((0, 1), 2, 2)
    storages = []
    for chain in (False, True):
        inputs = make_inputs(7, shape, group, [96], steps=0)
        storage, pages = inputs.storage, np.array(inputs.pages(0))
        slots = (torch.from_numpy(pages)[:, None] * 16 + torch.arange(16)).flatten()
        gen = torch.Generator().manual_seed(11)
        for layer in range(2):
            kv = torch.randn(2, 96, 2, 128, generator=gen)
            if kind == "adversarial":
                kv *= torch.exp2(torch.randint(-24, 15, (2, 96, 2, 1), generator=gen).float())
                kv += torch.randn(2, 96, 2, 1, generator=gen) * 100
                kv[:, ::7] = kv[:, ::7, :, :1]
                kv[:, 5, 0, 3] = torch.nan
                kv[:, 6, 1, 90] = torch.inf
                kv[:, 8, 1, 9] = 1e6
            TorchKernels().store(storage, layer, slots, *kv)
        unit = (storage.table[0, torch.from_numpy(pages)].long() >> STEP_BITS).numpy()
        path = [16, 8, 4, 2][: [16, 8, 4, 2].index(dst) + 1] if chain else [16, dst]
        free = (inputs.storage.num_pages + 1) * UNITS_PER_SUPERBLOCK
        for src_tier, dst_tier in zip(path, path[1:], strict=False):
            # The last block lands at the same units in both storages.
            at = free if dst_tier == dst else free + 6 * UNITS_PER_SUPERBLOCK // (1 if dst_tier == 8 else 2)
            new = at + np.arange(6) * tier_units(dst_tier)
            TorchKernels().copy(storage, copies(0, pages, unit, new, src_tier, dst_tier))
            unit = new
        storages.append((storage, unit))
    (direct, unit), (chained, unit2) = storages
    assert np.array_equal(unit, unit2)
    for side in SIDES:
        blocks = torch.from_numpy(unit // tier_units(dst))
        assert torch.equal(direct.blocks(side, dst)[:, blocks], chained.blocks(side, dst)[:, blocks])
        a, b = direct.meta[side], chained.meta[side]
        assert a is not None and b is not None
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    assert int(direct.overflow_groups) == int(chained.overflow_groups)
    assert (int(direct.overflow_groups) > 0) == (kind == "adversarial")


@pytest.mark.parametrize("pair", [(16, 16), (8, 8), (4, 4), (2, 2), (16, 8), (16, 2), (8, 4), (8, 2), (4, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_execute_touches_only_its_destinations(pair, shared):
    src_tier, dst_tier = pair
    group = LayerGroup((0, 1), 2, 2) if shared else LayerGroup((0, 1), 4, 2)
    inputs = make_inputs(8, PageShape(16, 2, 64, 32), group, [64], steps=0)
    storage, before = inputs.storage, snapshot(inputs.storage)
    arena = len(group.arena_sides) - 1
    pages, src = np.array([2, 4]), np.array([0, 2]) * UNITS_PER_SUPERBLOCK
    dst = np.array([5, 7]) * UNITS_PER_SUPERBLOCK + np.array([0, tier_units(dst_tier) % UNITS_PER_SUPERBLOCK])
    TorchKernels().copy(storage, copies(arena, pages, src, dst, src_tier, dst_tier))
    after = snapshot(storage)
    for side in SIDES:
        changed = after[side] != before[side]
        if side not in group.arena_sides[arena]:
            assert not changed.any()
            continue
        allowed = torch.zeros_like(changed)
        for unit in dst:
            allowed |= written_bytes(storage, side, int(unit), dst_tier)
        assert changed.any() and not (changed & ~allowed).any()
        if src_tier == dst_tier:
            for a, b in zip(src, dst, strict=True):
                old = before[side][:, written_bytes(storage, side, int(a), src_tier)]
                assert torch.equal(after[side][:, written_bytes(storage, side, int(b), dst_tier)], old)
        now, was = after[2 + side], before[2 + side]
        others = [p for p in range(storage.num_pages + 1) if p not in pages]
        assert torch.equal(now[:, others], was[:, others])
        assert torch.equal(now, was) == (src_tier == dst_tier or src_tier < 16)
    assert torch.equal(after[-1], before[-1])


def test_execute_in_rounds_equals_execute_at_once(monkeypatch):
    results = []
    for limit in (1 << 21, 1):
        monkeypatch.setattr(copies_module, "ROUND_ELEMENTS", limit)
        inputs = make_inputs(9, PageShape(16, 2, 64, 32), LayerGroup((0, 1), 4, 2), [200], stale=False)
        results.append(snapshot(inputs.storage))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "src,dst,src_tier,dst_tier,match",
    [
        (0, 8, 8, 16, "never gains precision"),
        (0, 9, 16, 8, "destination units of 8-bit blocks must be multiples of 4"),
        (4, 8, 16, 8, "source units of 16-bit blocks must be multiples of 8"),
        (0, 10**6, 16, 8, "destination units"),
        (-8, 8, 16, 8, "source units"),
        (0, 8, 16, 3, "destination tier must be one of"),
    ],
)
def test_execute_refuses(src, dst, src_tier, dst_tier, match):
    inputs = make_inputs(1, PageShape(16, 1, 64, 64), GROUPS[1], [32], steps=0)
    before = snapshot(inputs.storage)
    with pytest.raises(ValueError, match=match):
        TorchKernels().copy(inputs.storage, copies(0, np.array([1]), [src], [dst], src_tier, dst_tier))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(inputs.storage)[:2], before[:2], strict=True))


def test_a_batch_runs_its_waves_in_order_and_then_its_tables():
    """Wave 2 reads what wave 1 wrote and overwrites what wave 1 read; a skipped or swapped wave shows."""
    inputs = make_inputs(3, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 4), [32], steps=0)
    storage = inputs.storage
    a, b = inputs.pages(0)
    units = {p: int(storage.table[0, p]) >> STEP_BITS for p in (a, b)}
    spare = (storage.num_pages + 1) * UNITS_PER_SUPERBLOCK
    # a: 16→8 to spare, then 8→4 into b's old superblock; b: moved away in wave 1.
    wave1 = (
        copies(0, np.array([a]), [units[a]], [spare], 16, 8),
        copies(0, np.array([b]), [units[b]], [spare + 8], 16, 16),
    )
    wave2 = (copies(0, np.array([a]), [spare], [units[b]], 8, 4),)
    entries = np.array([units[b] << STEP_BITS | 2, spare + 8 << STEP_BITS], dtype=np.int32)
    table = (TableUpdate(0, 0, np.array([a, b], dtype=np.int32), entries),)
    TorchKernels().execute([storage], CommandBatch((wave1, wave2), table))
    check_page_layout(inputs, a)
    check_page_layout(inputs, b)
    assert (storage.table >> STEP_BITS)[0, [a, b]].tolist() == [units[b], spare + 8]


def test_flipped_nibbles_in_the_pool_are_caught(monkeypatch):
    def flipped(codes: torch.Tensor, bits: int) -> torch.Tensor:
        packed = original(codes, bits)
        return (packed >> 4) | (packed << 4) if bits == 4 else packed

    def check() -> None:
        inputs = make_inputs(2, PageShape(16, 1, 64, 32), GROUPS[1], [16], steps=2)
        check_page_layout(inputs, inputs.pages(0)[0])

    original = codec.pack
    check()
    monkeypatch.setattr(codec, "pack", flipped)
    with pytest.raises(AssertionError, match="codes differ"):
        check()
