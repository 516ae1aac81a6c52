"""Errors of attention outputs by what is done to keys and values: scales, rotations, centres, clip factors.

Scales s = (max|K|)^α are the paper's (sec. 3.3, eq. 9, 10); the rest is not in the paper.

Scores do not change if keys are divided by s and queries multiplied by it, but a group of channels with one
outlier quantizes better once the outlier is scaled down. Applied where codes are made and read, after RoPE:
no weight is touched, so biases and QK-norm need nothing, and the two channels of a RoPE pair need not share
a scale (folded into weights they would have to).

In place of scales keys may be rotated by a Hadamard matrix, and queries with them: there is nothing to fit. Values
may be rotated too, and what attention sums of them is turned back. Before either a centre may be taken off keys
(``centers``); ranges and scales are then of what is left.

A clip factor c says that 2-bit codes span the middle share c of their group's range. The extremes of a group
are rare and four levels are few: losing them buys smaller steps for everything else. It acts in the step
from 4 to 2 bits alone, so pages at 8 and 4 bits pay nothing for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from sglang_pmkvq.calib.centers import add_keys
from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import SINK, CalibrationModel, as_served, observing
from sglang_pmkvq.calib.positions import NATURAL, turn
from sglang_pmkvq.calib.sensitivity import WIDTHS
from sglang_pmkvq.calib.sweep import State
from sglang_pmkvq.formats import DATA_FREE_TRANSFORMS, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import center_term, fake_quantize
from sglang_pmkvq.kernels.rotary import Center, RotaryTable
from sglang_pmkvq.kernels.transforms import Scaled, key_transform

ALPHAS: tuple[float, ...] = tuple(i / 19 for i in range(20))
CLIPS: tuple[float, ...] = tuple(1 - i / 20 for i in range(13))  # 1 .. 0.4; four levels of a normal: about 0.6
QUERY_ROWS = 128
# What values are tried with, the simpler first.
VALUE_TRANSFORMS: tuple[str, ...] = DATA_FREE_TRANSFORMS


def key_scales(key_max: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """fp32 scales like ``key_max [..., D]``, with α broadcast against it; geometric mean 1 over channels.

    The common factor changes nothing but keeps K / s in the range of fp16. A channel that is always 0
    counts as the smallest normal one.
    """
    logs = torch.log(key_max.double().clamp_min(1e-6)) * alpha
    return torch.exp(logs - logs.mean(-1, keepdim=True)).float()


def range_state(model: CalibrationModel, lens: tuple[int, ...], centers: int = 1) -> State:
    """``key_max`` of ``observe_ranges``: max|K| around each centre, natural, stretched; fp32 [C, 1 + lens, L, H, D]."""
    return {"key_max": torch.zeros(centers, 1 + len(lens), model.layers, model.kv_heads, model.head_dim)}


def observe_ranges(
    model: CalibrationModel,
    sample: Sample,
    lens: tuple[int, ...],
    state: State,
    mode: str = "keys",
    centers: Sequence[Center | None] = (None,),
) -> None:
    """Raise the per-channel maxima of |K| by one sample, once per effective length (paper eq. 10, 12).

    The first page is left out, as everywhere: see ``model.SINK``.
    Adds natural keys to the sums of ``centers.mean_state`` too, if ``state`` has them.

    Args:
        mode: what is stretched: ``keys`` or the whole ``forward`` (see ``positions``).
        centers: of all layers, taken off before; None for keys as they are.
    """
    def raise_to(index: int, place: int, layer: int, keys: torch.Tensor) -> None:
        coded = keys[:, SINK:] if keys.shape[1] > SINK else keys
        largest = coded.abs().amax(1).cpu()
        kept = state["key_max"][index, place, layer]
        torch.maximum(kept, largest, out=kept)

    length, places = len(sample.tokens), (NATURAL, *lens)
    angles = [model.angles(length, effective) for effective in places]
    for first, effective in enumerate(places if mode == "forward" else places[:1]):
        rotary = model.rotary(length, effective)
        here = [None if c is None else Center(c.vector, c.blocks, rotary).on(model.device) for c in centers]

        def observer(
            layer: int,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            first: int = first,
            rotary: RotaryTable = rotary,
            here: Sequence[Center | None] = here,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if first == 0 and "sum" in state:
                add_keys(state, layer, k[0], rotary)
            for index, center in enumerate(here):
                keys = centred(k[0], center, layer)
                raise_to(index, first, layer, keys)
                # Turning is linear: what is left of a key around its centre turns like the key.
                for place in range(1, len(places) if mode == "keys" else 0):
                    raise_to(index, place, layer, turn(keys, angles[0], angles[place]))
            return k, v

        with observing(observer):
            model.hidden(sample, effective)


def centred(keys: torch.Tensor, center: Center | None, layer: int) -> torch.Tensor:
    """Keys [H, T, D] of a layer at positions 0 .. T − 1 less their centre, fp32."""
    if center is None:
        return keys.float()
    term = center_term(Coding(center=center.pick(layer)), torch.arange(keys.shape[1]))
    assert term is not None
    return keys.float() - term


def observe_alphas(
    model: CalibrationModel,
    sample: Sample,
    key_max: torch.Tensor,
    centers: Sequence[Center | None],
    group_size: int,
    state: State,
) -> None:
    """Add one sample's error of the attention output for every α, keys at each width around each centre, values exact.

    Args:
        key_max: fp32 [C, L, H, D], of keys around each centre.
        centers: of all layers, on the model's device; layers without blocks are left out.
        state: ``error`` float64 [C, L, H, widths, α], summed squared error.
    """

    def observer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = _Output(model, layer, q, k, v)
        for index, center in enumerate(centers):
            own = None if center is None else center.pick(layer)
            if own is not None and not own.used:
                continue
            maxima = key_max[index, layer].to(k.device)
            for place, bits in enumerate(WIDTHS):
                for at, alpha in enumerate(ALPHAS):
                    coding = Coding(Scaled(key_scales(maxima, alpha)), center=own)
                    error = output.error(fake_quantize(k[0].float(), bits, group_size, coding))
                    state["error"][index, layer, :, place, at] += error
        return k, v

    with observing(observer):
        model.hidden(sample)


def error_state(model: CalibrationModel, candidates: int) -> State:
    """Accumulators of ``observe_codings``, float64; what is never measured stays infinite.

    ``keys`` [L, H, candidates, widths, clips] and ``values`` [L, H, transforms, widths]: summed squared error of the
    attention output; ``energy`` [L, H]: of the output itself.
    """
    shape = (model.layers, model.kv_heads)
    return {
        "keys": torch.full((*shape, candidates, len(WIDTHS), len(CLIPS)), math.inf, dtype=torch.float64),
        "values": torch.zeros(*shape, len(VALUE_TRANSFORMS), len(WIDTHS), dtype=torch.float64),
        "energy": torch.zeros(*shape, dtype=torch.float64),
    }


def observe_codings(
    model: CalibrationModel,
    sample: Sample,
    keys: Sequence[Sequence[Sequence[Coding]]],
    clip: bool,
    group_size: int,
    state: State,
) -> None:
    """Add one sample's error of the attention output: keys of every candidate with exact values, and the reverse.

    Args:
        keys: per layer and candidate, how keys become codes at each of ``WIDTHS``: codings of one layer, on the
            model's device; () where the candidate is none for this layer.
        clip: at 2 bits try every clip factor; else whole ranges.
        state: see ``error_state``.
    """

    def observer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = _Output(model, layer, q, k, v)
        state["energy"][layer] += output.energy
        for index, codings in enumerate(keys[layer]):
            for place, coding in enumerate(codings):
                for at, share in enumerate(CLIPS if clip and WIDTHS[place] == 2 else CLIPS[:1]):
                    clipped = replace(coding, key_clip=torch.full((k.shape[1],), share, device=k.device))
                    error = output.error(fake_quantize(k[0].float(), WIDTHS[place], group_size, clipped))
                    total = state["keys"][layer, :, index, place, at]
                    total.copy_(torch.where(total.isinf(), error, total + error))
        for index, name in enumerate(VALUE_TRANSFORMS):
            coding = Coding(value_transform=key_transform(name, model.head_dim).on(v.device))
            for place, bits in enumerate(WIDTHS):
                read = fake_quantize(v[0].float(), bits, group_size, coding, V)
                state["values"][layer, :, index, place] += output.value_error(read)
        return k, v

    with observing(observer):
        model.hidden(sample)


class _Output:
    """Attention of some query rows of one layer and sample, and how far it is off with other keys or values.

    Those of the first page stay.
    """

    def __init__(self, model: CalibrationModel, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.query, self.rows = query_rows(q[0])
        self.scaling = model.scaling(layer)
        self.key, self.value = k[0], v[0]
        self.exact = attention_rows(self.query, self.key, self.value, self.rows, self.scaling)

    @property
    def energy(self) -> torch.Tensor:
        """Summed squares of the output, float64 [H]."""
        return _total(self.exact)

    def error(self, key: torch.Tensor) -> torch.Tensor:
        """Summed squared error with ``key [H, T, D]``, float64 [H]."""
        key = as_served(key, self.key)
        return _total(attention_rows(self.query, key, self.value, self.rows, self.scaling) - self.exact)

    def value_error(self, value: torch.Tensor) -> torch.Tensor:
        """The same with ``value [H, T, D]``: attention is linear in values."""
        off = as_served(value.float(), self.value) - self.value.float()
        return _total(attention_rows(self.query, self.key, off, self.rows, self.scaling))


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum((1, 2, 3)).double().cpu()


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
