"""Device code: ``@triton.jit`` functions only. Launchers, checks and buffers are one level up.

Kernels take the dtype of the dot operands as a constexpr ``DOT`` and cast whatever they load to it
before any arithmetic. On a GPU that is the storage dtype and the cast is free. Triton's interpreter
computes bf16 on raw bits, so there ``DOT`` is fp32.
"""
