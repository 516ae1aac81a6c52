"""Attention of a run of items on codes, in fp32: one split-KV partial per item, and their merge.

With q̃ = query · s (key scale) · softmax scale, per group γ of G channels:

    S[t]  = Σ_γ ( scale_k[t,γ] · (q̃_γ · codes_γ[t]) + zero_k[t,γ] · Σ_{d∈γ} q̃_d )
    O_γ   = Σ_t (p[t] · scale_v[t,γ]) · codes_γ[t] + Σ_t p[t] · zero_v[t,γ]

so no dequantized K or V is ever formed. Codes are widened to fp32 a tile at a time (a few MiB),
and nothing of a tile outlives the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_pmkvq.formats import K, V
from sglang_pmkvq.kernels.plan import Tile
from sglang_pmkvq.kernels.storage import GroupStorage


class Partial(NamedTuple):
    """Unnormalized attention over some tokens: maximum and sum ``[B, M]``, output ``[B, M, D]``."""

    peak: torch.Tensor
    total: torch.Tensor
    out: torch.Tensor


def attend_tile(
    storage: GroupStorage,
    layer: int,
    tile: Tile,
    q: torch.Tensor,
    q_scaled: torch.Tensor,
    logit_cap: float,
    q_position: torch.Tensor | None = None,
) -> Partial:
    """Partials of the items of a tile, one per row of B = items · H, ordered item, head.

    Args:
        layer: layer within the group.
        q: fp32 ``[B, M, D]``, queries times the softmax scale.
        q_scaled: the same times the key scale; read by quantized K.
        logit_cap: scores become cap·tanh(score/cap) if positive.
        q_position: int32 ``[M, 1]`` positions of the queries for the causal mask (tiles with
            positions only), or None if every query sees every token of the tile.
    """
    k_tier, v_tier = tile.tiers
    g = storage.shape.group_size
    if k_tier == 16:
        scores = torch.bmm(q, _values16(storage, K, layer, tile).transpose(1, 2))
    else:
        zero, scale = _zero_scale(storage, K, layer, tile)
        scores = _scores_on_codes(q_scaled, _codes(storage, K, layer, tile), zero, scale, g)
    if logit_cap > 0.0:
        scores = scores.div_(logit_cap).tanh_().mul_(logit_cap)
    if q_position is not None:
        assert tile.position is not None
        scores.masked_fill_(tile.position > q_position, -torch.inf)  # absent tokens are past all
    elif tile.absent is not None:
        scores.masked_fill_(tile.absent, -torch.inf)
    peak = scores.amax(dim=-1)
    # A query that sees nothing here has peak −inf; subtracting 0 instead keeps its weights at 0.
    base = peak if q_position is None else peak.masked_fill(peak == -torch.inf, 0.0)
    p = scores.sub_(base.unsqueeze(-1)).exp_()
    total = p.sum(dim=-1)

    if v_tier == 16:
        values = _values16(storage, V, layer, tile)
        if tile.absent_rows is not None:
            # Bytes past the end of a sequence are whatever the block held before; read as 16-bit
            # floats they may be NaN, and 0 · NaN is not 0.
            values.view(-1, values.shape[-1]).index_fill_(0, tile.absent_rows, 0.0)
        out = torch.bmm(p, values)
    else:
        zero, scale = _zero_scale(storage, V, layer, tile)
        if tile.absent is not None:
            # Likewise for the (zero, range) of stale tokens.
            zero.masked_fill_(tile.absent, 0.0)
            scale.masked_fill_(tile.absent, 0.0)
        out = _output_on_codes(p, _codes(storage, V, layer, tile), zero, scale, g)
    return Partial(peak, total, out)


def _scores_on_codes(
    q: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, g: int
) -> torch.Tensor:
    """S ``[B, M, CP]`` from q ``[B, M, D]``, codes fp32 ``[B, CP, D]``, zero and scale ``[B, D/G, CP]``."""
    scores = None
    for i in range(zero.shape[1]):
        part = slice(i * g, (i + 1) * g)
        dot = torch.bmm(q[..., part], codes[..., part].transpose(1, 2)).mul_(scale[:, i : i + 1])
        scores = dot if scores is None else scores.add_(dot)
    assert scores is not None
    q_sum = q.unflatten(-1, (-1, g)).sum(dim=-1)
    return torch.baddbmm(scores, q_sum, zero)


def _output_on_codes(
    p: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, g: int
) -> torch.Tensor:
    """O ``[B, M, D]`` from p ``[B, M, CP]``, codes fp32 ``[B, CP, D]``, zero and scale ``[B, D/G, CP]``."""
    parts = [torch.bmm(p * scale[:, i : i + 1], codes[..., i * g : (i + 1) * g]) for i in range(zero.shape[1])]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    out.unflatten(-1, (-1, g)).add_(torch.bmm(p, zero.transpose(1, 2)).unsqueeze(-1))
    return out


def _codes(storage: GroupStorage, side: int, layer: int, tile: Tile) -> torch.Tensor:
    """Codes of a tile as fp32 ``[B, C*P, D]``, channels in order.

    Bytes are masked eight at a time as int64: the bits that an arithmetic shift drags over a byte's
    edge are exactly those that the mask clears.
    """
    s = storage.shape
    bits = tile.tiers[side]
    width = s.head_dim * bits // 8
    shape = (tile.items * s.num_kv_heads, tile.pages_per_item * s.page_size, width)
    packed = storage.code_words(side, layer, bits).index_select(0, tile.rows[side])
    if bits == 8:
        return packed.view(torch.uint8).view(shape).to(torch.float32)
    mask = ((1 << bits) - 1) * 0x0101010101010101
    out = torch.empty((*shape[:2], s.head_dim), dtype=torch.float32, device=packed.device)
    for i, plane in enumerate(out.split(width, dim=-1)):
        part = (packed >> (i * bits)).bitwise_and_(mask) if i else packed & mask
        plane.copy_(part.view(torch.uint8).view(shape))
    return out


def _zero_scale(storage: GroupStorage, side: int, layer: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """zero and scale = range/(2^b − 1) of a tile, fp32 ``[B, D/G, C*P]`` each, free to be changed.

    2-bit codes of keys span the middle share of the stored range that ``storage.key_clip`` says.
    """
    s = storage.shape
    got = storage.meta_rows(side, layer).index_select(0, tile.meta_rows)
    got = got.view(-1, tile.pages_per_item, s.groups_per_head, s.page_size, 2).permute(4, 0, 2, 1, 3)
    zero, span = got.to(torch.float32, memory_format=torch.contiguous_format).flatten(3).unbind(0)
    if side == K and tile.tiers[side] == 2 and storage.key_clip is not None:
        share = storage.key_clip[layer].repeat(tile.items)[:, None, None]
        zero.addcmul_(span, 0.5 - 0.5 * share)
        span.mul_(share)
    return zero, span.div_((1 << tile.tiers[side]) - 1)


def _values16(storage: GroupStorage, side: int, layer: int, tile: Tile) -> torch.Tensor:
    """16-bit values of a tile as fp32 ``[B, C*P, D]``."""
    s = storage.shape
    got = storage.pages16(side, layer).flatten(1).index_select(0, tile.rows[side])
    got = got.view(tile.items, -1, s.num_kv_heads, s.head_dim).transpose(1, 2)
    x = got.to(torch.float32, memory_format=torch.contiguous_format)
    # A new buffer even where nothing had to be converted or moved: callers write to it.
    return x.flatten(0, 1)


def merge_items(partial: Partial, item_request: torch.Tensor, requests: int) -> Partial:
    """Partials ``[I, ...]`` of items merged by request: ``[requests, ...]``, still unnormalized.

    A request without items has peak −inf and sum 0.
    """
    index = item_request.unsqueeze(1).expand_as(partial.peak)
    peak = partial.peak.new_full((requests, partial.peak.shape[1]), -torch.inf)
    peak.scatter_reduce_(0, index, partial.peak, "amax")
    weight = (partial.peak - peak[item_request]).exp_()
    total = torch.zeros_like(peak).index_add_(0, item_request, partial.total * weight)
    out = partial.out.new_zeros((requests, *partial.out.shape[1:]))
    out.index_add_(0, item_request, partial.out * weight.unsqueeze(-1))
    return Partial(peak, total, out)


def merge_two(a: Partial, b: Partial) -> Partial:
    """Two partials of the same queries over disjoint tokens; either may have seen nothing."""
    peak = torch.maximum(a.peak, b.peak)
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    wa, wb = (a.peak - base).exp_(), (b.peak - base).exp_()
    out = a.out * wa.unsqueeze(-1) + b.out * wb.unsqueeze(-1)
    return Partial(peak, a.total * wa + b.total * wb, out)


def finish(partial: Partial) -> tuple[torch.Tensor, torch.Tensor]:
    """Output fp32 (0 where nothing was seen) and LSE (natural log, −inf there)."""
    seen = partial.total > 0
    out = partial.out / partial.total.masked_fill(~seen & (partial.peak == -torch.inf), 1.0).unsqueeze(-1)
    return out, partial.peak + partial.total.log()
