"""Hadamard rotation of keys: K·W/2^a is quantized, queries q·W/2^b read it; W·W = D·I and 2^(a + b) = D.

W is Sylvester's matrix of ±1, so q·K stays, and every channel that is coded mixes all channels of a head: an outlier is
spread over all of them instead of stretching the range of its group. Powers of two in place of √D scale exactly, so
that all who rotate make the same codes, bit for bit.
"""

from __future__ import annotations

import torch


def exponents(head_dim: int) -> tuple[int, int]:
    """(a, b): rotated keys are divided by 2^a, rotated queries by 2^b. ``head_dim`` is a power of two."""
    total = head_dim.bit_length() - 1
    assert head_dim == 1 << total
    return total - total // 2, total // 2


def rotate_keys(x: torch.Tensor) -> torch.Tensor:
    """x·W/2^a of fp32 ``x [..., D]``, by butterflies of channels i and i + h for h = 1, 2, 4, …, D/2."""
    dim = x.shape[-1]
    h = 1
    while h < dim:
        first, second = x.unflatten(-1, (-1, 2, h)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        h *= 2
    return x * 2.0 ** -exponents(dim)[0]


def query_rotation(head_dim: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """W/2^b ``[D, D]``, exact in every float dtype."""
    a, b = exponents(head_dim)
    return (rotate_keys(torch.eye(head_dim)) * 2.0 ** (a - b)).to(device=device, dtype=dtype)
