"""Rotations: of rows by Sylvester's matrix, and the columns of the rotary table that keys are centred with."""

import triton
import triton.language as tl
from sglang_pmkvq import formats

# Of the rotary table: what a token has in a block of pairs, first the cosines, then as many sines.
ROTARY_PAIRS = tl.constexpr(formats.ROTARY_PAIRS)
ROTARY_COLUMNS = tl.constexpr(formats.ROTARY_COLUMNS)


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def rotation_factor(dim, inverse):
    """2^−a of ``transforms.exponents``, or 2^−b for the inverse: what x·W is multiplied by."""
    total = dim.bit_length() - 1
    return 2.0 ** -(total // 2 if inverse else total - total // 2)


@triton.constexpr_function
def first_coded(tiers):
    """The first of the steps whose tier of a side is below 16 bits; as many as there are if none is."""
    return sum(1 for tier in tiers if tier == 16)


@triton.jit
def rotated(x, T: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr):
    """x·W·SCALE of fp32 x [T, D]: the butterflies of ``transforms.rotate_keys`` in the same order, so the same bits.

    SCALE is a power of two: contracting the product into a sum changes nothing.
    """
    for i in tl.static_range(log2(D)):
        pairs = tl.permute(tl.reshape(x, (T, D // (2 << i), 2, 1 << i)), (0, 1, 3, 2))
        first, second = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (T, D))
    return x * SCALE
