"""The Triton kernels on a GPU: the matrix of the interpreter with real bf16, and what only a GPU can do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from sglang_pmkvq.formats import KEY_TRANSFORMS, STEP_BITS, UNITS_PER_SUPERBLOCK, UNMAPPED, LayerGroup, PageShape
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.choose import kernels_for
from sglang_pmkvq.kernels.reference.inputs import copies, make_inputs
from sglang_pmkvq.kernels.triton import decode, extend, pages, plan
from tests.plan_checks import check_plan
from tests.triton_checks import (
    DTYPES,
    FINALS,
    SHAPES,
    WINDOW,
    boundary_lens,
    check_decode,
    check_extend,
    check_fenced,
    fenced,
    fill_adversarial,
    inputs_of,
    on_device,
    same,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("finals,shape,dtype", list(product(FINALS, SHAPES, DTYPES)))
def test_decode_and_extend(finals, shape, dtype):
    p = shape[0]
    lens = [*boundary_lens(p), WINDOW - 1, WINDOW + 1, 700]
    inputs = inputs_of(shape[1] + finals[1], finals, shape, dtype, lens, clip=p == 16)
    check_decode(inputs, device="cuda")
    check_decode(inputs, logit_cap=3.0, device="cuda")
    check_extend(inputs, [0, 0, p - 1, 1, p + 2, WINDOW - 40, WINDOW, 690], device="cuda")
    more = {"transform": "hadamard", "clip": p == 16}
    inputs = inputs_of(shape[1] + finals[1], finals, shape, dtype, lens, **more)
    check_decode(inputs, device="cuda")
    check_extend(inputs, [0, 0, p - 1, 1, p + 2, WINDOW - 40, WINDOW, 690], device="cuda")


@pytest.mark.parametrize("finals,shape,dtype", list(product(FINALS, SHAPES, DTYPES)))
def test_centred_keys_and_rotated_values(finals, shape, dtype):
    p, h, d, g, per_head = shape
    lens = [*boundary_lens(p), WINDOW + 1, 700]
    center = ("neox", "interleaved", "partial")[finals[1] % 3]
    more = {"query_heads": h * per_head, "dtype": dtype, "clip": p == 16, "center": center}
    more |= {"transform": "hadamard", "value_transform": "hadamard"}
    inputs = make_inputs(d, PageShape(p, h, d, g), LayerGroup((0, 1, 2), *finals), lens, **more)
    check_decode(inputs, device="cuda")
    check_extend(inputs, [0, 0, p - 1, 1, p + 2, WINDOW - 40, 690], device="cuda")


@pytest.mark.parametrize("src,dst", [(16, 16), (8, 8), (16, 8), (16, 4), (16, 2), (8, 4), (8, 2), (4, 2)])
@pytest.mark.parametrize("transform,clip", [("scale", False), ("scale", True), ("hadamard", False)])
@pytest.mark.parametrize("center,values", [(None, "none"), ("neox", "hadamard"), ("interleaved", "none")])
def test_copies_leave_the_bytes_of_the_torch_path(src, dst, transform, clip, center, values):
    group = LayerGroup((0, 1, 2), 2, 2)
    more = {"transform": transform, "clip": clip, "center": center, "value_transform": values}
    inputs = make_inputs(3, PageShape(16, 3, 128, 64), group, [16 * 9], steps=0, **more)
    storages = [inputs.storage, on_device(inputs.storage, "cuda")]
    pages, units = np.array(inputs.pages(0)), np.arange(9) * 8
    for storage in storages:
        kernels_for(storage.device).copy(storage, copies(0, pages, units, (10 + np.arange(9)) * 8, src, dst))
    for side in (0, 1):
        assert torch.equal(storages[0].arenas[side], storages[1].arenas[side].cpu())
        metas = [s.meta[side] for s in storages]
        assert metas[0] is not None and metas[1] is not None
        assert torch.equal(metas[0].view(torch.int16), metas[1].cpu().view(torch.int16))


@pytest.mark.parametrize("dst", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ["scale", "hadamard"])
def test_quantizing_what_is_hard_to_quantize(dst, dtype, transform):
    """NaN, infinities, ties, constants, subnormals and values beyond fp16: bytes and counters as torch leaves them."""
    more = {"dtype": dtype, "transform": transform}
    inputs = make_inputs(4, PageShape(16, 2, 128, 32), LayerGroup((0,), 2, 2), [16 * 6], steps=0, **more)
    fill_adversarial(inputs.storage, inputs.pages(0), dst)
    storage, fence = fenced(on_device(inputs.storage, "cuda"))
    pages = np.array(inputs.pages(0))
    units = inputs.storage.table[0, torch.from_numpy(pages)].numpy() >> STEP_BITS
    free = (inputs.storage.num_pages + 1) * UNITS_PER_SUPERBLOCK + np.arange(6) * UNITS_PER_SUPERBLOCK
    for each in (inputs.storage, storage):
        kernels_for(each.device).copy(each, copies(0, pages, units, free, 16, dst))
    check_fenced(fence)
    assert same(inputs.storage, storage)
    assert int(storage.overflow_groups) > 0


@pytest.mark.parametrize("finals", [(4, 4), (4, 2), (16, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_rounds_and_writes_its_rows_only(finals, dtype):
    """fp32 rows to nearest, ties to even; padded rows to page 0; shrunk, unmapped and foreign pages only counted."""
    group = LayerGroup((0, 1), *finals)
    inputs = make_inputs(5, PageShape(16, 3, 64, 64), group, [64], steps=[0, 1, 0, 0], dtype=dtype)
    whole, shrunk, gone, other = inputs.pages(0)
    inputs.storage.table[:, gone] = UNMAPPED
    storage, fence = fenced(on_device(inputs.storage, "cuda"))
    rows = torch.randn(7, 2, 3, 64)
    rows[0], rows[1] = 1.0 + 2.0**-8, 1.0 + 2.0**-11  # halfway between two values of bf16 and of fp16
    good = torch.tensor([whole * 16 + 1, other * 16 + 15, 0])
    bad = torch.tensor([shrunk * 16, gone * 16 + 3, (inputs.storage.num_pages + 9) * 16, -5])
    for layer in (0, 1):
        kernels_for("cpu").store(inputs.storage, layer, good, rows[:3, 0], rows[:3, 1])
        kernels_for("cuda").store(storage, layer, torch.cat([good, bad]).cuda(), rows[:, 0].cuda(), rows[:, 1].cuda())
    check_fenced(fence)
    assert same(inputs.storage, storage)
    assert int(storage.dropped_rows) == 2 * bad.numel()


@pytest.mark.parametrize(
    "finals,shape", [((4, 2), (16, 2, 64, 32)), ((4, 4), (32, 1, 64, 64)), ((2, 8), (64, 1, 64, 64))]
)
def test_plan(finals, shape):
    """Lists, schedule and sentinels; more chunks and requests than one program takes."""
    p = shape[0]
    lens = [1, p - 1, p, p + 1, 40 * p + 3, 700 * p + 1, 9000 * p - 1, *range(1, 300)]
    inputs = make_inputs(1, PageShape(*shape), LayerGroup((0,), *finals), lens)
    check_plan(inputs, lens, target=264, device="cuda")
    check_plan(inputs, lens, target=9, q_len=[n % 3 for n in lens], device="cuda")


def test_start_up_compiles_what_serving_launches():
    """After ``warm_up`` a plan, a run and a copy of the real storage find their kernels compiled."""
    inputs = inputs_of(9, (4, 2), SHAPES[0], torch.bfloat16, [40, 170, 5, 33])
    storage = on_device(inputs.storage, "cuda")
    kernels_for(storage.device).warm_up(storage, 8)
    kernels = [getattr(module, name) for module in (decode, extend, pages, plan) for name in vars(module)
               if name.endswith("_kernel")]  # fmt: skip
    device = torch.cuda.current_device()

    def compiled() -> int:
        return sum(len(kernel.device_caches[device][0]) for kernel in kernels)

    before = compiled()
    slots = (inputs.req_pages.clamp(0, storage.num_pages)[:, :, None] * 16 + torch.arange(16)).flatten(1).int().cuda()
    source = PageSource(slots, torch.arange(4, device="cuda"), 16, 16)
    wrapper = kernels_for(storage.device).decode()
    wrapper.plan_source(storage, source, torch.tensor(inputs.kv_lens, device="cuda"))
    wrapper.run(torch.randn(4, 8, 128, device="cuda").bfloat16(), 0, 0.1)
    assert compiled() == before > 0


@pytest.mark.parametrize("transform", KEY_TRANSFORMS)
def test_a_captured_decode_replays_later_plans(transform):
    """Capture once with padded rows, then plan other lengths and pages: replay equals an eager run."""
    inputs = inputs_of(9, (4, 2), SHAPES[0], torch.bfloat16, [40, 170, 5, 33], transform=transform)
    storage = on_device(inputs.storage, "cuda")
    pages = torch.cat([inputs.req_pages, torch.zeros_like(inputs.req_pages[:2])]).cuda()
    wrapper, eager = kernels_for("cuda").decode(), kernels_for("cuda").decode()
    wrapper.reserve(storage, 6, pages.shape[1], 8)
    q = torch.randn(6, 8, 128, device="cuda").bfloat16()
    lens = torch.tensor([*inputs.kv_lens, 1, 1], device="cuda")
    wrapper.plan(storage, pages, lens)
    wrapper.run(q, 0, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, 0, 0.1)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 0, 2]):
        wrapper.plan(storage, pages[order], lens[order])
        graph.replay()
        eager.plan(storage, pages[order], lens[order])
        torch.testing.assert_close(out, eager.run(q, 0, 0.1), rtol=0, atol=0, equal_nan=True)
