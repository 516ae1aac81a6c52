"""Attention over mixed tiers against the reference on the same dequantized values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.formats import LayerGroup, PageShape
from sglang_pmkvq.kernels import host_attention
from sglang_pmkvq.kernels import plan as plan_module
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.choose import kernels_for
from sglang_pmkvq.kernels.cpu import partials, unpack
from sglang_pmkvq.kernels.host_attention import HostDecode
from sglang_pmkvq.kernels.reference.attention import attention, read_sequence
from sglang_pmkvq.kernels.reference.inputs import copies, make_inputs
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Transform
from tests.kernel_checks import TRANSFORMS, check_decode, check_extend

FINALS = [(8, 8), (4, 4), (2, 2), (4, 2), (2, 8), (16, 4), (8, 16)]
# page size, KV heads, head dim, channels per group, query heads per KV head
SHAPES = [
    (16, 1, 128, 128, 2),
    (16, 2, 64, 32, 1),
    (32, 2, 128, 64, 4),
    (64, 1, 256, 128, 8),
    (16, 3, 256, 64, 1),
    (32, 1, 64, 64, 8),
    (16, 2, 128, 32, 3),
    (64, 2, 64, 32, 2),
]


def case(index: int) -> tuple[PageShape, int]:
    p, h, d, g, per_head = SHAPES[index]
    return PageShape(p, h, d, g), h * per_head


def boundary_lens(p: int) -> list[int]:
    return [1, p - 1, p, p + 1, 2 * p, 3 * p + 5]


@pytest.mark.parametrize("finals", FINALS, ids=lambda f: f"k{f[0]}v{f[1]}")
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_decode_of_random_mixes(shape, finals):
    page_shape, heads = case(shape)
    lens = boundary_lens(page_shape.page_size)
    odd = (shape + finals[0]) % 2 == 0
    inputs = make_inputs(
        shape, page_shape, LayerGroup((0,), *finals), lens, query_heads=heads,
        transform="scale" if odd else "none", dtype=torch.bfloat16 if odd else torch.float16,
    )  # fmt: skip
    check_decode(inputs)


@pytest.mark.parametrize("finals", FINALS, ids=lambda f: f"k{f[0]}v{f[1]}")
@pytest.mark.parametrize("shape", [0, 2, 6])
def test_extend_of_random_mixes(shape, finals):
    page_shape, heads = case(shape)
    p = page_shape.page_size
    lens, prefix = [1, p + 1, 2 * p, 3 * p + 5, 2 * p + 1], [0, 0, p - 3, 2 * p, 2 * p]
    more = {"query_heads": heads, "transform": "scale"}
    inputs = make_inputs(shape + 20, page_shape, LayerGroup((0, 1), *finals), lens, **more)
    check_extend(inputs, prefix)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("transform,clip", TRANSFORMS)
def test_every_step_alone_in_every_layer(step, transform, clip):
    page_shape, heads = case(0)
    group = LayerGroup((2, 5, 9), 4, 2)
    more = {"query_heads": heads, "transform": transform, "clip": clip}
    inputs = make_inputs(step, page_shape, group, [50, 16], steps=step, **more)
    check_decode(inputs)
    check_extend(inputs, [30, 15])


@pytest.mark.parametrize("finals", FINALS, ids=lambda f: f"k{f[0]}v{f[1]}")
@pytest.mark.parametrize("shape", [1, 3, 6])
def test_rotated_keys(shape, finals):
    """Pages of all tiers in a request, those at 16 bits not rotated; every head_dim, rows of one and more items."""
    page_shape, heads = case(shape)
    p = page_shape.page_size
    more = {"query_heads": heads, "transform": "hadamard", "clip": shape == 3}
    check_decode(make_inputs(shape, page_shape, LayerGroup((0,), *finals), boundary_lens(p), **more))
    inputs = make_inputs(shape + 20, page_shape, LayerGroup((0, 1), *finals), [1, p + 1, 2 * p + 5], **more)
    check_extend(inputs, [0, p - 2, 2 * p - 20])
    same = make_inputs(shape, page_shape, LayerGroup((0,), *finals), [2 * p], steps=0, **more)
    check_decode(same)
    assert (same.storage.coding.key_transform == Transform()) == (finals[0] == 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_stock", [False, True])
def test_outputs_in_the_model_dtype(dtype, use_stock):
    page_shape, heads = case(0)
    steps = [0] * 3 + [0, 1, 2, 0]
    inputs = make_inputs(1, page_shape, LayerGroup((0,), 4, 4), [40, 52], steps=steps, query_heads=heads, dtype=dtype)
    check_decode(inputs, dtype=dtype)
    if use_stock:
        wrapper = TorchKernels().decode()
        wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
        plan = wrapper._plan
        assert plan is not None and [r.start for r in plan.stock_requests] == [0]
        q = inputs.q.to(dtype)
        out, lse = wrapper.run(q, 0, 0.1, return_lse=True)
        for r in range(2):
            k, v = (read_sequence(inputs.storage, s, 0, inputs.pages(r), inputs.kv_lens[r]) for s in (0, 1))
            want, want_lse = attention(q[r : r + 1], k, v, 0.1)
            # Stock rounds the weights to the model dtype too.
            torch.testing.assert_close(out[r].float(), want[0], rtol=2e-2, atol=5e-3)
            torch.testing.assert_close(lse[r], want_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_stock", [False, True])
def test_logit_cap(use_stock):
    page_shape, heads = case(2)
    inputs = make_inputs(3, page_shape, LayerGroup((0,), 4, 2), [33, 64, 7], query_heads=heads)
    check_decode(inputs, logit_cap=2.0, use_stock=use_stock)
    check_extend(inputs, [20, 63, 0], logit_cap=2.0, use_stock=use_stock)


def test_a_cap_also_reaches_requests_without_shrunk_pages():
    page_shape, heads = case(0)
    inputs = make_inputs(3, page_shape, LayerGroup((0,), 4, 4), [33], steps=0, query_heads=heads)
    check_decode(inputs, logit_cap=1.0, use_stock=True)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    finals=st.sampled_from(FINALS),
    shape=st.sampled_from([0, 1, 5]),
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_mix_of_steps_and_lengths(seed, finals, shape, lens, data):
    page_shape, heads = case(shape)
    prefix = [data.draw(st.integers(0, n - 1)) for n in lens]
    # Few queries each: the reference goes one by one.
    prefix = [max(p, n - 4) for p, n in zip(prefix, lens, strict=True)]
    more = {"query_heads": heads, "transform": "none" if seed % 2 else "scale"}
    inputs = make_inputs(seed, page_shape, LayerGroup((0,), *finals), lens, **more)
    check_decode(inputs)
    check_extend(inputs, prefix)


def test_long_sequences_cross_items_and_tiles(monkeypatch):
    """Items of different requests in one strip and tile, requests over several of both, several query tiles."""
    page_shape, heads = case(0)
    monkeypatch.setattr(plan_module, "MAX_ITEM_TOKENS", 64)
    monkeypatch.setattr(plan_module, "STRIP_ELEMENTS", 2 * 64 * 128)
    monkeypatch.setattr(plan_module, "TILE_ELEMENTS", 7 * 64 * 128)
    monkeypatch.setattr(host_attention, "SCORE_ELEMENTS", 5 * 2 * 64)
    lens = [700, 33, 250, 1]
    inputs = make_inputs(5, page_shape, LayerGroup((0,), 4, 2), lens, query_heads=heads)
    check_decode(inputs)
    check_extend(inputs, [680, 20, 250 - 17, 0])


def test_results_do_not_depend_on_the_batch_or_on_foreign_bytes():
    """A request alone, in a batch, and after every byte that is not its own has been overwritten."""
    page_shape, heads = case(1)
    inputs = make_inputs(6, page_shape, LayerGroup((0,), 4, 2), [70, 33, 18], query_heads=heads)
    wrapper = TorchKernels().decode(use_stock=False)
    wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    together = wrapper.run(inputs.q, 0, 0.125)
    wrapper.plan(inputs.storage, inputs.req_pages[1:2], inputs.kv_lens[1:2])
    alone = wrapper.run(inputs.q[1:2], 0, 0.125)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-6, atol=1e-6)
    storage = inputs.storage
    own = set(inputs.pages(1))
    for page in range(storage.num_pages + 1):
        if page not in own:
            for side in (0, 1):
                meta = storage.meta[side]
                assert meta is not None
                meta[:, page] = torch.nan
                entry = int(storage.table[storage.arena_of(side), page])
                unit, step = entry >> 2, entry & 3
                size = storage.shape.unit_bytes
                tier = storage.group.steps[step][side]
                storage.arenas[side][:, unit * size : (unit + tier // 2) * size] = 0xFF
    wrapper.plan(storage, inputs.req_pages[1:2], inputs.kv_lens[1:2])
    again = wrapper.run(inputs.q[1:2], 0, 0.125)
    assert again.isfinite().all()
    assert torch.equal(again, alone)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_nan_token_reaches_its_readers_and_only_them(step):
    page_shape, heads = case(1)
    group = LayerGroup((0,), 4, 4)
    inputs = make_inputs(7, page_shape, group, [20, 20], steps=0, query_heads=heads)
    storage = inputs.storage
    page = inputs.pages(0)[0]
    bad = torch.zeros(1, 2, 64)
    bad[0, 1, 5] = torch.nan
    TorchKernels().store(storage, 0, torch.tensor([page * 16 + 3]), torch.zeros(1, 2, 64), bad)
    if step:
        unit = int(storage.table[0, page]) >> 2
        new = (storage.num_pages + 1) * 8
        TorchKernels().copy(storage, copies(0, [page], [unit], [new], 16, group.steps[step][0]))
        storage.table[0, page] = new << 2 | step
    wrapper = TorchKernels().decode(use_stock=False)
    wrapper.plan(storage, inputs.req_pages, inputs.kv_lens)
    out = wrapper.run(inputs.q, 0, 0.125)
    assert out[1].isfinite().all() and out[0, 0].isfinite().all()
    broken = out[0, 1].isnan()
    # At 16 bits one channel is broken, below it the whole group of 32.
    assert broken[:32].all() and not broken[32:].any() if step else broken.nonzero().flatten().tolist() == [5]


def test_empty_plans_and_requests():
    page_shape, heads = case(0)
    inputs = make_inputs(8, page_shape, LayerGroup((0,), 4, 4), [20], query_heads=heads)
    decode = TorchKernels().decode()
    decode.plan(inputs.storage, inputs.req_pages[:0], [])
    assert decode.run(inputs.q[:0], 0, 1.0).shape == (0, heads, 128)
    pages = torch.cat([inputs.req_pages, inputs.req_pages])
    for use_stock in (True, False):
        decode = TorchKernels().decode(use_stock)
        decode.plan(inputs.storage, pages, [0, 20])
        out, lse = decode.run(inputs.q.repeat(2, 1, 1), 0, 0.1, return_lse=True)
        assert not out[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    extend = TorchKernels().extend()
    extend.plan(inputs.storage, pages, [20, 18], [20, 20])
    assert extend.run(torch.randn(2, heads, 128), 0, 0.1).shape == (2, heads, 128)


def test_plan_and_run_refuse_what_does_not_fit():
    page_shape, heads = case(0)
    inputs = make_inputs(8, page_shape, LayerGroup((0,), 4, 4), [20, 40], query_heads=heads)
    storage, pages = inputs.storage, inputs.req_pages
    wrapper = TorchKernels().decode()
    with pytest.raises(ValueError, match="run needs a plan"):
        wrapper.run(inputs.q, 0, 1.0)
    with pytest.raises(ValueError, match=r"req_pages must be \[1, max_pages\]"):
        wrapper.plan(storage, pages, [20])
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 64\], got 20..65"):
        wrapper.plan(storage, pages, [20, 65])
    with pytest.raises(ValueError, match=r"logical pages must be in \[0, 5\]"):
        wrapper.plan(storage, pages, [20, 64])  # one garbage page counted as its own
    with pytest.raises(ValueError, match="0 <= prefix_lens <= seq_lens"):
        TorchKernels().extend().plan(storage, pages, [21, 0], [20, 40])
    wrapper.plan(storage, pages, torch.tensor([20, 40]))
    with pytest.raises(ValueError, match=r"q must be \[2, Hq, 128\], got \(1, 2, 128\)"):
        wrapper.run(inputs.q[:1], 0, 1.0)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\)"):
        wrapper.run(inputs.q, 1, 1.0)
    two = make_inputs(8, case(1)[0], LayerGroup((0,), 4, 4), [20])
    wrapper.plan(two.storage, two.req_pages, two.kv_lens)
    with pytest.raises(ValueError, match="query heads must be a multiple of 2"):
        wrapper.run(torch.zeros(1, 3, 64), 0, 1.0)
    storage.table[0, inputs.pages(1)[1]] = -1
    with pytest.raises(ValueError, match=rf"unmapped pages \[{inputs.pages(1)[1]}\]"):
        wrapper.plan(storage, pages, [20, 40])


def test_pages_are_found_in_the_slots_of_a_request_table():
    """Rows of a wider table, the pages of each as token slots: as if they were given as page ids."""
    page_shape, heads = case(1)
    p, lens = page_shape.page_size, [70, 33, 18]
    inputs = make_inputs(6, page_shape, LayerGroup((0,), 4, 2), lens, query_heads=heads)
    table = torch.full((6, 6 * p), -(10**6), dtype=torch.int32)
    rows = torch.tensor([4, 0, 5])
    for r, row in enumerate(rows.tolist()):
        slots = (torch.tensor(inputs.pages(r))[:, None] * p + torch.arange(p)).flatten()
        table[row, : lens[r]] = slots[: lens[r]].int()
    source = PageSource(table, rows, p, p)
    assert source.max_pages == 6
    assert source.page_ids(2)[:, :2].tolist() == [inputs.pages(r)[:2] for r in range(3)]
    assert source.page_ids(5)[0, :5].tolist() == inputs.pages(0), "read again where more pages are asked for"
    q, prefix = inputs.q.repeat_interleave(3, 0), [n - 3 for n in lens]
    decode, plain = TorchKernels().decode(), TorchKernels().decode()
    decode.plan_source(inputs.storage, source, lens)
    plain.plan(inputs.storage, inputs.req_pages, lens)
    assert torch.equal(decode.run(inputs.q, 0, 0.1), plain.run(inputs.q, 0, 0.1))
    extend, plain = TorchKernels().extend(), TorchKernels().extend()
    extend.plan_source(inputs.storage, source, prefix, lens)
    plain.plan(inputs.storage, inputs.req_pages, prefix, lens)
    assert torch.equal(extend.run(q, 0, 0.1), plain.run(q, 0, 0.1))


def test_kernels_are_chosen_by_device_and_by_name():
    for device, name, expected in (
        ("cpu", "auto", "torch"), ("cpu", "torch", "torch"), ("cuda", "torch", "torch"), ("cuda", "auto", "triton"),
        (torch.device("cuda", 0), "triton", "triton"),
    ):  # fmt: skip
        kernels = kernels_for(device, name)
        assert (kernels.name, kernels.compiles) == (expected, expected == "triton")
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'torch', 'triton'\), got 'cuda'"):
        kernels_for("cpu", "cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Triton kernels on CPU tensors need TRITON_INTERPRET=1"):
        kernels_for("cpu", "triton")
    with pytest.raises(NotImplementedError, match="CUDA graphs need the Triton kernels"):
        kernels_for("cpu").decode().reserve(make_inputs(8, case(0)[0], LayerGroup((0,), 4, 4), [20]).storage, 1, 1, 1)


def test_nothing_of_the_cache_survives_run():
    """A plan holds indices only, and run leaves no tensor behind but its result."""
    page_shape, heads = case(0)
    inputs = make_inputs(9, page_shape, LayerGroup((0,), 4, 4), [1500, 900], query_heads=heads)
    for wrapper in (TorchKernels().decode(), TorchKernels().extend()):
        if isinstance(wrapper, HostDecode):
            wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
            q = inputs.q
        else:
            wrapper.plan(inputs.storage, inputs.req_pages, [1490, 890], inputs.kv_lens)
            q = torch.randn(20, heads, 128)
        before = {name: id(value) for name, value in vars(wrapper).items()}
        wrapper.run(q, 0, 0.1)
        assert {name: id(value) for name, value in vars(wrapper).items()} == before
        plan = wrapper._plan
        assert plan is not None
        tiles = (*plan.tiles, *(t for e in plan.extends for t in e.tiles))
        held = [x for t in tiles for x in (*t.meta_rows, t.absent, t.position)]
        held += [x for t in tiles for run in t.runs for strip in run.strips for x in (*strip.rows, strip.absent_rows)]
        assert all(not x.is_floating_point() for x in held if x is not None)
        # 1/8 of the codes at 2 bits would be 16 bytes per token, head and side.
        assert sum(x.numel() * x.element_size() for x in held if x is not None) < 16 * 2400


def test_the_workspace_does_not_grow_with_the_batch_or_its_length():
    page_shape, heads = case(0)
    sizes = []
    for lens in ([20], [1500, 900, 700]):
        inputs = make_inputs(9, page_shape, LayerGroup((0,), 4, 2), lens, query_heads=heads)
        wrapper = TorchKernels().decode(use_stock=False)
        wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
        wrapper.run(inputs.q, 0, 0.1)
        sizes.append(unpack.Workspace.of(inputs.storage).nbytes)
    assert sizes[0] == sizes[1] == 7 * plan_module.STRIP_ELEMENTS


@pytest.mark.parametrize("extend", [False, True])
def test_a_dropped_zero_term_is_caught(monkeypatch, extend):
    def dropped(*args):
        zero, scale = original(*args)
        return torch.zeros_like(zero), scale

    def check() -> None:
        inputs = make_inputs(1, case(0)[0], LayerGroup((0,), 4, 4), [40], steps=2, query_heads=2)
        check_extend(inputs, [38]) if extend else check_decode(inputs)

    original = partials._zero_scale
    check()
    monkeypatch.setattr(partials, "_zero_scale", dropped)
    with pytest.raises(AssertionError, match="not close"):
        check()


def test_a_flipped_nibble_order_is_caught(monkeypatch):
    def flipped(*args):
        for view in original(*args):
            view.values.copy_(view.values.unflatten(0, (-1, 2)).roll(1, dims=1).flatten(0, 1))
            yield view

    def check() -> None:
        check_decode(make_inputs(1, case(0)[0], LayerGroup((0,), 4, 4), [40], steps=2, query_heads=2))

    original = partials.unpacked
    check()
    monkeypatch.setattr(partials, "unpacked", flipped)
    with pytest.raises(AssertionError, match="not close"):
        check()
