"""Quantizer, equivalent right shift and page packing, written as they are defined.

Nothing here is imported by the fast paths, and of theirs only the record of what is done to keys is read, none of its
arithmetic.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from sglang_pmkvq.formats import TIERS, K
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled, Transform

FP16_MAX = 65504.0


def quantize_group(x: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """8-bit codes, zero and range (0-dim fp16) of one group of fp32 channels ``[G]`` (paper eq. 1, 2).

    A non-finite channel makes zero NaN and all codes 0. Finite zero and range are clamped to fp16.
    """
    if not bool(torch.isfinite(x).all()):
        return [0] * x.numel(), torch.tensor(math.nan).half(), torch.tensor(0.0).half()
    low, high = x.min(), x.max()
    zero = torch.clamp(low, -FP16_MAX, FP16_MAX).half()
    span = torch.clamp(high - low, 0.0, FP16_MAX).half()
    if span == 0:
        return [0] * x.numel(), zero, span
    t = torch.round((x - zero.float()) * 255.0 / span.float())
    return [int(min(max(value, 0.0), 255.0)) for value in t.tolist()], zero, span


def shift_code(code: int, dst_bits: int) -> int:
    """One code of 2·dst_bits as one of ``dst_bits``: round half up of code / (2^b + 1)."""
    return math.floor(code / (2**dst_bits + 1) + 0.5)


def clipped_shift_code(code: int, clip: float) -> int:
    """One 4-bit code as one of 2 bits that spans the middle share ``clip`` of the range: the nearest of four levels.

    On the scale of 4-bit codes level j lies at 15·((1 − clip)/2 + clip·j/3). Ties go to the inner level; without
    clipping there are none, and this is ``shift_code(code, 2)``.
    """
    factor = Fraction(clip)
    levels = [15 * ((1 - factor) / 2 + factor * j / 3) for j in range(4)]
    return min(range(4), key=lambda j: (abs(levels[j] - code), abs(2 * j - 3)))


def chain(code: int, bits: int, clip: float = 1.0) -> int:
    """An 8-bit code after the shifts down to ``bits``; ``clip`` acts in the last one, from 4 to 2 bits."""
    width = 8
    while width > bits:
        width //= 2
        code = clipped_shift_code(code, clip) if width == 2 else shift_code(code, width)
    return code


def clipped_range(
    zero: torch.Tensor, span: torch.Tensor, clip: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 zero and range of the middle share ``clip`` of a stored (zero, range): how 2-bit codes are read."""
    return zero.float() + span.float() * ((1.0 - clip) / 2.0), span.float() * clip


def dequantize(codes: torch.Tensor, zero: torch.Tensor, span: torch.Tensor, bits: int) -> torch.Tensor:
    """codes · range/(2^b − 1) + zero in fp32; ``zero`` and ``span`` broadcast against ``codes``."""
    return codes.float() * (span.float() / (2**bits - 1)) + zero.float()


def pack_page(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """One page of codes ``[H, P, D]`` as bytes ``[H, P, D*bits/8]`` in the pool's planar layout."""
    width = codes.shape[-1] * bits // 8
    rows = []
    for row in codes.flatten(0, 1).tolist():
        packed = [0] * width
        for channel, code in enumerate(row):
            plane, byte = divmod(channel, width)
            packed[byte] |= code << (bits * plane)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.uint8).view(*codes.shape[:2], width)


