"""Positional interpolation: short samples at the positions of long ones (paper sec. 3.3, eq. 12).

After RoPE a channel pair is a sinusoid of the position (eq. 11). Pairs of low frequency do not reach their
extremes within a short sample; spreading its positions over an effective length shows them at no extra cost.

Two ways. ``forward``, the paper's: the whole forward runs at stretched positions. ``keys``: the forward runs at
natural positions and only its keys are turned to where the stretched positions would put them. The second leaves
the hidden states as they are: a model whose heads look one token back reads something else when neighbours are
four positions apart, and every layer after the first then sees inputs that it never has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NATURAL = 0
MODES = ("keys", "forward")


def stretched_positions(length: int, effective_len: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Position ids int64 [length], token i at ⌊i · effective_len / length⌋; natural for ``NATURAL``.

    Whole positions, as a server has them; the model's own rotary embedding turns them into angles, so its
    RoPE scaling (linear, dynamic, YaRN, Llama 3) applies as it would at the effective length.
    """
    index = torch.arange(length, device=device)
    if effective_len == NATURAL or effective_len <= length:
        return index
    return index * effective_len // length


def turn(keys: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Rotated keys [H, T, D] moved from angles ``here`` to ``there``; fp32.

    Args:
        here, there: cosine and sine of norm 1, fp32 [2, T, D], in the two-halves layout of transformers.
    """
    first = keys.float()
    unrotated = first * here[0] - _half_turn(first) * here[1]
    return unrotated * there[0] + _half_turn(unrotated) * there[1]


def _half_turn(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def parse_effective_lens(text: str, seq_len: int) -> tuple[int, ...]:
    """``8192,16384`` as numbers, ``none`` as ().

    Raises:
        ValueError: not numbers, or not longer than the samples.
    """
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        lens = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lens = ()
    if not lens or lens[0] <= seq_len:
        raise ValueError(
            f"--effective-len {text}: expected lengths above --seq-len {seq_len} apart by commas, such as "
            f"{4 * seq_len}, or none"
        )
    return lens


def check_lens(lens: Sequence[int], max_positions: int | None) -> str | None:
    """A warning if a length lies beyond what the model was made for, else None."""
    if max_positions and lens and max(lens) > max_positions:
        return (
            f"effective length {max(lens)} lies beyond the {max_positions} positions of this model; "
            "keys there are extrapolated"
        )
    return None
