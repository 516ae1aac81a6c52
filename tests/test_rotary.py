"""Centres of keys: the rotary table, what is subtracted, and what readers add; ``kernels/rotary.py``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.formats import HEAD_DIMS, LayerGroup, PageShape, geometry_for_pages
from sglang_pmkvq.kernels import plan
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference import codes as reference
from sglang_pmkvq.kernels.reference.attention import read_sequence
from sglang_pmkvq.kernels.reference.inputs import Inputs, make_inputs
from sglang_pmkvq.kernels.rotary import (
    CENTER_BITS,
    Center,
    RotaryTable,
    center_bytes,
    chosen_blocks,
    on_one_table,
    rounded,
)
from sglang_pmkvq.kernels.storage import allocate_pool, shared_bytes
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Hadamard
from tests.kernel_checks import check_decode, check_extend

STYLES = ("neox", "interleaved", "partial")
DTYPES = (torch.bfloat16, torch.float16)
L, H, P, POSITIONS = 3, 2, 16, 192


def angles(dim: int, style: str = "neox") -> tuple[torch.Tensor, torch.Tensor]:
    half = dim // 4 if style == "partial" else dim // 2
    angle = torch.arange(POSITIONS)[:, None] * 1e4 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


def table_of(dim: int, style: str = "neox") -> RotaryTable:
    return RotaryTable.of(*angles(dim, style), dim, neox=style != "interleaved")


def rotate(x: torch.Tensor, position: int, dim: int, style: str) -> torch.Tensor:
    """R_m x of fp32 x [..., D], as models write it: in pairs of halves, or of neighbours, or of the first half only."""
    cos, sin = (a[position] for a in angles(dim, style))
    out = x.clone()
    if style == "interleaved":
        even, odd = x[..., 0::2], x[..., 1::2]
        out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, odd * cos + even * sin
        return out
    half = cos.numel()
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half], out[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    return out


def centers(dim: int, style: str, dtype: torch.dtype = torch.bfloat16, blocks: int | None = None) -> Center:
    """Of L layers, large, in all blocks or in the first ones; the table in the dtype of pages."""
    table = table_of(dim, style)
    vector = torch.randn(L, H, dim, generator=torch.Generator().manual_seed(dim)) * 100
    used = table.blocks[:blocks]
    center = on_one_table([Center.of(vector, [used] * L, table)], "cpu", dtype)[0]
    assert center is not None
    return center


# -- the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_what_is_subtracted_is_the_models_own_rotation_of_the_centre(dim: int, style: str) -> None:
    table = table_of(dim, style)
    center = Center.of(torch.randn(1, H, dim) * 50, [table.blocks], table)
    zero = torch.zeros(1, 3, H, P, dim)
    got = -center.subtracted(zero, torch.tensor([0, 3, 7]))[0]
    for page, column in enumerate((0, 3, 7)):
        for t in range(P):
            want = rotate(center.vector[0], column * P + t, dim, style)
            torch.testing.assert_close(got[page, :, t], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_what_readers_add_is_the_query_times_the_turned_centre(dim: int, style: str) -> None:
    center = centers(dim, style)
    coding = Coding(center=center)
    q = torch.randn(5, H, 4, dim)
    columns = torch.tensor([2, 9])
    for layer in range(L):
        own = coding.center_queries(q, layer)
        assert own is not None and own.shape == (5, H, 4, 16 * len(center.blocks[layer]))
        rows = center.rotary.pages(center.places[layer], columns, P)  # [2, P, 16n]
        for page, column in enumerate(columns.tolist()):
            term = reference.center_term(coding.pick(layer), torch.arange(column * P, (column + 1) * P))
            assert term is not None
            want = q.double() @ term.double().transpose(-1, -2)
            got = own.double() @ rows[page].double().T
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_everyone_subtracts_the_same_bits(style: str, dtype: torch.dtype) -> None:
    """Products are exact, so whatever order they are summed in agrees, fused or not; so must a GPU."""
    center = centers(128, style, dtype)
    columns = torch.tensor([0, 5, 11])
    got = -center.subtracted(torch.zeros(L, 3, H, P, 128), columns)
    for layer in range(L):
        for page, column in enumerate(columns.tolist()):
            where = torch.arange(column * P, (column + 1) * P)
            want = reference.center_term(Coding(center=center).pick(layer), where)
            assert torch.equal(got[layer, page], want)
            # As the kernel has it: a factor per channel for the cosine and one for the sine.
            at = center.rotary.channel_at.long()[None] + 16 * where[:, None]
            values = center.rotary.values.flatten().float()
            cos, sin = values[at], values[at + 8]
            products = center.factors[0, layer][:, None] * cos, center.factors[1, layer][:, None] * sin
            assert torch.equal(products[0] + products[1], want)
            exact = [f.double() * x.double() for f, x in ((center.factors[0, layer][:, None], cos),)]
            assert torch.equal(products[0].double(), exact[0]), "a product was rounded"


def test_a_centre_has_few_bits() -> None:
    x = torch.randn(10_000) * torch.exp2(torch.randint(-20, 20, (10_000,)).float())
    got = rounded(x)
    assert ((got - x).abs() <= x.abs() * 2.0**-CENTER_BITS).all()
    mantissa = torch.frexp(got)[0] * 2**CENTER_BITS
    assert torch.equal(mantissa, mantissa.round())
    assert rounded(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_keys_are_turned_back() -> None:
    for style in STYLES:
        table = table_of(64, style)
        x = torch.randn(H, 5, 64)
        where = torch.tensor([0, 1, 17, 100, 150])
        keys = torch.stack([rotate(x[:, i], int(m), 64, style) for i, m in enumerate(where)], 1)
        torch.testing.assert_close(table.unturned(keys, where), x, rtol=1e-5, atol=1e-5)
        # A magnitude in the table (YaRN) is divided out: what is stored is 1.3 times as large.
        scaled = replace(table, values=table.values * 1.3) if style != "partial" else table
        factor = 1.3 if style != "partial" else 1.0
        torch.testing.assert_close(scaled.unturned(keys * factor, where), x, rtol=1e-5, atol=1e-5)


def test_a_table_that_does_not_fit_is_refused() -> None:
    cos, sin = angles(64)
    with pytest.raises(ValueError, match="do not fit head_dim 32"):
        RotaryTable.of(cos, sin, 32)
    with pytest.raises(ValueError, match="do not fit head_dim 64"):
        RotaryTable.of(cos, sin[:5], 64)


# -- which pairs ---------------------------------------------------------------------------------------------


def test_blocks_are_as_few_as_leave_the_tolerance() -> None:
    table = table_of(64)
    vector = torch.zeros(3, H, 64)
    vector[0, 1, table.first[3]] = 10.0  # block 0
    vector[1, 0, table.second[20]] = 10.0  # block 2
    vector[1, 0, table.first[9]] = 2.0  # block 1
    vector[2] = 0.1
    spread = torch.full((3, H), 64.0)
    assert chosen_blocks(vector, spread, table, tolerance=0.05) == ((0,), (1, 2), ())
    assert chosen_blocks(vector, spread, table, tolerance=0.1) == ((0,), (2,), ())
    assert chosen_blocks(vector, spread, table, 0.25, most=1) == ((0,), (2,), ())
    assert chosen_blocks(vector, spread, table, tolerance=0.0) == ((0,), (1, 2), (0, 1, 2, 3))
    assert chosen_blocks(torch.zeros(1, H, 64), torch.zeros(1, H), table, 0.25) == ((),)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), tolerance=st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_what_is_left_out_is_within_the_tolerance(seed: int, tolerance: float) -> None:
    table, gen = table_of(128), torch.Generator().manual_seed(seed)
    vector = torch.randn(4, H, 128, generator=gen) ** 5
    spread = torch.rand(4, H, generator=gen) * 100 + 1
    blocks = chosen_blocks(vector, spread, table, tolerance)
    left = (vector.double() - Center.of(vector, blocks, table).vector.double()).square()
    for layer, own in enumerate(blocks):
        outside = [b for b in table.blocks if b not in own]
        energy = sum((left[layer][:, torch.cat(table.channels(b))].sum(-1) for b in outside), torch.zeros(H).double())
        assert (energy <= tolerance * spread[layer].double() * (1 + 1e-6)).all()


def test_a_centre_is_nothing_outside_its_blocks() -> None:
    table = table_of(64)
    center = Center.of(torch.ones(2, H, 64), [(1,), ()], table)
    inside = torch.cat(table.channels(1))
    assert center.vector[0, :, inside].all() and int(center.vector.count_nonzero()) == H * 16
    assert center.used == (1,) and center.pairs[1] is None
    assert Coding(center=center).center_queries(torch.randn(1, H, 1, 64), 1) is None


# -- pages ---------------------------------------------------------------------------------------------------

SHAPES = [(16, 2, 64, 32, 2), (32, 2, 128, 64, 4), (16, 1, 128, 128, 2), (64, 1, 256, 128, 1)]
FINALS = [(8, 8), (4, 4), (2, 2), (4, 2), (2, 8), (16, 4), (8, 16)]


def inputs_of(shape: int, finals: tuple[int, int], lens: list[int], **more: object) -> Inputs:
    p, h, d, g, per_head = SHAPES[shape]
    given = {"transform": "hadamard", "value_transform": "hadamard", "center": "neox", "query_heads": h * per_head}
    return make_inputs(shape, PageShape(p, h, d, g), LayerGroup((0, 1, 2), *finals), lens, **{**given, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("finals", FINALS, ids=lambda f: f"k{f[0]}v{f[1]}")
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_decode_and_extend_read_what_the_reference_reads(shape: int, finals: tuple[int, int]) -> None:
    """Layers with one block of pairs, with all, and with no centre; keys and values rotated; all tiers in a request."""
    p = SHAPES[shape][0]
    style = STYLES[(shape + finals[0]) % 3]
    check_decode(inputs_of(shape, finals, [1, p - 1, p + 1, 3 * p + 5, 7 * p], center=style, clip=True))
    check_extend(inputs_of(shape, finals, [1, p + 1, 3 * p + 5], center=style), [0, p - 3, 2 * p])


def test_rows_of_the_table_are_kept_for_the_next_layer_or_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per tile and block, whichever layer asks; where there are too many tokens, every time: the same outputs."""
    inputs = inputs_of(0, (4, 2), [200, 33, 90])
    decode = TorchKernels().decode(use_stock=False)
    outputs = []
    for kept in (plan.KEPT_TOKENS, 0):
        monkeypatch.setattr(plan, "KEPT_TOKENS", kept)
        decode.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
        outputs.append([decode.run(inputs.q, layer, 0.1) for layer in range(3)])
        tiles = decode._plan.tiles  # type: ignore[union-attr]
        center = inputs.storage.coding.center
        assert center is not None
        held = {place for layer in center.live for _, place in layer}
        assert held
        assert all(t.table_rows is None if not kept else set(t.table_rows or ()) == held for t in tiles)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))  # type: ignore[arg-type]
    check_decode(inputs)
    check_extend(inputs, [150, 0, 60])