def unpack_page(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack_page``: uint8 ``[H, P, w]`` to int64 codes ``[H, P, w*8/bits]``."""
    width = packed.shape[-1]
    rows = []
    for row in packed.flatten(0, 1).tolist():
        codes = [0] * (width * 8 // bits)
        for channel in range(len(codes)):
            plane, byte = divmod(channel, width)
            codes[channel] = (row[byte] >> (bits * plane)) % 2**bits
        rows.append(codes)
    return torch.tensor(rows, dtype=torch.int64).view(*packed.shape[:2], -1)


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """x·W of rows ``[..., D]``, W Sylvester's matrix of ±1: (a, b)·W = (a·W + b·W, a·W − b·W), and 1·W = 1."""
    if x.shape[-1] == 1:
        return x
    first, second = walsh_hadamard(x.unflatten(-1, (2, -1))).unbind(-2)
    return torch.cat((first + second, first - second), dim=-1)


def rotated_keys(x: torch.Tensor) -> torch.Tensor:
    """What is quantized of keys ``[..., D]`` that are rotated: x·W/2^⌈log2(D)/2⌉."""
    return walsh_hadamard(x) / 2 ** math.ceil(math.log2(x.shape[-1]) / 2)


def unrotated_keys(x: torch.Tensor) -> torch.Tensor:
    """Inverse of ``rotated_keys``, and what queries are multiplied by: W·W = D·I, so x·W/2^⌊log2(D)/2⌋."""
    return walsh_hadamard(x) / 2 ** math.floor(math.log2(x.shape[-1]) / 2)


def center_term(coding: Coding, positions: torch.Tensor) -> torch.Tensor | None:
    """R_m c of one layer at int64 ``positions [T]``, fp32 ``[H, T, D]``; None without a centre.

    Pair (c₁, c₂) turned by the model's own angle is (c₁ + i·c₂)·(cos + i·sin).
    """
    center = coding.center
    if center is None:
        return None
    table, (vector,) = center.rotary, center.vector.double()
    out = torch.zeros(vector.shape[0], positions.numel(), vector.shape[1], device=vector.device)
    for block in center.blocks[0]:
        rows = table.values[table.blocks.index(block)][positions.to(vector.device)].double()
        turn = torch.complex(rows[:, :8].contiguous(), rows[:, 8:].contiguous())
        first, second = table.first[8 * block : 8 * block + 8], table.second[8 * block : 8 * block + 8]
        turned = torch.complex(vector[:, first], vector[:, second])[:, None] * turn
        out[..., first] = turned.real.float()
        out[..., second] = turned.imag.float()
    return out


def transformed_keys(x: torch.Tensor, transform: Transform) -> torch.Tensor:
    """What is quantized of one layer's keys (or values) ``[..., H, T, D]``, fp32, their centre already taken off."""
    if isinstance(transform, Scaled):
        return x / transform.scale[:, None]
    return rotated_keys(x) if isinstance(transform, Hadamard) else x


def restored_keys(x: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Inverse of ``transformed_keys``."""
    if isinstance(transform, Scaled):
        return x * transform.scale[:, None]
    return unrotated_keys(x) if isinstance(transform, Hadamard) else x


def fake_quantize(
    x: torch.Tensor,
    bits: int,
    group_size: int,
    coding: Coding | None = None,
    side: int = K,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a reader of the pool sees instead of ``x [..., D]`` at ``bits``: same shape and dtype.

    The pool's chain (16 → 8 → … → bits), fp16 (zero, range) included; 16 bits return ``x`` itself.
    Meant as an end-to-end oracle on another framework's cache, so it works on whole tensors; ``quantize_group`` and
    ``chain`` are the definitions that it is tested against.

    Args:
        coding: of one layer (``Coding.pick``): then ``x`` is a side of it ``[..., H, T, D]``. None: coded as they are.
        side: K or V.
        positions: int64 ``[T]`` of the tokens, where keys have a centre; None is 0, 1, 2, …

    Raises:
        ValueError: a width or group size that the pool does not have.
    """
    if bits not in TIERS:
        raise ValueError(f"bits must be one of {TIERS}, got {bits}")
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size must divide {x.shape[-1]}, got {group_size}")
    coding = coding or Coding()
    if bits == 16:
        return x
    transform, center = coding.transform_of(side), None
    values = x.float()
    if side == K and coding.center is not None:
        center = center_term(coding, torch.arange(x.shape[-2]) if positions is None else positions)
    if center is not None:
        values = values - center
    values = transformed_keys(values, transform)
    groups = values.reshape(*x.shape[:-1], -1, group_size)
    low = groups.min(dim=-1, keepdim=True).values
    high = groups.max(dim=-1, keepdim=True).values
    broken = ~torch.isfinite(groups).all(dim=-1, keepdim=True)
    zero = low.clamp(-FP16_MAX, FP16_MAX).half().float()
    span = (high - low).clamp(0.0, FP16_MAX).half().float()
    divisor = torch.where(span > 0, span, torch.ones_like(span))
    codes = torch.round((groups - zero) * 255.0 / divisor).clamp(0, 255)
    codes = torch.where((span > 0) & ~broken, codes, torch.zeros_like(codes))
    width = 8
    if bits == 2 and side == K and coding.key_clip is not None:
        codes = torch.floor(codes / 17 + 0.5)
        clip = coding.key_clip[:, None].expand(x.shape[:-1])[..., None, None]
        # Half-way between levels 0 and 1, and between 2 and 3, on the scale of 4-bit codes; exact in fp64.
        low, high = 7.5 - 5 * clip.double(), 7.5 + 5 * clip.double()
        codes = (codes >= low).float() + (codes >= 8) + (codes > high)
        zero, span = clipped_range(zero, span, clip)
        width = 2
    while width > bits:
        width //= 2
        # Exact in fp32: code/(2^b + 1) + 1/2 is at least 1/34 away from an integer it does not equal,
        # and never equals one from rounding, because 2^b + 1 is odd.
        codes = torch.floor(codes / (2**width + 1) + 0.5)
    out = torch.where(broken, torch.full_like(groups, math.nan), codes * (span / (2**bits - 1)) + zero)
    restored = restored_keys(out.reshape(x.shape), transform)
    return (restored if center is None else restored + center).to(x.dtype)
