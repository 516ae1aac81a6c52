"""Codes: quantizer, equivalent right shift, planar packing. Pure functions on torch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

FP16_MAX = 65504.0


class Quantized(NamedTuple):
    """Result of ``quantize``.

    Attributes:
        codes: uint8 ``[..., D]``, 8-bit codes.
        meta: fp16 ``[..., D/G, 2]``, (zero, range).
        clipped: int64 scalar tensor, pairs whose finite zero or range was clamped to fp16.
    """

    codes: torch.Tensor
    meta: torch.Tensor
    clipped: torch.Tensor


def quantize(x: torch.Tensor, group_size: int) -> Quantized:
    """8-bit codes of fp32 ``x [..., D]``, per group of ``group_size`` channels (paper eq. 1, 2).

    zero = min and range = max − min are rounded to fp16 first and the codes are taken from the
    *rounded* values, code = clamp(round((x − zero)·255/range), 0, 255) (half to even), so that the
    reader's codes·range/255 + zero has no error from storing them. Rounding can put x outside
    [zero, zero + range]; the clamp absorbs that. A range of 0 gives codes 0: a constant group reads
    back as fp16(constant), which is exact for fp16 models, and for bf16 models where the constant
    is a multiple of 2^-24 and at most 65504 (every normal bf16 from 2^-14 on: 8 bits of mantissa
    fit into 11).

    A group with a NaN or an infinity gets zero = NaN, hence reads back as NaN throughout: a broken
    activation must not turn into a plausible number. Finite values beyond ±65504 are clamped and
    counted.
    """
    groups = x.unflatten(-1, (-1, group_size))
    low, high = torch.aminmax(groups, dim=-1)  # both propagate NaN
    span = high - low
    finite = torch.isfinite(low) & torch.isfinite(high)
    clipped = (finite & ((low.abs() > FP16_MAX) | (span > FP16_MAX))).sum()
    zero = low.clamp(-FP16_MAX, FP16_MAX).masked_fill_(~finite, torch.nan).to(torch.float16)
    span = span.clamp_(max=FP16_MAX).masked_fill_(~finite, 0.0).to(torch.float16)
    meta = torch.stack((zero, span), dim=-1)

    span32 = span.float().unsqueeze(-1)
    t = (groups - zero.float().unsqueeze(-1)).mul_(255.0).div_(span32).round_().clamp_(0.0, 255.0)
    # Division by a zero range left NaN or ±inf behind, which has no defined integer value.
    codes = t.masked_fill_(span32 == 0.0, 0.0).to(torch.uint8)
    return Quantized(codes.flatten(-2), meta, clipped)


def shift_codes(codes: torch.Tensor, dst_bits: int) -> torch.Tensor:
    """Equivalent right shift 2b → b of uint8 codes (paper eq. 3), b = ``dst_bits``; uint8 as given.

    X_b = ((2^2b − 2^b + 1)·(X_2b + 2^(b−1))) >> 3b = round(X_2b / (2^b + 1)) for every code.
    """
    b = dst_bits
    factor = (1 << 2 * b) - (1 << b) + 1
    wide = codes.to(torch.int32)  # 241·(255 + 8) needs 16 bits unsigned
    return wide.add_(1 << (b - 1)).mul_(factor).bitwise_right_shift_(3 * b).to(torch.uint8)


def shift_clipped(codes: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """4-bit codes as 2-bit codes of a clipped range, uint8; ``edge`` as ``coding.clip_edges`` has it, broadcast."""
    return (codes >= edge).to(torch.uint8).add_(codes >= 8).add_(codes >= 16 - edge)


def shift_down(codes: torch.Tensor, src_bits: int, dst_bits: int, edge: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of ``src_bits`` as codes of ``dst_bits``, one equivalent right shift per halving.

    ``edge`` clips the range in the step from 4 to 2 bits (see ``coding.clip_edges``).
    """
    while src_bits > dst_bits:
        src_bits //= 2
        if src_bits == 2 and edge is not None:
            codes = shift_clipped(codes, edge)
        else:
            codes = shift_codes(codes, src_bits)
    return codes


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Planar packing of uint8 codes ``[..., D]`` below 2^bits into uint8 ``[..., D*bits/8]``."""
    per_byte = 8 // bits
    planes = codes.unflatten(-1, (per_byte, -1))
    out = planes[..., 0, :].clone()
    for i in range(1, per_byte):
        out |= planes[..., i, :] << (i * bits)
    return out


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack``: uint8 ``[..., w]`` to uint8 codes ``[..., w*8/bits]``."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)
