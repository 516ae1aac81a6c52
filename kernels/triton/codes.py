"""Codes as dot operands.

A b-bit code c becomes the value 1 + c/SC, SC a power of two: its bits go straight into the mantissa
below a constant exponent, so four codes of one plane cost a shift, an and-or and two byte
permutations, and no conversion instruction. bf16 has 7 bits of mantissa and fp16 10, of which the
low byte holds 8: SC = 2^b and 2^(b+2). 8-bit codes do not fit bf16's mantissa and are converted
(then the value is c, exact up to 255). The callers fold SC and the 1 into scale and zero, so the
algebra needs no subtraction per element; the 1 is at most four times the largest c/SC, so nothing
cancels badly in fp32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def code_bias(bits, mantissa):
    """1 where the value is 1 + c/SC, 0 where it is c itself."""
    return 0.0 if bits == 8 and mantissa == 7 else 1.0


@triton.constexpr_function
def code_step(bits, mantissa):
    """SC: the value of a code grows by 1/SC per code."""
    if mantissa == 7:
        return 1.0 if bits == 8 else float(2**bits)
    return float(2 ** (bits + 2))


@triton.constexpr_function
def widen_asm(bits, plane, mantissa):
    """PTX: four bytes ($2) to the four values of a plane in two registers ($0, $1)."""
    target = (7 if mantissa == 7 else 8) - bits
    shift = target - plane * bits
    move = f"shl.b32 t, $2, {shift};" if shift > 0 else f"shr.b32 t, $2, {-shift};"
    mask = (((1 << bits) - 1) << target) * 0x01010101
    low = 0x80808080 if mantissa == 7 else 0
    high = 0x3F3F3F3F if mantissa == 7 else 0x3C3C3C3C
    return (
        "{ .reg .b32 t, h;"
        f" {move}"
        f" lop3.b32 t, t, {mask}, {low}, 0xEA;"
        f" mov.b32 h, {high};"
        " prmt.b32 $0, t, h, 0x4140;"
        " prmt.b32 $1, t, h, 0x4342; }"
    )


@triton.jit
def widen(
    raw, PLANE: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr
):
    """Values of the codes of one plane of packed bytes ``raw``, dtype ``DOT``, same shape.

    Without ASM (the interpreter has no inline assembly) the same values by arithmetic, exactly.
    """
    if code_bias(BITS, MANTISSA) == 0.0:
        return raw.to(DOT)
    elif ASM:
        if MANTISSA == 7:
            return tl.inline_asm_elementwise(
                widen_asm(BITS, PLANE, MANTISSA), "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                widen_asm(BITS, PLANE, MANTISSA), "=r,=r,r", [raw], dtype=tl.float16, is_pure=True, pack=4
            )
    else:
        code = (raw >> (PLANE * BITS)) & ((1 << BITS) - 1)
        return (1.0 + code.to(tl.float32) * (1.0 / code_step(BITS, MANTISSA))).to(DOT)


@triton.jit
def zero_and_range(pair):
    """fp32 (zero, range) from the int32 that holds both as fp16, zero in the low half."""
    zero = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    span = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return zero, span


@triton.jit
def shift_once(codes, B: tl.constexpr):
    """Equivalent right shift 2B → B of int32 codes: round(x / (2^B + 1))."""
    return ((codes + (1 << (B - 1))) * ((1 << 2 * B) - (1 << B) + 1)) >> (3 * B)


@triton.jit
def shift_down(codes, SRC: tl.constexpr, DST: tl.constexpr, edge):
    """int32 codes of SRC bits as codes of DST bits, one equivalent right shift per halving.

    ``edge`` (int32 or None) clips the range in the step from 4 to 2 bits, see ``coding.clip_edges``.
    """
    if SRC >= 8 and DST <= 4:
        codes = shift_once(codes, 4)
    if SRC >= 4 and DST <= 2:
        if edge is None:
            codes = shift_once(codes, 2)
        else:
            codes = (codes >= edge).to(tl.int32) + (codes >= 8).to(tl.int32) + (codes >= 16 - edge).to(tl.int32)
    return codes
