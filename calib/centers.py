"""Centres of keys: what all keys of a head have in common before they are turned. Not in the paper.

A key is R_m (W x + b); where the bias b, or the mean of W x + b, is large against what varies from token to token, it
sets the ranges that codes have to span. ``kernels/rotary.py`` takes R_m c off before coding and adds q·R_m c when
reading, so any c is right and a good one makes ranges small. Sums of R_m⁻¹ k_m over samples say what is good.

Stretching positions changes nothing here: R_m⁻¹ k_m of a key that is turned elsewhere is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_pmkvq.calib.model import SINK
from sglang_pmkvq.calib.sweep import State
from sglang_pmkvq.kernels.rotary import CENTER_TOLERANCE, Center, RotaryTable, chosen_blocks


def mean_state(layers: int, heads: int, head_dim: int) -> State:
    """Accumulators of ``add_keys``, float64: ``sum`` and ``squares`` [L, H, D], ``tokens`` [L]."""
    return {
        "sum": torch.zeros(layers, heads, head_dim, dtype=torch.float64),
        "squares": torch.zeros(layers, heads, head_dim, dtype=torch.float64),
        "tokens": torch.zeros(layers, dtype=torch.float64),
    }


def add_keys(state: State, layer: int, keys: torch.Tensor, rotary: RotaryTable) -> None:
    """Add keys [H, T, D] of one sample, turned by rows 0 .. T − 1 of ``rotary``, but for the first page."""
    flat = rotary.unturned(keys, torch.arange(keys.shape[1])).double()[:, SINK:]
    state["sum"][layer] += flat.sum(1).cpu()
    state["squares"][layer] += flat.square().sum(1).cpu()
    state["tokens"][layer] += flat.shape[1]


def mean_of(state: State) -> torch.Tensor:
    """Mean key before it is turned, fp32 [L, H, D]."""
    return (state["sum"] / state["tokens"].view(-1, 1, 1).clamp_min(1)).float()


def spread_around(state: State, vector: torch.Tensor) -> torch.Tensor:
    """fp32 [L, H]: mean squared distance of keys from ``vector [L, H, D]``, summed over channels."""
    tokens = state["tokens"].view(-1, 1, 1).clamp_min(1)
    c = vector.double()
    each = state["squares"] / tokens - 2 * c * state["sum"] / tokens + c.square()
    return each.sum(-1).clamp_min(0.0).float()


@dataclass(frozen=True)
class KeyCenter:
    """One kind of centre for all layers.

    Attributes:
        spread: fp32 [L, H], energy of keys around it.
        center: what of it is worth taking off; a layer without blocks has none.
    """

    spread: torch.Tensor
    center: Center

    @classmethod
    def of(cls, vector: torch.Tensor, state: State, rotary: RotaryTable) -> KeyCenter:
        spread = spread_around(state, vector)
        # What final widths will be is not known yet.
        blocks = chosen_blocks(vector, spread, rotary, min(CENTER_TOLERANCE.values()))
        return cls(spread, Center.of(vector, blocks, rotary))


def key_centers(
    names: Sequence[str], biases: Sequence[torch.Tensor | None], state: State, rotary: RotaryTable
) -> dict[str, KeyCenter]:
    """Centres by name, ``bias`` and ``mean``; of biases only if some layer has one.

    Args:
        names: in ``formats.KEY_CENTERS``; ``none`` is left out.
        rotary: long enough for every sample.
    """
    mean = mean_of(state)
    bias = torch.stack([torch.zeros_like(mean[0]) if one is None else one for one in biases])
    vectors = {"bias": bias if bool(bias.any()) else None, "mean": mean}
    return {
        name: KeyCenter.of(vector, state, rotary)
        for name in names
        if (vector := vectors.get(name)) is not None
    }
