"""Reparameterization of keys: scales s = (max|K|)^α (paper sec. 3.3, eq. 9, 10) or a rotation; clip factors at 2 bits.

Scores do not change if keys are divided by s and queries multiplied by it, but a group of channels with one
outlier quantizes better once the outlier is scaled down. Applied where codes are made and read, after RoPE:
no weight is touched, so biases and QK-norm need nothing, and the two channels of a RoPE pair need not share
a scale (folded into weights they would have to).

In place of scales keys may be rotated by a Hadamard matrix, and queries with them: there is nothing to fit. Not in
the paper.

A clip factor c says that 2-bit codes span the middle share c of their group's range. The extremes of a group
are rare and four levels are few: losing them buys smaller steps for everything else. It acts in the step
from 4 to 2 bits alone, so pages at 8 and 4 bits pay nothing for it. Not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import CalibrationModel, observing
from sglang_pmkvq.calib.positions import NATURAL, turn
from sglang_pmkvq.calib.sweep import State
from sglang_pmkvq.kernels.coding import Coding, Transform, Scaled
from sglang_pmkvq.kernels.reference.codes import fake_quantize

ALPHAS: tuple[float, ...] = tuple(i / 19 for i in range(20))
CLIPS: tuple[float, ...] = tuple(1 - i / 20 for i in range(13))  # 1 .. 0.4; four levels of a normal: about 0.6
QUERY_ROWS = 256


def key_scales(key_max: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """fp32 scales like ``key_max [..., D]``, with α broadcast against it; geometric mean 1 over channels.

    The common factor changes nothing but keeps K / s in the range of fp16. A channel that is always 0
    counts as the smallest normal one.
    """
    logs = torch.log(key_max.double().clamp_min(1e-6)) * alpha
    return torch.exp(logs - logs.mean(-1, keepdim=True)).float()


def range_state(model: CalibrationModel, lens: tuple[int, ...]) -> State:
    """Accumulators of ``observe_ranges``: max|K| of natural and stretched samples, fp32 [1 + lens, L, H, D]."""
    return {"key_max": torch.zeros(1 + len(lens), model.layers, model.kv_heads, model.head_dim)}


def observe_ranges(
    model: CalibrationModel, sample: Sample, lens: tuple[int, ...], state: State, mode: str = "keys"
) -> None:
    """Raise the per-channel maxima of |K| by one sample, once per effective length (paper eq. 10, 12).

    Args:
        mode: what is stretched: ``keys`` or the whole ``forward`` (see ``positions``).
    """

    def raise_to(place: int, layer: int, keys: torch.Tensor) -> None:
        largest = keys.abs().amax(1).float().cpu()
        torch.maximum(state["key_max"][place, layer], largest, out=state["key_max"][place, layer])

    if mode == "keys":
        length = len(sample.tokens)
        angles = [model.angles(length, effective) for effective in (NATURAL, *lens)]

        def turned(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            raise_to(0, layer, k[0])
            for place in range(1, len(angles)):
                raise_to(place, layer, turn(k[0], angles[0], angles[place]))
            return k, v

        with observing(turned):
            model.hidden(sample)
        return
    for place, effective in enumerate((NATURAL, *lens)):

        def observer(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: int = place
        ) -> tuple[torch.Tensor, torch.Tensor]:
            raise_to(place, layer, k[0])
            return k, v

        with observing(observer):
            model.hidden(sample, effective)


def observe_alphas(
    model: CalibrationModel,
    sample: Sample,
    key_max: torch.Tensor,
    pairs: list[list[tuple[int, int]]],
    group_size: int,
    clips: torch.Tensor | None,
    state: State,
) -> None:
    """Add one sample's error of the attention output for every α.

    Args:
        key_max: fp32 [L, H, D].
        pairs: per layer, (K bits, V bits) to try; V at 16 is left exact.
        clips: clip factors fp32 [L, H] that 2-bit keys have, or None.
        state: ``error`` float64 [L, H, pairs, α], summed squared error.
    """

    def observer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, rows = query_rows(q[0])
        scaling = model.scaling(layer)
        maxima = key_max[layer].to(k.device)
        clip = None if clips is None else clips[layer].to(k.device)
        exact = attention_rows(query, k[0], v[0], rows, scaling)
        for place, (k_bits, v_bits) in enumerate(pairs[layer]):
            value = fake_quantize(v[0].float(), v_bits, group_size)
            for index, alpha in enumerate(ALPHAS):
                coding = Coding(Scaled(key_scales(maxima, alpha)), clip)
                key = fake_quantize(k[0].float(), k_bits, group_size, coding)
                error = attention_rows(query, key, value, rows, scaling) - exact
                state["error"][layer, :, place, index] += error.square().sum((1, 2, 3)).double().cpu()
                if k_bits == 16:
                    break  # nothing is scaled, every α is the first
        return k, v

    with observing(observer):
        model.hidden(sample)


def observe_clips(
    model: CalibrationModel,
    sample: Sample,
    layers: Sequence[int],
    transform: Transform,
    group_size: int,
    state: State,
) -> None:
    """Add one sample's error of the attention output, keys at 2 bits and values exact, for every clip factor.

    Args:
        layers: those to look at.
        transform: of the keys of all layers.
        state: ``error`` float64 [L, H, clips], summed squared error.
    """

    def observer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in layers:
            return k, v
        query, rows = query_rows(q[0])
        own = transform.on(k.device).pick(layer)
        exact = attention_rows(query, k[0], v[0], rows, model.scaling(layer))
        for index, clip in enumerate(CLIPS):
            share = torch.full((k.shape[1],), clip, device=k.device)
            key = fake_quantize(k[0].float(), 2, group_size, Coding(own, share))
            error = attention_rows(query, key, v[0], rows, model.scaling(layer)) - exact
            state["error"][layer, :, index] += error.square().sum((1, 2, 3)).double().cpu()
        return k, v

    with observing(observer):
        model.hidden(sample)


def query_rows(q: torch.Tensor, most: int = QUERY_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``most`` query positions spread over the sample, always the last: (q [Hq, R, D], rows [R])."""
    length = q.shape[1]
    count = min(length, most)
    rows = (torch.arange(1, count + 1, device=q.device) * length // count) - 1
    return q[:, rows], rows


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, scaling: float
) -> torch.Tensor:
    """fp32 causal attention of query positions ``rows`` [R]: q [Hq, R, D], k, v [H, T, D] → [H, Hq/H, R, D]."""
    heads = k.shape[0]
    grouped = q.float().unflatten(0, (heads, -1))
    scores = grouped @ k.float()[:, None].transpose(-1, -2) * scaling
    ahead = torch.arange(k.shape[1], device=k.device)[None] > rows[:, None]
    return scores.masked_fill_(ahead, -math.inf).softmax(-1) @ v.float()[:, None]


def best_alphas(error: torch.Tensor) -> torch.Tensor:
    """α of least error along the last axis, float64 [...]; the smallest one on a tie."""
    return torch.tensor(ALPHAS, dtype=torch.float64)[error.argmin(-1)]


def best_clips(error: torch.Tensor) -> torch.Tensor:
    """Clip factor of least error along the last axis, fp32 [...]; 1 on a tie, so where nothing was measured."""
    return torch.tensor(CLIPS)[error.argmin(-1)]
