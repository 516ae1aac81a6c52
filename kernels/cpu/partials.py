"""Attention of a run of items on codes, in fp32: one split-KV partial per item, and their merge.

With q̃ = the query as it reads codes (``coding.queries``) · softmax scale, per group γ of G channels:

    S[t]  = Σ_γ ( scale_k[t,γ] · (q̃_γ · codes_γ[t]) + zero_k[t,γ] · Σ_{d∈γ} q̃_d ) + q̂ · table[position of t]
    O_γ   = Σ_t (p[t] · scale_v[t,γ]) · codes_γ[t] + Σ_t p[t] · zero_v[t,γ]

q̂ is what the query makes of the centre of the keys (``coding.center_queries``), and O of transformed values is turned
back once per item. So no dequantized K or V is ever formed. Codes are widened to fp32 a strip at a time (``unpack``):
what this costs is memory traffic, not arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_pmkvq.formats import ROTARY_COLUMNS, K, V
from sglang_pmkvq.kernels.cpu.unpack import plane_factor, planes_apart, unpacked
from sglang_pmkvq.kernels.plan import Run, Tile
from sglang_pmkvq.kernels.storage import GroupStorage


class Partial(NamedTuple):
    """Unnormalized attention over some tokens: maximum and sum ``[B, M]``, output ``[B, M, D]``."""

    peak: torch.Tensor
    total: torch.Tensor
    out: torch.Tensor


class Queries(NamedTuple):
    """Queries of the items of a tile times the softmax scale, fp32, one row per (item, head).

    Attributes:
        plain: ``[B, M, D]``, as they read 16-bit K.
        low: the same as they read codes of K (``coding.queries``).
        center: ``[B, M, 16·n]``, as they meet n blocks of the rotary table (``coding.center_queries``); None where
            keys of this layer have no centre.
    """

    plain: torch.Tensor
    low: torch.Tensor
    center: torch.Tensor | None


def attend_tile(
    storage: GroupStorage,
    layer: int,
    tile: Tile,
    q: Queries,
    logit_cap: float,
    q_position: torch.Tensor | None = None,
) -> Partial:
    """Partials of the items of a tile, one per row of B = items · H, ordered item, head.

    Args:
        layer: layer within the group.
        logit_cap: scores become cap·tanh(score/cap) if positive.
        q_position: int32 ``[M, 1]`` positions of the queries for the causal mask (tiles with
            positions only), or None if every query sees every token of the tile.
    """
    scores = _scores(storage, layer, tile, q)
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
    return Partial(peak, p.sum(dim=-1), _output(storage, layer, tile, p))


def _scores(storage: GroupStorage, layer: int, tile: Tile, queries: Queries) -> torch.Tensor:
    """S ``[B, M, T]`` of a tile, T = C*P tokens."""
    q, q_low, _ = queries
    groups, whole, (b, m, _) = storage.shape.groups_per_head, tile.whole[K], q.shape
    scores = q.new_empty(b, m, tile.pages_per_item * storage.shape.page_size)
    coded = scores[whole:]
    # Per group of channels; with one group the dots are the scores to be.
    dots = coded.unsqueeze(1) if groups == 1 else q.new_empty(coded.shape[0], groups, *coded.shape[1:])
    for run in tile.runs:
        rows = slice(run.start, run.stop)
        if run.tiers[K] == 16:
            views = unpacked(storage, K, layer, tile, run, m)
            parts = zip(views, q[rows].split(run.strip_rows), scores[rows].split(run.strip_rows), strict=True)
            for view, q_part, part in parts:
                torch.bmm(q_part, view.transposed, out=part)
        else:
            _dots_on_codes(storage, layer, tile, run, q_low[rows], dots[run.start - whole : run.stop - whole])
    if coded.shape[0]:
        zero, scale = _zero_scale(storage, K, layer, tile)
        q_sum = q_low[whole:].unflatten(-1, (groups, -1)).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
        dots.mul_(scale).addcmul_(q_sum, zero)
        if groups > 1:
            torch.sum(dots, dim=1, out=coded)
        if queries.center is not None:
            _add_center(storage, layer, tile, queries.center[whole:], coded)
    return scores


def _add_center(storage: GroupStorage, layer: int, tile: Tile, q: torch.Tensor, scores: torch.Tensor) -> None:
    """Adds q·R_m c to scores ``[B, M, T]`` of items whose K has codes; q ``[B, M, 16·n]``.

    The table's rows are those of positions, so the heads of an item share them.
    """
    center, items = storage.coding.center, tile.columns.shape[0]
    assert center is not None
    by_item = scores.view(items, -1, scores.shape[2])
    for i, place in center.live[layer]:
        rows = None if tile.table_rows is None else tile.table_rows.get(place)
        if rows is None:
            rows = center.rotary.pages(center.places[layer][i : i + 1], tile.columns, storage.shape.page_size)
            rows = rows.flatten(1, 2).transpose(1, 2).contiguous()
            if tile.table_rows is not None:
                tile.table_rows[place] = rows
        own = q[..., i * ROTARY_COLUMNS : (i + 1) * ROTARY_COLUMNS]
        by_item.baddbmm_(own.reshape(items, -1, ROTARY_COLUMNS), rows)


def _output(storage: GroupStorage, layer: int, tile: Tile, p: torch.Tensor) -> torch.Tensor:
    """O ``[B, M, D]`` of a tile from its weights p ``[B, M, T]``."""
    groups, whole, (b, m, _) = storage.shape.groups_per_head, tile.whole[V], p.shape
    out = p.new_empty(b, m, storage.shape.head_dim)
    coded = p[whole:]
    if coded.shape[0]:
        zero, scale = _zero_scale(storage, V, layer, tile)
        if tile.absent is not None:
            # Bytes past the end of a sequence are whatever the block held before: read as (zero, range) they may be
            # NaN, and 0 · NaN is not 0.
            stale = tile.absent[whole:].unsqueeze(1)
            zero.masked_fill_(stale, 0.0)
            scale.masked_fill_(stale, 0.0)
    for run in tile.runs:
        rows = slice(run.start, run.stop)
        if run.tiers[V] == 16:
            views = unpacked(storage, V, layer, tile, run, m)
            parts = zip(run.strips, views, p[rows].split(run.strip_rows), out[rows].split(run.strip_rows), strict=True)
            for strip, view, weights, part in parts:
                if strip.absent_rows is not None:
                    view.values.view(-1, view.values.shape[-1]).index_fill_(0, strip.absent_rows, 0.0)  # likewise
                torch.bmm(weights, view.values, out=part)
        else:
            own = scale[run.start - whole : run.stop - whole]
            _output_on_codes(storage, layer, tile, run, p[rows], own, out[rows])
    if coded.shape[0]:
        constant = torch.bmm(coded, zero.squeeze(2).transpose(1, 2))
        low = out[whole:]
        low.unflatten(-1, (groups, -1)).add_(constant.unsqueeze(-1))
        if not storage.coding.value_transform.is_plain(layer):
            by_head = low.view(-1, storage.shape.num_kv_heads, m, low.shape[-1])
            low.copy_(storage.coding.values_back(by_head, layer).flatten(0, 1))
    return out


def _dots_on_codes(storage: GroupStorage, layer: int, tile: Tile, run: Run, q: torch.Tensor, out: torch.Tensor) -> None:
    """q̃ · codes per group of channels: q ``[B, M, D]``, out ``[B, D/G, M, T]``, contiguous."""
    bits, (b, m, d) = run.tiers[K], q.shape
    groups, t = out.shape[1], out.shape[3]
    g = d // groups
    n = planes_apart(bits, m)
    w = d // n
    if bits < 8:
        planes = q.new_empty(b, n, m, w)
        q = torch.mul(q.view(b, m, n, w).transpose(1, 2), plane_factor(bits, n, w, q.device), out=planes)
    q = q.view(b * n, m, w)
    # Per run of channels of one plane and one group; those of a group are summed.
    if w > g:
        dots = out.view(b * n, w // g, m, t)
    else:
        dots = out.view(b * n, m, t) if w == g else q.new_empty(b * n, m, t)
    views, size = unpacked(storage, K, layer, tile, run, m), run.strip_rows * n
    for view, q_part, part in zip(views, q.split(size), dots.split(size), strict=True):
        if w > g:
            for i in range(w // g):
                channels = slice(i * g, (i + 1) * g)
                part[:, i] = torch.bmm(q_part[..., channels], view.transposed[:, channels])
        else:
            torch.bmm(q_part, view.transposed, out=part)
    if w < g:
        torch.sum(dots.view(b, groups, n // groups, m, t), dim=2, out=out)


def _output_on_codes(
    storage: GroupStorage, layer: int, tile: Tile, run: Run, p: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """(p · scale) · codes: p ``[B, M, T]``, scale ``[B, D/G, 1, T]``, out ``[B, M, D]``, contiguous."""
    bits, (b, m, t) = run.tiers[V], p.shape
    groups, d = scale.shape[1], out.shape[2]
    g = d // groups
    n = planes_apart(bits, m)
    w = d // n
    # Where a group spans several planes its weights are written once for each.
    weights = p.new_empty(b, groups, max(1, n // groups), m, t)
    torch.mul(p[:, None, None], scale.unsqueeze(2).expand(-1, -1, weights.shape[2], -1, -1), out=weights)
    weights = weights.view(b * n, *((w // g, m, t) if w > g else (m, t)))
    planes = out if n == 1 else out.new_empty(b * n, m, w)
    views, size = unpacked(storage, V, layer, tile, run, m), run.strip_rows * n
    for view, own, part in zip(views, weights.split(size), planes.split(size), strict=True):
        if w > g:
            for i in range(w // g):
                channels = slice(i * g, (i + 1) * g)
                part[..., channels] = torch.bmm(own[:, i], view.values[..., channels])
        else:
            torch.bmm(own, view.values, out=part)
    if bits < 8:
        factor = plane_factor(bits, n, w, out.device)
        ordered = out.view(b, m, n, w).transpose(1, 2)
        if n == 1:
            ordered.mul_(factor)
        else:
            torch.mul(planes.view(b, n, m, w), factor, out=ordered)


def _zero_scale(storage: GroupStorage, side: int, layer: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """zero and scale = range/(2^b − 1) of the rows with codes, fp32 ``[B, D/G, 1, T]`` each, free to be changed.

    2-bit codes of keys span the middle share of the stored range that the coding's ``key_clip`` says.
    """
    s = storage.shape
    got = storage.meta_rows[side][layer].index_select(0, tile.meta_rows[side])
    got = got.view(-1, tile.pages_per_item, s.groups_per_head, s.page_size, 2).permute(4, 0, 2, 1, 3)
    pair = torch.empty(got.shape, dtype=torch.float32, device=got.device).copy_(got)
    zero, span = pair.flatten(3).unsqueeze(3).unbind(0)
    clip = storage.coding.key_clip
    if side == K and clip is not None:
        for run in tile.runs:
            if run.tiers[K] == 2:
                rows = slice(run.start - tile.whole[K], run.stop - tile.whole[K])
                factor = clip[layer].repeat((run.stop - run.start) // s.num_kv_heads)[:, None, None, None]
                zero[rows].addcmul_(span[rows], 0.5 - 0.5 * factor)
                span[rows].mul_(factor)
    return zero, span.div_(tile.levels[side])


def merge_items(parts: list[Partial], item_request: torch.Tensor, requests: int, heads: int) -> Partial:
    """Partials of tiles ``[items * H, M, ...]`` merged by request: ``[requests, heads, ...]``, still unnormalized.

    A request without items has peak −inf and sum 0.

    Args:
        item_request: int64 ``[I]``, the request of each item of the tiles.
    """
    part = parts[0] if len(parts) == 1 else Partial(*(torch.cat(x) for x in zip(*parts, strict=True)))
    item_peak, item_total = part.peak.view(-1, heads), part.total.view(-1, heads)
    item_out = part.out.view(item_peak.shape[0], -1)
    index = item_request.unsqueeze(1).expand_as(item_peak)
    peak = item_peak.new_full((requests, heads), -torch.inf)
    peak.scatter_reduce_(0, index, item_peak, "amax")
    weight = item_peak.sub_(peak.index_select(0, item_request)).exp_()
    total = torch.zeros_like(peak).index_add_(0, item_request, item_total.mul_(weight))
    part.out.view(*weight.shape, -1).mul_(weight.unsqueeze(-1))
    out = item_out.new_zeros(requests, item_out.shape[1]).index_add_(0, item_request, item_out)
    return Partial(peak, total, out.view(requests, heads, -1))


def merge_two(a: Partial, b: Partial) -> Partial:
    """Two partials of the same queries over disjoint tokens; either may have seen nothing."""
    peak = torch.maximum(a.peak, b.peak)
    base = peak.masked_fill(peak == -torch.inf, 0.0)
    wa, wb = (a.peak - base).exp_(), (b.peak - base).exp_()
    out = a.out * wa.unsqueeze(-1) + b.out * wb.unsqueeze(-1)
    return Partial(peak, a.total * wa + b.total * wb, out)


def finish(partial: Partial) -> torch.Tensor:
    """Output fp32, 0 where nothing was seen."""
    # A sum is 0 there and else at least 1, the weight of the maximum.
    return partial.out / partial.total.clamp_min(1.0).unsqueeze(-1)


def log_sum_exp(partial: Partial) -> torch.Tensor:
    """LSE of the scores, natural log, −inf where nothing was seen."""
    return partial.peak + partial.total.log()
