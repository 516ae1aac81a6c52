"""Store, block copies and tables in the interpreter: every byte of the pool as the torch path leaves it.

The torch path is itself held to the definition byte by byte (``tests/test_kernels_pages.py``), so equal
pools mean equal codes, zeros and ranges, and that nothing else was written.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.formats import STEP_BITS, UNITS_PER_SUPERBLOCK, UNMAPPED, LayerGroup, PageShape, tier_units
from sglang_pmkvq.kernels.backend import Kernels
from sglang_pmkvq.kernels.reference import inputs as inputs_module
from sglang_pmkvq.kernels.reference.inputs import Inputs, copies, make_inputs
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Hadamard, PerLayer, Scaled, Transform
from sglang_pmkvq.kernels.triton_kernels import TritonKernels
from tests.kernel_checks import check_page_layout
from tests.triton_checks import check_fenced, fenced, fill_adversarial, same

PAIRS = [(16, 16), (8, 8), (4, 4), (2, 2), (16, 8), (16, 4), (16, 2), (8, 4), (8, 2), (4, 2)]
# page size, KV heads, head dim, channels per group
SHAPES = [(16, 2, 64, 32), (16, 1, 128, 128), (32, 3, 64, 64), (16, 1, 256, 64), (64, 1, 128, 32), (64, 2, 256, 128)]
DTYPES = [torch.bfloat16, torch.float16]


def twins(*args, **kwargs) -> tuple[Inputs, Inputs]:
    return make_inputs(*args, **kwargs), make_inputs(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finals", [(4, 4), (4, 2)])
def test_store_writes_its_rows_and_nothing_else(finals, dtype):
    a, b = twins(1, PageShape(16, 3, 64, 32), LayerGroup((3, 5), *finals), [40, 3], steps=0, dtype=dtype)
    slots = torch.tensor([p * 16 + o for p in a.pages(0)[:2] for o in (0, 7, 15)] + [0, 0])
    kv = torch.randn(len(slots), 2, 3, 64).to(dtype)
    kv[-1] = kv[-2]  # padded rows: page 0, the same bytes twice
    storage, fence = fenced(b.storage)
    for to, kernels in ((a.storage, TorchKernels()), (storage, TritonKernels())):
        for index in (slots, slots.int()):
            kernels.store(to, 1, index, kv[:, 0], kv[:, 1])
    check_fenced(fence)
    assert same(a.storage, storage)


def test_store_converts_and_skips_what_is_not_writable():
    a, b = twins(1, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), [48], steps=[0, 1, 0])
    whole, shrunk, gone = a.pages(0)
    rows = torch.randn(4, 1, 64).bfloat16().float()  # the interpreter truncates where a GPU rounds
    for inputs in (a, b):
        inputs.storage.table[:, gone] = UNMAPPED
    TorchKernels().store(a.storage, 0, torch.tensor([whole * 16 + 1]), rows[:1], rows[:1])
    far = (b.storage.num_pages + 9) * 16
    slots = torch.tensor([whole * 16 + 1, shrunk * 16, gone * 16 + 3, far])
    TritonKernels().store(b.storage, 0, slots, rows, rows)
    assert same(a.storage, b.storage)
    assert int(a.storage.dropped_rows) == 0 and int(b.storage.dropped_rows) == 3
    with pytest.raises(ValueError, match=r"k must have shape \(1, 1, 64\)"):
        TritonKernels().store(b.storage, 0, slots[:1], rows[0], rows[:1])


def check_copies(pair, shape, finals, dtype, transform, seed, clip=False, layers=2, **more) -> None:
    """``more``: centre and value transform of ``make_inputs``."""
    src_tier, dst_tier = pair
    group = LayerGroup(tuple(range(layers)), *finals)
    more |= {"dtype": dtype, "transform": transform, "clip": clip}
    a, b = twins(seed, PageShape(*shape), group, [4 * shape[0]], steps=0, **more)
    storage, fence = fenced(b.storage)
    b = dataclasses.replace(b, storage=storage)
    for arena, sides in enumerate(group.arena_sides):
        if dst_tier < group.final_of(sides[0]):
            continue
        free = (a.storage.num_pages + 1) * UNITS_PER_SUPERBLOCK
        pages = np.array(a.pages(0))[[2, 0, 3]]
        src = (a.storage.table[arena, torch.from_numpy(pages)].long() >> STEP_BITS).numpy()
        dst = free + np.array([2, 0, 1]) * UNITS_PER_SUPERBLOCK + np.array([0, 8 - tier_units(dst_tier), 0])
        for inputs, kernels in ((a, TorchKernels()), (b, TritonKernels())):
            fill_adversarial(inputs.storage, inputs.pages(0), seed)
            command = copies(arena, pages, src, dst, src_tier, dst_tier)
            kernels.copy(inputs.storage, command)
        check_fenced(fence)
        assert same(a.storage, b.storage)


@pytest.mark.parametrize("index,pair", list(enumerate(PAIRS)))
def test_copies_equal_the_torch_path(index, pair):
    shape, dtype = SHAPES[index % len(SHAPES)], DTYPES[index % 2]
    transform = "none" if index % 2 else "scale"
    check_copies(pair, shape, (2, 2) if index % 3 else (2, 4), dtype, transform, seed=index)


@pytest.mark.parametrize("index,finals", list(enumerate([(2, 2), (2, 4), (8, 2)])))
@pytest.mark.parametrize("source", [16, 8, 4])
def test_clipped_copies_equal_the_torch_path(source, index, finals):
    transform = "scale" if index == 1 else "none"
    check_copies((source, 2), SHAPES[index], finals, DTYPES[index % 2], transform, seed=index, clip=True)


@pytest.mark.parametrize("index,target", list(enumerate([8, 4, 2, 2])))
@pytest.mark.parametrize("finals", [(2, 2), (2, 4)])
def test_rotated_copies_equal_the_torch_path(finals, index, target):
    """The same sums in the same order."""
    check_copies((16, target), SHAPES[index], finals, DTYPES[index % 2], "hadamard", seed=index, clip=index == 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index,center", list(enumerate(["neox", "interleaved", "partial"])))
@pytest.mark.parametrize("finals", [(2, 2), (2, 4), (16, 4)])
def test_centred_copies_equal_the_torch_path(finals, index, center, dtype):
    """Codes of k − R_m c and of rotated values, the same bits; three layers, of which one has no centre."""
    transform = ("none", "scale", "hadamard")[index]
    more = {"layers": 3, "center": center, "value_transform": ("none", "hadamard")[index % 2]}
    target = max(min(finals), (8, 4, 2)[index])
    check_copies((16, target), SHAPES[index], finals, dtype, transform, seed=index, clip=index == 1, **more)


@pytest.mark.parametrize("finals", [(2, 2), (4, 2)])
def test_copies_with_a_transform_for_each_layer(finals):
    scaled = Scaled(torch.exp2(torch.rand(1, 2, 64, generator=torch.Generator().manual_seed(1)) * 4 - 2))
    keys = PerLayer((Hadamard(64), scaled, Transform()))
    values = PerLayer((Transform(), Hadamard(64), Hadamard(64)))
    more = {"layers": 3, "center": "neox", "value_transform": values}
    for dtype in DTYPES:
        check_copies((16, finals[0]), SHAPES[0], finals, dtype, keys, seed=4, **more)


@pytest.mark.full
@pytest.mark.parametrize("pair,shape,dtype", list(product(PAIRS, SHAPES, DTYPES)))
@pytest.mark.parametrize("finals", [(2, 2), (2, 4), (8, 2)])
@pytest.mark.parametrize("clip", [False, True])
def test_copies_matrix(pair, shape, dtype, finals, clip):
    more = {"seed": pair[0] + pair[1], "clip": clip}
    check_copies(pair, shape, finals, dtype, "scale" if shape[0] == 16 else "none", **more)
    if pair[0] == 16 > pair[1]:
        check_copies(pair, shape, finals, dtype, "hadamard", **more)
        more |= {"layers": 3, "center": "neox", "value_transform": "hadamard"}
        check_copies(pair, shape, finals, dtype, "hadamard", **more)


@pytest.mark.parametrize("finals", [(4, 4), (2, 8)])
def test_a_wave_of_mixed_pairs_is_one_launch(finals, monkeypatch):
    """Moves, quantizations and shifts of one wave at once, and the pages then are what the definition says."""
    launched = []
    from sglang_pmkvq.kernels.launch import Launch

    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), original(self))[1])
    group = LayerGroup((0, 1), *finals)
    steps = len(group.steps)
    a, b = twins(5, PageShape(16, 2, 64, 32), group, [16 * 6], steps=[0, 1, 0, 1, 1, 0][:6], transform="scale")
    both: tuple[tuple[Inputs, Kernels], ...] = ((a, TorchKernels()), (b, TritonKernels()))
    for inputs, kernels in both:
        storage, pages = inputs.storage, np.array(inputs.pages(0))
        for arena in range(len(group.arena_sides)):
            at = np.array([0, 1, 0, 1, 1, 0])
            to = np.minimum(at + np.array([1, 0, steps - 1, 1, 0, 0]), steps - 1)
            src_tier, dst_tier = (np.array([group.arena_tier(arena, s) for s in x], dtype=np.uint8) for x in (at, to))
            src = storage.table[arena, torch.from_numpy(pages)].numpy() >> STEP_BITS
            dst = (2 * (storage.num_pages + 1) - np.arange(6) + 1) * UNITS_PER_SUPERBLOCK
            command = ArenaCopies(0, arena, pages.astype(np.int32), src, dst.astype(np.int32), src_tier, dst_tier)
            launched.clear()
            kernels.copy(storage, command)
            assert len(launched) == (kernels.name == "triton")
            entries = (dst << STEP_BITS | to).astype(np.int32)
            kernels.update_table(storage, TableUpdate(0, arena, pages, entries))
    assert same(a.storage, b.storage)
    for page in b.pages(0):
        check_page_layout(b, page)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), shape=st.sampled_from(SHAPES[:4]), finals=st.sampled_from([(2, 2), (4, 2)]))
def test_a_pool_built_by_triton_alone_is_the_same_pool(seed, shape, finals):
    """Random steps reached one at a time, every store, copy and table update by Triton."""
    group, lens = LayerGroup((0, 1), *finals), [3 * shape[0], 5]
    more = {"transform": "scale", "center": "neox", "value_transform": "hadamard"}
    a = make_inputs(seed, PageShape(*shape), group, lens, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "TorchKernels", TritonKernels)
        b = make_inputs(seed, PageShape(*shape), group, lens, **more)
    assert same(a.storage, b.storage)


def test_batches_and_refusals():
    inputs = make_inputs(3, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 4), [32], steps=0)
    storage = inputs.storage
    a, b = inputs.pages(0)
    units = {p: int(storage.table[0, p]) >> STEP_BITS for p in (a, b)}
    spare = (storage.num_pages + 1) * UNITS_PER_SUPERBLOCK
    wave1 = (copies(0, [a], [units[a]], [spare], 16, 8), copies(0, [b], [units[b]], [spare + 8], 16, 16))
    wave2 = (copies(0, [a], [spare], [units[b]], 8, 4),)
    entries = np.array([units[b] << STEP_BITS | 2, spare + 8 << STEP_BITS], dtype=np.int32)
    table = (TableUpdate(0, 0, np.array([a, b], dtype=np.int32), entries),)
    TritonKernels().execute([storage], CommandBatch((wave1, wave2), table))
    check_page_layout(inputs, a)
    check_page_layout(inputs, b)
    for command, match in (
        (copies(0, [a], [0], [8], 8, 16), "never gains precision"),
        (copies(0, [a], [2], [8], 16, 8), "multiples of 8"),
        (copies(0, [a], [0], [8], 16, 2), "end at 4 bits, got a destination of 2"),
        (copies(0, [99], [0], [8], 16, 8), r"pages must be in \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=match):
            TritonKernels().copy(storage, command)
    with pytest.raises(ValueError, match=r"pages must be in \[0, 2\]"):
        TritonKernels().update_table(storage, TableUpdate(0, 0, np.array([3]), np.array([0])))