def test_first_pages_without_a_centre() -> None:
    """Nothing is taken off at the first 16 positions, and all else as it was."""
    inputs = inputs_of(0, (4, 2), [200, 33])
    center = inputs.storage.coding.center
    assert center is not None
    later = Center(center.vector, center.blocks, center.rotary.without_start())
    shape = inputs.storage.shape
    assert shape.page_size == 16
    x = torch.randn(3, 2, shape.num_kv_heads, shape.page_size, shape.head_dim)
    got = later.subtracted(x.clone(), torch.tensor([0, 1]))
    assert torch.equal(got[:, 0], x[:, 0]) and not torch.equal(got[:, 1], x[:, 1])
    assert torch.equal(got[:, 1], center.subtracted(x.clone(), torch.tensor([0, 1]))[:, 1])


@pytest.mark.parametrize("transform", ["none", "scale", "hadamard"])
def test_a_centre_goes_with_every_transform(transform: str) -> None:
    check_decode(inputs_of(0, (4, 2), [20, 70, 5], transform=transform, value_transform="none"), logit_cap=3.0)


@pytest.mark.parametrize("finals", [(8, 8), (4, 2), (2, 2)], ids=lambda f: f"k{f[0]}v{f[1]}")
def test_what_is_read_is_near_what_was_written(finals: tuple[int, int]) -> None:
    """A centre of hundreds costs no precision: keys are as near as random ones of its residual are."""
    inputs = inputs_of(1, finals, [130, 96])
    plain = inputs_of(1, finals, [130, 96], center=None)
    for layer in range(3):
        for request in range(2):
            errors = []
            for pool in (inputs, plain):
                pages, n = pool.pages(request), pool.kv_lens[request]
                slots = torch.cat([torch.arange(32) + page * 32 for page in pages])[:n]
                got = read_sequence(pool.storage, 0, layer, pages, n)
                low = torch.from_numpy(pool.steps[pages]).repeat_interleave(32)[:n] > 0
                errors.append((got - pool.written[0][layer, slots].float())[low].square().mean().sqrt())
            # 16-bit keys of hundreds are themselves rounded to about 1/256 of it.
            assert errors[0] < errors[1] * 1.3 + 0.6, (layer, errors)


