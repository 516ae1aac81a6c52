"""Codes: shift, packing and quantizer against their definitions; exact unless said otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_pmkvq.kernels.coding import clip_edges
from sglang_pmkvq.kernels.cpu import codes as codec
from sglang_pmkvq.kernels.reference import codes as ref

FP16_MAX = 65504.0


def adversarial(dim: int) -> torch.Tensor:
    """fp32 rows that stress rounding: ties, tiny and huge ranges, offsets, outliers, constants."""
    gen = torch.Generator().manual_seed(3)
    ramp = torch.linspace(0, 1, dim)
    rows = [
        torch.randn(dim, generator=gen),
        torch.randn(dim, generator=gen) * 1e-4 + 1000.0,
        torch.randn(dim, generator=gen) * 300.0,
        torch.arange(dim).float() % 256,
        (torch.arange(dim).float() % 511) / 2,  # half codes: ties of the first rounding
        ramp * 1e-7,  # the range is a subnormal fp16, or 0
        ramp * 60000.0 - 30000.0,
        torch.cat([torch.full((dim - 1,), 0.01), torch.tensor([500.0])]),
        torch.full((dim,), -3.25),
        torch.full((dim,), 1 / 3),
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [4, 2])
def test_shift_is_rounding_for_every_code(bits):
    codes = torch.arange(2 ** (2 * bits), dtype=torch.uint8)
    want = [math.floor(c / (2**bits + 1) + 0.5) for c in range(2 ** (2 * bits))]
    got = codec.shift_codes(codes, bits)
    assert got.dtype == torch.uint8
    assert got.tolist() == want
    assert [ref.shift_code(c, bits) for c in range(2 ** (2 * bits))] == want


def test_shift_down_is_the_chain_of_shifts():
    codes = torch.arange(256, dtype=torch.uint8)
    chain = codec.shift_codes(codec.shift_codes(codes, 4), 2)
    assert torch.equal(codec.shift_down(codes, 8, 2), chain)
    assert torch.equal(codec.shift_down(codes, 8, 8), codes)
    assert [ref.chain(c, 2) for c in range(256)] == chain.tolist()


CLIPS = [1.0, 0.95, 0.9, 0.85, 0.7, 0.65, 0.5, 0.35, 0.3, 0.1, 0.01]


@pytest.mark.parametrize("clip", CLIPS)
def test_a_clipped_shift_goes_to_the_nearest_level(clip):
    """Every 4-bit code, and every 8-bit one through the chain; whole ranges give the equivalent right shift."""
    share = torch.tensor(clip)
    edge = clip_edges(share)
    assert 3 <= int(edge) <= 8
    codes = torch.arange(16, dtype=torch.uint8)
    want = [ref.clipped_shift_code(c, float(share)) for c in range(16)]
    got = codec.shift_clipped(codes, edge)
    assert got.dtype == torch.uint8 and got.tolist() == want
    assert want == [3 - c for c in reversed(want)]  # both ends are clipped alike
    levels = 15 * ((1 - clip) / 2 + clip * torch.arange(4) / 3)
    nearest = (codes[:, None] - levels).abs().min(1).values
    assert torch.allclose((codes - levels[got.long()]).abs(), nearest, atol=1e-5)
    if clip == 1:
        assert torch.equal(got, codec.shift_codes(codes, 2))
    wide = torch.arange(256, dtype=torch.uint8)
    assert codec.shift_down(wide, 8, 2, edge).tolist() == [ref.chain(c, 2, float(share)) for c in range(256)]
    assert torch.equal(codec.shift_down(wide, 8, 4, edge), codec.shift_codes(wide, 4)), "only the last step clips"


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pack_is_planar_and_unpack_inverts_it(bits, dim):
    gen = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, 3, dim), dtype=torch.uint8, generator=gen)
    packed = codec.pack(codes, bits)
    assert packed.shape == (2, 3, dim * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(packed, ref.pack_page(codes, bits))
    assert torch.equal(codec.unpack(packed, bits), codes)
    assert torch.equal(ref.unpack_page(packed, bits).to(torch.uint8), codes)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantize_equals_its_definition(group):
    x = adversarial(128)
    q = codec.quantize(x, group)
    for row in range(x.shape[0]):
        for i in range(128 // group):
            codes, zero, span = ref.quantize_group(x[row, i * group : (i + 1) * group])
            assert q.codes[row, i * group : (i + 1) * group].tolist() == codes
            assert q.meta[row, i, 0] == zero and q.meta[row, i, 1] == span
    assert int(q.clipped) == 0


def test_quantize_does_not_change_its_input():
    x = adversarial(64)
    before = x.clone()
    codec.quantize(x, 64)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_error_is_at_most_half_a_step(bits):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=gen)
    q = codec.quantize(x, 128)
    zero, span = q.meta[:, 0, :1].float(), q.meta[:, 0, 1:].float()
    back = ref.dequantize(codec.shift_down(q.codes, 8, bits), zero, span, bits)
    # Half a step of this width and of every width above it in the chain (double rounding), plus fp16
    # rounding of zero and range.
    steps = sum(span / (2**b - 1) / 2 for b in (8, 4, 2) if b >= bits)
    assert ((back - x).abs() <= steps + x.abs().amax(-1, keepdim=True) * 2.0**-9).all()


def test_constant_groups_read_back_as_fp16_of_the_constant():
    values = torch.tensor([0.0, -0.0, 1.5, -3.25, 2.0**-14, 0.1, 65504.0, -65504.0])
    x = values[:, None].expand(-1, 64).contiguous()
    q = codec.quantize(x, 64)
    assert not q.codes.any() and not q.meta[..., 1].any()
    assert torch.equal(q.meta[:, 0, 0], values.half())
    assert int(q.clipped) == 0
    bf16 = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10).bfloat16().float()
    normal = bf16[bf16.abs() >= 2.0**-14]
    assert torch.equal(normal.half().float(), normal), "a normal bf16 in fp16's range is exact"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 31, 63])
def test_a_non_finite_channel_makes_its_whole_group_nan(bad, at):
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    x[0, at] = bad
    q = codec.quantize(x, 64)
    assert q.meta[0, 0, 0].isnan() and q.meta[0, 0, 1] == 0 and not q.codes[0, :64].any()
    assert q.meta[0, 1].isfinite().all() and q.codes[0, 64:].any()
    assert int(q.clipped) == 0
    for bits in (8, 4, 2):
        assert ref.fake_quantize(x, bits, 64)[0, :64].isnan().all()
        assert ref.fake_quantize(x, bits, 64)[0, 64:].isfinite().all()


def test_mixed_infinities_are_nan_too():
    x = torch.tensor([[torch.inf, -torch.inf] * 32])
    assert codec.quantize(x, 64).meta[0, 0, 0].isnan()


def test_finite_values_beyond_fp16_are_clamped_and_counted():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5] = 1e5  # range too large
    x[2] = -1e30  # zero too small, range 0
    x[3, 0], x[3, 1] = -3.3e38, 3.3e38  # the range is infinite even in fp32
    q = codec.quantize(x, 64)
    assert int(q.clipped) == 3
    assert q.meta.isfinite().all()
    assert q.meta[1, 0, 1] == FP16_MAX and q.meta[2, 0, 0] == -FP16_MAX and q.meta[2, 0, 1] == 0
    assert q.meta[3, 0, 0] == -FP16_MAX and q.meta[3, 0, 1] == FP16_MAX
    assert q.codes[1, 5] == 255 and q.codes[3, 0] == 0 and q.codes[3, 1] == 255
    for row in range(4):
        codes, zero, span = ref.quantize_group(x[row])
        assert q.codes[row].tolist() == codes and q.meta[row, 0, 0] == zero and q.meta[row, 0, 1] == span


def test_rounding_of_zero_may_exceed_the_minimum_and_codes_stay_in_range():
    low = 1000.3  # fp16(1000.3) = 1000.5 is above every value of the row
    x = torch.full((1, 64), low)
    x[0, 1] = low + 0.1
    q = codec.quantize(x, 64)
    assert q.meta[0, 0, 0].float() > x.max()
    assert q.codes.max() == 0
    assert (ref.fake_quantize(x, 8, 64) - x).abs().max() <= 0.25


def test_flipped_nibble_order_is_caught(monkeypatch):
    def flipped(codes: torch.Tensor, bits: int) -> torch.Tensor:
        packed = original(codes, bits)
        return (packed >> 4) | (packed << 4)

    original = codec.pack
    test_pack_is_planar_and_unpack_inverts_it(4, 128)
    monkeypatch.setattr(codec, "pack", flipped)
    with pytest.raises(AssertionError):
        test_pack_is_planar_and_unpack_inverts_it(4, 128)
