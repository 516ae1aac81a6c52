"""What only a GPU would show: rounding of the dot operands, emulated, and the PTX that widens codes, executed."""

from __future__ import annotations

import re

import pytest
import torch

from sglang_pmkvq.kernels.cpu import codes as codec
from sglang_pmkvq.kernels.reference.attention import attention
from sglang_pmkvq.kernels.reference.rounding import attention_on_codes, attention_on_values, center_scores, dequantized
from sglang_pmkvq.kernels.triton.codes import code_bias, code_step, widen_asm

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (4, 2), (8, 4)])
@pytest.mark.parametrize("tokens", [1, 33, 4096])
def test_rounded_operands_stay_within_the_tolerance(dtype, bits, tokens):
    gen = torch.Generator().manual_seed(tokens)
    q, key_scale = torch.randn(128, generator=gen).to(dtype), torch.exp2(torch.rand(128, generator=gen) * 2 - 1)
    quantized = [codec.quantize(torch.randn(tokens, 128, generator=gen), 64) for _ in range(2)]
    codes = tuple(codec.shift_down(x.codes, 8, b) for x, b in zip(quantized, bits, strict=True))
    zero, span = (tuple(x.meta[..., i] for x in quantized) for i in (0, 1))
    k, v = (dequantized(c, z, s, b) for c, z, s, b in zip(codes, zero, span, bits, strict=True))
    want, _ = attention(q.view(1, 1, -1), (k * key_scale).unsqueeze(1), v.unsqueeze(1), 128**-0.5)
    got = attention_on_codes(q, codes, zero, span, bits, key_scale, 128**-0.5, dtype)
    assert relative(got, want.flatten()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_stay_within_the_tolerance(dtype):
    q, k, v = torch.randn(3, 1000, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    want, _ = attention(q[:1].unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 128**-0.5)
    assert relative(attention_on_values(q[0], k, v, 128**-0.5, dtype), want.flatten()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype,loses,keeps", [(torch.bfloat16, 0.5, 4e-3), (torch.float16, 0.05, 5e-4)])
def test_a_centres_query_needs_two_parts(dtype, loses, keeps):
    """A key bias of 350 in one slow pair, as the layers of Qwen2.5 have it, and queries of 8 per channel.

    Errors of logits, the largest of many queries: one rounding would be more than codes lose.
    """
    gen = torch.Generator().manual_seed(0)
    angle = torch.arange(512)[:, None] * 1e6 ** (-torch.arange(56, 64) / 64)
    rows = torch.cat((angle.cos(), angle.sin()), 1).to(dtype)
    c1, c2 = torch.randn(2, 8, generator=gen) * 10
    c1[4], c2[4] = 315.0, 150.0
    error = {1: 0.0, 2: 0.0}
    for _ in range(50):
        first, second = (torch.randn(2, 8, generator=gen) * 8).to(dtype).float()
        q_center = torch.cat((first * c1 + second * c2, second * c1 - first * c2))
        want = rows.double() @ q_center.double()
        for parts in error:
            got = center_scores(q_center, rows, dtype, parts)
            error[parts] = max(error[parts], float((got - want).abs().max()) * 128**-0.5)
    assert error[1] > loses and error[2] < keeps, error


def execute(ptx: str, word: int) -> list[int]:
    """Results $0, $1 of the few PTX instructions that ``widen_asm`` uses, on one 32-bit input."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for name, arguments in re.findall(r"(\w+)\.b32 ([^;]+);", ptx.replace(".reg .b32 t, h;", "")):
        target, *operands = [x.strip() for x in arguments.split(",")]
        a, *rest = [value(x) for x in operands]
        if name == "mov":
            result = a
        elif name == "shl":
            result = a << rest[0]
        elif name == "shr":
            result = a >> rest[0]
        elif name == "lop3":
            assert rest[2] == 0xEA  # (a & b) | c
            result = (a & rest[0]) | rest[1]
        else:
            assert name == "prmt"
            source = (a | rest[0] << 32).to_bytes(8, "little")
            result = int.from_bytes(bytes(source[rest[1] >> 4 * i & 7] for i in range(4)), "little")
        registers[target] = result & 0xFFFFFFFF
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize("dtype,mantissa", [(torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_ptx_turns_bytes_into_the_promised_values(dtype, mantissa, bits):
    """Every byte in every lane and plane: 1 + c/SC, bit for bit, and c recovered from it exactly."""
    if code_bias(bits, mantissa) == 0:
        assert code_step(bits, mantissa) == 1  # converted, not placed: the value is the code
        return
    for plane in range(8 // bits):
        ptx = widen_asm(bits, plane, mantissa)
        for byte in range(256):
            lanes = [byte, 255 - byte, (byte * 7 + 3) % 256, byte ^ 0x5A]
            results = execute(ptx, int.from_bytes(bytes(lanes), "little"))
            halves = [x >> s & 0xFFFF for x in results for s in (0, 16)]
            got = torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(dtype).float()
            codes = torch.tensor([(x >> plane * bits) & (2**bits - 1) for x in lanes]).float()
            assert torch.equal((got - 1) * code_step(bits, mantissa), codes)
