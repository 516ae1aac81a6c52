"""Decode, merge and extend in the interpreter against the reference on the same dequantized values."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.formats import KEY_TRANSFORMS, LayerGroup, PageShape
from sglang_pmkvq.kernels import device_attention, device_plan
from sglang_pmkvq.kernels.choose import kernels_for
from sglang_pmkvq.kernels.reference import attention as reference
from sglang_pmkvq.kernels.reference.inputs import copies, make_inputs
from sglang_pmkvq.kernels.transforms import Hadamard, PerLayer, Scaled, Transform
from sglang_pmkvq.kernels.triton_kernels import TritonKernels
from tests.kernel_checks import reference_of
from tests.triton_checks import (
    DTYPES,
    FINALS,
    SAMPLE,
    SHAPES,
    WINDOW,
    boundary_lens,
    check_decode,
    check_extend,
    inputs_of,
    relative_error,
    run_guarded,
    unquantized,
)

FULL = list(product(FINALS, SHAPES, DTYPES))


@pytest.mark.parametrize("index,case", list(enumerate(SAMPLE)))
def test_decode_of_random_mixes(index, case):
    finals, shape, dtype = case
    transform = "scale" if index % 3 else "none"
    check_decode(inputs_of(index, finals, shape, dtype, boundary_lens(shape[0]), transform=transform))


@pytest.mark.full
@pytest.mark.parametrize("finals,shape,dtype", FULL)
def test_decode_matrix(finals, shape, dtype):
    lens = [*boundary_lens(shape[0]), WINDOW - 1, WINDOW, WINDOW + 1]
    check_decode(inputs_of(shape[1] + finals[1], finals, shape, dtype, lens))
    check_decode(inputs_of(shape[1] + finals[1] + 1, finals, shape, dtype, lens), logit_cap=3.0)


@pytest.mark.parametrize("index,case", list(enumerate(SAMPLE[::2])))
def test_extend_of_random_mixes(index, case):
    """Both dtypes, with and without key scale; a request of one query among the chunks, and a first token."""
    finals, shape, _ = case
    p, dtype = shape[0], DTYPES[index % 2]
    lens, prefix = [1, p - 1, p, p + 1, 2 * p + 5], [0, p - 4, p - 3, p, 2 * p - 1]
    check_extend(inputs_of(index, finals, shape, dtype, lens, transform="scale" if index % 3 else "none"), prefix)


@pytest.mark.full
@pytest.mark.parametrize("finals,shape,dtype", FULL)
def test_extend_matrix(finals, shape, dtype):
    p = shape[0]
    lens = [1, p - 1, p, p + 1, 3 * p + 5, 2 * p, WINDOW + 1]
    prefix = [0, 0, p - 1, 0, p + 2, 2 * p - 1, WINDOW - 30]
    check_extend(inputs_of(shape[1] + finals[1] + 2, finals, shape, dtype, lens), prefix)


@pytest.mark.parametrize("index,finals", list(enumerate([(2, 2), (2, 4), (2, 8), (2, 16), (2, 2)])))
def test_clipped_ranges(index, finals):
    """Two layers, so that a factor of another layer or head, or one for values, would show."""
    p, h, d, g, per_head = SHAPES[index]
    group = LayerGroup((2, 5), *finals)
    more = {"query_heads": h * per_head, "clip": True, "dtype": DTYPES[index % 2]}
    more["transform"] = "none" if index % 2 else "scale"
    check_decode(make_inputs(index, PageShape(p, h, d, g), group, boundary_lens(p), **more))
    check_extend(make_inputs(index, PageShape(p, h, d, g), group, [p + 3, 2 * p], **more), [3, 2 * p - 1])


@pytest.mark.parametrize("index,finals", list(enumerate([(2, 2), (4, 4), (8, 2), (16, 4), (2, 16)])))
def test_rotated_keys(index, finals):
    """16-bit pages beside rotated ones; then queries that are a slice of wider rows, as a fused projection has them."""
    p, h, d, g, per_head = SHAPES[index]
    group = LayerGroup((0,), *finals)
    more = {"query_heads": h * per_head, "transform": "hadamard", "clip": index % 2 == 0, "dtype": DTYPES[index % 2]}
    inputs = make_inputs(index, PageShape(p, h, d, g), group, boundary_lens(p), **more)
    wrapper, q = check_decode(inputs), inputs.q.to(DTYPES[index % 2])
    wide = torch.cat((q, torch.full_like(q, torch.nan)), 1)
    apart, together = (run_guarded(wrapper, x, 0, 0.1, 0.0) for x in (wide[:, : h * per_head], q))
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    check_extend(make_inputs(index, PageShape(p, h, d, g), group, [p + 3, 2 * p, 1], **more), [3, 2 * p - 1, 0])


# How pairs lie, finals, transform of keys and of values.
CENTERED = [
    ("neox", (2, 2), "none", "none"),
    ("interleaved", (4, 2), "hadamard", "hadamard"),
    ("partial", (4, 4), "scale", "hadamard"),
    ("neox", (2, 16), "hadamard", "none"),
    ("interleaved", (8, 2), "none", "hadamard"),
    ("neox", (16, 2), "none", "hadamard"),
]


@pytest.mark.parametrize("index,case", list(enumerate(CENTERED)))
def test_centred_keys_and_rotated_values(index, case):
    """Three layers: a block of pairs, all of them, and none; requests of 16-bit pages alone, and of all tiers.

    Plans find page columns that are wrong and write them.
    """
    center, finals, transform, value_transform = case
    p, h, d, g, per_head = SHAPES[index]
    more = {"query_heads": h * per_head, "dtype": DTYPES[index % 2], "clip": finals[0] == 2, "center": center}
    more |= {"transform": transform, "value_transform": value_transform}
    group = LayerGroup((0, 1, 2), *finals)
    cap = 50.0 if index == 2 else 0.0
    shape = PageShape(p, h, d, g)
    steps = [0, *(np.arange(6) % len(group.steps)).tolist()]
    check_decode(make_inputs(index, shape, group, [1, 4 * p - 1, 2 * p], steps, **more), cap)
    check_extend(make_inputs(index, shape, group, [p, p + 3, 4 * p], steps, **more), [p - 1, p, 4 * p - 2], cap)


def test_a_transform_for_each_layer():
    """Kinds of layers that differ in what is done to keys, to values, and in blocks of the centre."""
    shape, group, lens = PageShape(16, 2, 64, 32), LayerGroup(tuple(range(4)), 4, 2), [40, 64, 9]
    scaled = Scaled(torch.exp2(torch.rand(1, 2, 64) * 4 - 2))
    keys = PerLayer((Hadamard(64), scaled, Transform(), Hadamard(64)))
    values = PerLayer((Transform(), Hadamard(64), Hadamard(64), Transform()))
    more = {"transform": keys, "value_transform": values, "center": "neox", "query_heads": 6}
    inputs = make_inputs(11, shape, group, lens, **more)
    check_decode(inputs)
    check_extend(inputs, [38, 60, 8])


@pytest.mark.parametrize("transform", KEY_TRANSFORMS)
def test_queries_inside_wider_rows(transform):
    """Rows with others between them, as a fused projection has them, whether queries are transformed or not."""
    inputs = inputs_of(4, (4, 2), SHAPES[1], torch.bfloat16, [33, 20], transform=transform)
    heads, wrapper, q = inputs.q.shape[1], check_decode(inputs), inputs.q.bfloat16()
    wide = torch.cat((q, torch.full_like(q, torch.nan)), 1)
    apart, together = (run_guarded(wrapper, x, 0, 0.1, 0.0) for x in (wide[:, :heads], q))
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("step", range(4))
def test_every_step_alone_in_every_layer(step):
    """All pages at one step, so that the other steps are empty."""
    shape = PageShape(16, 1, 64, 32)
    more = {"query_heads": 4, "transform": "scale"}
    inputs = make_inputs(step, shape, LayerGroup((2, 5), 4, 2), [50, 16], steps=step, **more)
    check_decode(inputs)
    check_extend(inputs, [46, 15])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_cap(dtype):
    inputs = inputs_of(3, (4, 2), SHAPES[1], dtype, [33, 64, 7])
    check_decode(inputs, logit_cap=2.0)
    check_extend(inputs, [30, 63, 4], logit_cap=2.0)


def test_window_boundaries_and_several_splits(monkeypatch):
    """Requests cut into splits that cross steps; the splits' partial tiles must neither overlap nor miss."""
    monkeypatch.setattr(device_plan, "MIN_SPLIT_TOKENS", 16)
    inputs = inputs_of(5, (4, 2), (16, 1, 64, 64, 2), torch.float16, [WINDOW - 1, 700, WINDOW, 1, WINDOW + 1])
    wrapper = check_decode(inputs)
    assert wrapper.device_plan.buffers is not None
    splits = wrapper.device_plan.buffers.split_indptr.diff()[:5]
    assert splits[1] > splits[0] > 1