def test_the_16_bit_tier_is_what_was_written() -> None:
    inputs = inputs_of(0, (4, 4), [40, 17], steps=0)
    for layer in range(3):
        for request in range(2):
            pages, n = inputs.pages(request), inputs.kv_lens[request]
            slots = torch.cat([torch.arange(16) + page * 16 for page in pages])[:n]
            got = read_sequence(inputs.storage, 0, layer, pages, n)
            assert torch.equal(got, inputs.written[0][layer, slots].float())


def test_plans_note_where_pages_stand() -> None:
    """The pages of the new tokens, those that were there before staying as they are; a second request alike."""
    inputs = inputs_of(0, (4, 4), [70, 33, 0], steps=0)
    columns = inputs.storage.page_columns
    assert columns is not None
    columns.fill_(-7)
    kernels = TorchKernels()
    kernels.extend().plan(inputs.storage, inputs.req_pages, [32, 0, 0], inputs.kv_lens)
    assert [int(columns[p]) for p in inputs.pages(0)] == [-7, -7, 2, 3, 4]
    assert [int(columns[p]) for p in inputs.pages(1)] == [0, 1, 2]
    columns.fill_(-7)
    kernels.decode().plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    assert [int(columns[p]) for p in inputs.pages(0)] == [-7, -7, -7, -7, 4]
    assert [int(columns[p]) for p in inputs.pages(1)] == [-7, -7, 2]
    assert int((columns != -7).sum()) == 2


