"""What a GPU's rounding does to attention on codes: the Triton kernels' arithmetic, step by step, in torch.

Triton's interpreter computes in fp32 where a GPU rounds operands to bf16, so it judges layout and
algebra only. Here every value that the kernels round to the dot dtype is rounded, and products are
summed in fp32 as tensor cores do (in another order).
"""

from __future__ import annotations

import torch

from sglang_pmkvq.kernels.reference.codes import dequantize


def attention_on_codes(
    q: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor],
    zero: tuple[torch.Tensor, torch.Tensor],
    span: tuple[torch.Tensor, torch.Tensor],
    bits: tuple[int, int],
    key_scale: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One query over T tokens, fp32 ``[D]``, before the output itself is rounded.

    Args:
        q: ``[D]`` in ``dtype``. codes: K and V codes ``[T, D]``. zero, span: ``[T, D/G]`` fp16 each.
        key_scale: fp32 ``[D]``. dtype: the dot dtype.
    """
    k_codes, v_codes = codes
    groups = zero[0].shape[1]

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    q_scaled = rounded(q.float() * key_scale).view(groups, -1)
    dots = (k_codes.float().view(len(k_codes), groups, -1) * q_scaled).sum(-1)
    scores = dots * (span[0].float() / (2 ** bits[0] - 1)) + zero[0].float() * q_scaled.sum(-1)
    scores = scores.sum(-1) * scale
    weight = torch.exp(scores - scores.max())
    # p·range is rounded; codes are centred, so half the range joins zero.
    product = rounded(weight[:, None] * span[1].float())
    half = (2 ** bits[1] - 1) / 2
    centred = v_codes.float().view(len(v_codes), groups, -1) - half
    out = (product[:, :, None] * centred).sum(0) / (2 ** bits[1] - 1)
    out += (weight[:, None] * (zero[1].float() + span[1].float() / 2)).sum(0)[:, None]
    return out.flatten() / weight.sum()


def center_scores(q_center: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype, parts: int = 2) -> torch.Tensor:
    """What a centre adds to scores, fp32 ``[T]``, ahead of the softmax scale: its query goes in parts of ``dtype``.

    Args:
        q_center: fp32 ``[16]``, as a query meets a block of the table. rows: ``[T, 16]`` in ``dtype``.
        parts: 2 as the kernels do it; 1 is what they would lose without the low part.
    """
    # fp16 would overflow: sums of some thousand are divided by a power of two.
    step = 64.0 if dtype == torch.float16 else 1.0
    rest, out = q_center.float() / step, torch.zeros(len(rows))
    for _ in range(parts):
        part = rest.to(dtype)
        out += rows.float() @ part.float()
        rest = rest - part.float()
    return out * step


def attention_on_values(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """The same for 16-bit pages, ``k``, ``v [T, D]`` in ``dtype``: weights are rounded."""
    scores = (k.float() @ q.float()) * scale
    weight = torch.exp(scores - scores.max())
    return (weight.to(dtype).float() @ v.float()) / weight.sum()


def dequantized(codes: torch.Tensor, zero: torch.Tensor, span: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 values ``[T, D]`` of codes ``[T, D]`` with (zero, range) ``[T, D/G]``."""
    width = codes.shape[1] // zero.shape[1]
    return dequantize(codes, zero.repeat_interleave(width, 1), span.repeat_interleave(width, 1), bits)