def test_error_against_unquantized_values_is_that_of_the_width():
    """A looser bound against what was stored: it falls with the width, and catches a broken scale."""
    errors = []
    for step in range(3):
        inputs = inputs_of(7, (4, 4), SHAPES[0], torch.bfloat16, [100], steps=step)
        wrapper = TritonKernels().decode()
        wrapper.plan(inputs.storage, inputs.req_pages, torch.tensor(inputs.kv_lens))
        out, _ = run_guarded(wrapper, inputs.q.bfloat16(), 0, 128**-0.5, 0.0)
        want, _ = reference.attention(inputs.q.bfloat16(), *unquantized(inputs, 0, 0), 128**-0.5)
        errors.append(relative_error(out[0], want[0]))
    assert errors[0] < 5e-3 and errors[1] < 3e-2 and errors[2] < 3e-1, errors


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    finals=st.sampled_from(FINALS),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    lens=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    transform=st.sampled_from(["none", "scale"]),
    logit_cap=st.sampled_from([0.0, 2.0, 30.0]),
    data=st.data(),
)
def test_any_mix_of_steps_and_lengths(seed, finals, shape, dtype, lens, transform, logit_cap, data):
    inputs = inputs_of(seed, finals, shape, dtype, lens, transform=transform)
    check_decode(inputs, logit_cap)
    if data.draw(st.booleans()):
        check_extend(inputs, [max(data.draw(st.integers(0, n)), n - 3) for n in lens], logit_cap)


