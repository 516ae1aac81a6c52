"""What coding does to attention logits."""

from __future__ import annotations

import torch

from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize


def key_error(
    q: torch.Tensor, keys: torch.Tensor, coding: Coding, bits: int, group_size: int, positions: torch.Tensor
) -> float:
    """Relative error of the logits that queries take from coded keys of one layer: √(Σe² / Σs²).

    Over all queries and tokens, e = q·k̂ − q·k and s = q·k, each less its mean over the tokens of a query: a constant
    changes no softmax. 0 where logits do not differ and are met exactly, infinite where only the error varies.

    Args:
        q: ``[n, Hq, D]``, after the rotary embedding; Hq/H query heads share a KV head.
        keys: ``[H, T, D]`` as 16-bit pages hold them, with ``positions [T]``.
        coding: of the layer (``Coding.pick``). bits: width of its codes.
    """
    exact = keys.float()
    coded = fake_quantize(exact, bits, group_size, coding, positions=positions)
    rows = q.float().unflatten(1, (keys.shape[0], -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [H, n * Hq/H, D]

    def varying(x: torch.Tensor) -> float:
        logits = rows @ x.transpose(1, 2)
        return float((logits - logits.mean(-1, keepdim=True)).double().square().sum())

    error, signal = varying(coded - exact), varying(exact)
    if error == 0:
        return 0.0
    return (error / signal) ** 0.5 if signal else float("inf")