def test_values_of_rotated_layers_come_back() -> None:
    """Rotation is undone once, after the sum: with a single token the output is its value."""
    inputs = inputs_of(2, (8, 8), [1], steps=1)
    decode = TorchKernels().decode()
    decode.plan(inputs.storage, inputs.req_pages, [1])
    slot = inputs.pages(0)[0] * 16
    for layer in range(3):
        out = decode.run(inputs.q, layer, 0.1)
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out[0, 0], inputs.written[1][layer, slot, 0].float(), rtol=0, atol=0.02)


# -- bytes and filling ---------------------------------------------------------------------------------------


def test_a_pool_counts_its_centres() -> None:
    """One table and one list of columns for all groups; a group that needs no centre has none."""
    shape, table = PageShape(16, H, 64, 64), table_of(64)
    groups = (LayerGroup((0, 1), 4, 2), LayerGroup((2,), 2, 2), LayerGroup((3,), 4, 4), LayerGroup((4,), 16, 4))
    vector = torch.randn(1, H, 64)
    some = [
        Center.of(vector.repeat(2, 1, 1), [(0,), ()], table),
        Center.of(vector, [(2, 3)], table),
        Center.of(vector, [()], table),
        Center.of(vector, [(1,)], table),
    ]
    codings = [Coding(Hadamard(64), center=center) for center in some]
    needed = center_bytes([*some[:3], None])
    geometry = geometry_for_pages(shape, groups, 9, 2, needed)
    pool = allocate_pool(geometry, torch.bfloat16, "cpu", codings)
    assert sum(s.nbytes for s in pool) + shared_bytes(pool) == geometry.total_bytes
    assert geometry.total_bytes - geometry_for_pages(shape, groups, 9, 2).total_bytes == needed + 4 * 10
    first, second, third, fourth = pool
    assert first.coding.center is not None and second.coding.center is not None
    assert first.coding.center.rotary is second.coding.center.rotary
    assert first.coding.center.rotary.blocks == (0, 2, 3)
    assert first.page_columns is second.page_columns is not None
    assert third.coding.center is None and third.page_columns is None and fourth.coding.center is None
    assert shared_bytes(allocate_pool(geometry_for_pages(shape, groups, 9, 2), torch.bfloat16)) == 0