def test_foreign_bytes_do_not_reach_a_request():
    """Every byte that is not the request's own set to ones (NaN as 16-bit values, as zero and as range)."""
    inputs = inputs_of(6, (4, 2), SHAPES[1], torch.bfloat16, [70, 33, 18])
    storage = inputs.storage
    wrapper = TritonKernels().decode()
    extend = TritonKernels().extend()
    results = []
    for poison in (False, True):
        own = set(inputs.pages(1))
        for page in range(storage.num_pages + 1) if poison else ():
            if page not in own:
                for side in (0, 1):
                    meta = storage.meta[side]
                    assert meta is not None
                    meta[:, page] = torch.nan
                    entry = int(storage.table[storage.arena_of(side), page])
                    start = (entry >> 2) * storage.shape.unit_bytes
                    end = start + storage.group.steps[entry & 3][side] // 2 * storage.shape.unit_bytes
                    storage.arenas[side][:, start:end] = 0xFF
        wrapper.plan(storage, inputs.req_pages[1:2], inputs.kv_lens[1:2])
        out = run_guarded(wrapper, inputs.q[1:2].bfloat16(), 0, 0.125, 0.0)
        extend.plan(storage, inputs.req_pages[1:2], [30], [33])
        q = torch.ones(3, *inputs.q.shape[1:], dtype=torch.bfloat16)
        results.append((*out, *run_guarded(extend, q, 0, 0.125, 0.0)))
    assert all(x.isfinite().all() for x in results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_nan_token_reaches_its_readers_and_only_them(step):
    inputs = inputs_of(7, (4, 4), (16, 2, 64, 32, 1), torch.bfloat16, [20, 20], steps=0)
    storage, page = inputs.storage, inputs.pages(0)[0]
    bad = torch.zeros(1, 2, 64)
    bad[0, 1, 5] = torch.nan
    TritonKernels().store(storage, 0, torch.tensor([page * 16 + 3]), torch.zeros(1, 2, 64), bad)
    if step:
        unit = int(storage.table[0, page]) >> 2
        new = (storage.num_pages + 1) * 8
        tier = storage.group.steps[step][0]
        TritonKernels().copy(storage, copies(0, [page], [unit], [new], 16, tier))
        storage.table[0, page] = new << 2 | step
    wrapper = TritonKernels().decode()
    wrapper.plan(storage, inputs.req_pages, torch.tensor(inputs.kv_lens))
    out = wrapper.run(inputs.q.bfloat16(), 0, 0.125)
    assert isinstance(out, torch.Tensor)
    assert out[1].isfinite().all() and out[0, 0].isfinite().all()
    broken = out[0, 1].isnan()
    # At 16 bits one channel is broken, below it the whole group of 32.
    assert broken[:32].all() and not broken[32:].any() if step else broken.nonzero().flatten().tolist() == [5]


def test_requests_without_kv_or_queries():
    inputs = inputs_of(8, (4, 4), SHAPES[0], torch.bfloat16, [20])
    pages = torch.cat([inputs.req_pages, inputs.req_pages])
    decode = TritonKernels().decode()
    decode.plan(inputs.storage, pages, torch.tensor([0, 20]))
    out, lse = run_guarded(decode, inputs.q.repeat(2, 1, 1).bfloat16(), 0, 0.1, 0.0)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    decode.plan(inputs.storage, pages[:0], torch.tensor([], dtype=torch.int64))
    assert decode.run(inputs.q[:0].bfloat16(), 0, 1.0).shape == (0, 8, 128)
    check_extend(dataclasses.replace(inputs, req_pages=pages, kv_lens=[20, 20]), [20, 17])
    extend = TritonKernels().extend()
    extend.plan(inputs.storage, inputs.req_pages, [20], [20])
    assert extend.run(inputs.q[:0].bfloat16(), 0, 1.0).shape == (0, 8, 128)


def test_plan_and_run_keep_their_buffers():
    """What a CUDA graph relies on: after ``reserve``, later plans and runs reuse every address, also padded ones."""
    inputs = inputs_of(9, (4, 2), (16, 1, 64, 64, 2), torch.float16, [40, 70, 5, 33])
    page0 = torch.zeros(2, inputs.req_pages.shape[1], dtype=torch.int64)  # padded rows: one token of page 0
    wrapper = TritonKernels().decode()
    wrapper.reserve(inputs.storage, requests=6, max_pages=8, query_heads=2)
    plan = wrapper.device_plan
    assert plan.buffers is not None and plan.partials is not None

    def addresses() -> list[int]:
        fields = [getattr(plan.buffers, f.name) for f in dataclasses.fields(plan.buffers)]
        fields += [plan.partials.out, plan.partials.lse, plan.q_row]
        return [t.data_ptr() for t in fields if isinstance(t, torch.Tensor)]

    wrapper.plan(inputs.storage, inputs.req_pages[:1], torch.tensor([40]))
    before = addresses()
    q = torch.cat([inputs.q, inputs.q[:2]]).half()
    pages = torch.cat([inputs.req_pages, page0])
    wrapper.plan(inputs.storage, pages, torch.tensor([*inputs.kv_lens, 1, 1]))
    captured = list(device_attention.run_launches(plan, q, 0, 0.125, 0.0, out := torch.zeros_like(q), None))
    assert addresses() == before
    for launch in captured:
        launch.run()
    want = out.clone()
    # A replay: new lengths and pages through the same plan buffers, the very launches captured before.
    wrapper.plan(inputs.storage, pages.flip(0), torch.tensor([1, 1, *reversed(inputs.kv_lens)]))
    q.copy_(q.flip(0))
    for launch in captured:
        launch.run()
    torch.testing.assert_close(out.flip(0), want, rtol=2e-3, atol=2e-3, equal_nan=True)
    for r in range(4):
        k, v = reference_of(inputs, 0, r)
        expected, _ = reference.attention(inputs.q[r : r + 1].half(), k, v, 0.125)
        assert relative_error(want[r], expected[0]) < 2e-3
    with pytest.raises(ValueError, match="reserved for 6 requests of 16 pages, got 7 of 6"):
        wrapper.plan(inputs.storage, pages[[0] * 7, :8], torch.tensor([1] * 7))


def test_plan_and_run_refuse_what_does_not_fit():
    inputs = inputs_of(8, (4, 4), SHAPES[0], torch.bfloat16, [20, 40])
    decode = TritonKernels().decode()
    with pytest.raises(ValueError, match="needs a plan"):
        decode.run(inputs.q, 0, 1.0)
    decode.plan(inputs.storage, inputs.req_pages, torch.tensor(inputs.kv_lens))
    with pytest.raises(ValueError, match=r"q must be \[2, Hq, 128\]"):
        decode.run(inputs.q[:1], 0, 1.0)
    with pytest.raises(ValueError, match="multiple of 2 KV heads, got 3"):
        decode.run(inputs.q[:, :3], 0, 1.0)
    with pytest.raises(ValueError, match="at most 16 query heads per KV head, got 17"):
        decode.run(torch.zeros(2, 34, 128), 0, 1.0)
    with pytest.raises(ValueError, match="layer must be in"):
        decode.run(inputs.q, 1, 1.0)
    with pytest.raises(ValueError, match="last axis"):
        decode.run(torch.zeros(2, 128, 8).transpose(1, 2), 0, 1.0)
    extend = TritonKernels().extend()
    with pytest.raises(ValueError, match="prefix_lens <= seq_lens"):
        extend.plan(inputs.storage, inputs.req_pages, [21, 0], [20, 40])
    with pytest.raises(ValueError, match="but req_pages has 1 columns"):
        extend.plan(inputs.storage, inputs.req_pages[:, :1], [0, 0], [20, 40])
    with pytest.raises(ValueError, match="backend must be one of"):
        kernels_for(inputs.storage.device, "cuda")  # type: ignore[arg-type]


def test_without_the_cast_the_interpreter_gets_bf16_wrong():
    """bf16 storage is cast to fp32 before any arithmetic here, and it is that cast which makes it right."""
    inputs = inputs_of(10, (4, 4), SHAPES[0], torch.bfloat16, [40], steps=0)
    wrapper = check_decode(inputs)
    plan = wrapper.device_plan
    q = inputs.q.bfloat16()
    launch = device_attention.decode_launch(plan, plan.partials_for(8), q, None, 0, 0.1, 0.0)
    assert launch.args["DOT"] == tl.float32
    broken = dataclasses.replace(launch, args={**launch.args, "DOT": tl.bfloat16})
    out = torch.zeros_like(q)
    broken.run()
    device_attention.merge_launch(plan, plan.partials_for(8), out, None).run()
    want, _ = reference.attention(q, *reference_of(inputs, 0, 0), 0.1)
    assert not relative_error(out, want) < 0.5
