"""Which backend serves a pool: decided here, once, by the device of its tensors."""

from __future__ import annotations

from typing import Literal

import torch

from sglang_pmkvq.kernels.backend import Kernels

BackendName = Literal["auto", "torch", "triton"]
BACKENDS: tuple[BackendName, ...] = ("auto", "torch", "triton")


def kernels_for(device: torch.device | str, name: BackendName = "auto") -> Kernels:
    """Triton on CUDA and torch on the CPU, unless ``name`` says otherwise.

    Raises:
        ValueError: an unknown name, or "triton" for CPU tensors without TRITON_INTERPRET=1.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "torch" or (name == "auto" and on_cpu):
        from sglang_pmkvq.kernels.torch_kernels import TorchKernels

        return TorchKernels()
    from sglang_pmkvq.kernels.launch import interpreted

    if on_cpu and not interpreted():
        raise ValueError("Triton kernels on CPU tensors need TRITON_INTERPRET=1 before triton is imported")
    from sglang_pmkvq.kernels.triton_kernels import TritonKernels

    return TritonKernels()
