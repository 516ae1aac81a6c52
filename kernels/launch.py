"""A kernel launch as a value, and what launches need to know.

A launch is a value so that the very arguments of a run can also be compiled ahead of time for a GPU
that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with all its arguments.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: programs per axis.
        args: every argument by name; tensors, ints, floats, and constexpr values.
        num_warps, num_stages: warps per program, depth of software pipelining.
        maxnreg: most registers per thread, or None: more programs fit a multiprocessor.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}

    def run(self) -> None:
        """Launches on the current stream; nothing happens for an empty grid."""
        if min(self.grid) > 0:
            self.kernel[self.grid](**self.args, **self.options)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Dtype of the dot operands for a storage dtype, as Triton names it.

    The interpreter computes bf16 on raw bits, so there bf16 is cast to fp32 before any arithmetic.
    """
    import triton.language as tl

    if dtype == torch.float16:
        return tl.float16
    assert dtype == torch.bfloat16
    return tl.float32 if interpreted() else tl.bfloat16


def mantissa_bits(dtype: torch.dtype) -> int:
    """Mantissa bits of a storage dtype: how codes become dot operands (``kernels/triton/codes.py``)."""
    return {torch.float16: 10, torch.bfloat16: 7}[dtype]


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def upload_rows(rows: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Host integer arrays of one length as int32 tensors on a device, in one transfer.

    Each starts at a multiple of 16 bytes: Triton compiles a kernel anew for every combination of
    aligned and unaligned pointers.
    """
    n = rows[0].size
    host = np.zeros((len(rows), -(-n // 4) * 4), dtype=np.int32)
    for i, row in enumerate(rows):
        host[i, :n] = row
    return tuple(row[:n] for row in upload(torch.from_numpy(host), device))


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, without waiting: torch keeps the pinned copy until it is consumed."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