def test_centres_are_filled_in_place_and_once() -> None:
    table = table_of(64)
    center = Center.to_come(L, H, table, 2)
    assert not center.vector.any() and center.blocks == ((0, 1),) * L
    tensors = [center.vector, center.factors, *center.channels, *center.pairs, *center.places]
    vector = torch.randn(L, H, 64) * 10
    center.fill(vector, [(3,), (), (1, 2)])
    assert center.blocks == ((0, 3), (0, 1), (1, 2))
    want = Center.of(vector, center.blocks, table)
    after = [center.vector, center.factors, *center.channels, *center.pairs, *center.places]
    assert all(a is b for a, b in zip(tensors, after, strict=True)), "a captured graph would read the old ones"
    for mine, other in zip(after, [want.vector, want.factors, *want.channels, *want.pairs, *want.places], strict=True):
        assert mine is not None and other is not None and torch.equal(mine, other)
    with pytest.raises(AssertionError, match="once"):
        center.fill(vector, [(3,), (), (1, 2)])


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (torch.ones(L, H, 128), r"centres of keys must have shape \(3, 2, 64\), got \(3, 2, 128\)"),
        (torch.full((L, H, 64), torch.nan), "finite everywhere"),
    ],
)
def test_centres_that_do_not_fit_are_refused(vector: torch.Tensor, says: str) -> None:
    table = table_of(vector.shape[-1])
    coding = Coding(center=Center(vector, (table.blocks,) * L, table))
    with pytest.raises(ValueError, match=says):
        coding.for_group(LayerGroup((0, 1, 2), 4, 4), PageShape(16, H, 64, 64), "cpu")


# -- what breaks -----------------------------------------------------------------------------------------------


def mutated(inputs: Inputs, what: str) -> Inputs:
    """A pool whose readers have one thing wrong."""
    storage, center = inputs.storage, inputs.storage.coding.center
    assert center is not None
    if what == "sign of the sine":
        values = center.rotary.values.clone()
        values[..., 8:] *= -1
        wrong = Center(center.vector, center.blocks, replace(center.rotary, values=values))
    else:
        wrong = Center(center.vector.flip(1), center.blocks, center.rotary)
    return replace(inputs, storage=replace(storage, coding=replace(storage.coding, center=wrong)))


@pytest.mark.parametrize("what", ["sign of the sine", "centre of another head"])
def test_a_reader_with_another_centre_is_noticed(what: str) -> None:
    """The check that all tests above rest on is no formality: what it compares with is the untouched pool."""
    inputs = inputs_of(0, (4, 4), [90, 40], steps=2)
    wrong = mutated(inputs, what)
    decode = TorchKernels().decode(use_stock=False)
    decode.plan(wrong.storage, wrong.req_pages, wrong.kv_lens)
    out = decode.run(inputs.q, 1, 0.1)
    right = TorchKernels().decode(use_stock=False)
    right.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    assert not torch.allclose(out, right.run(inputs.q, 1, 0.1), rtol=0.1, atol=0.1)  # type: ignore[arg-type]


def test_a_page_that_is_taken_for_its_neighbour_is_noticed() -> None:
    """Pages are coded where they stand: one column off, and what is read is not what was written."""
    inputs = inputs_of(0, (4, 4), [96], steps=2)
    columns = inputs.storage.page_columns
    assert columns is not None
    pages = inputs.pages(0)
    slots = torch.cat([torch.arange(16) + page * 16 for page in pages])
    written = inputs.written[0][1, slots].float()
    near = (read_sequence(inputs.storage, 0, 1, pages, 96) - written).abs().max()
    columns[torch.tensor(pages)] = torch.from_numpy(np.maximum(np.arange(6) - 1, 0)).to(torch.int32)
    far = (read_sequence(inputs.storage, 0, 1, pages, 96) - written).abs().max()
    assert far > 10 * near
