"""fp32 attention over a dequantized sequence, one query and head at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, K, tier_units
from sglang_pmkvq.kernels.reference.codes import center_term, clipped_range, dequantize, restored_keys, unpack_page
from sglang_pmkvq.kernels.storage import GroupStorage


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    logit_cap: float = 0.0,
    prefix_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence in fp32.

    Args:
        q: ``[Lq, Hq, D]``. k, v: ``[T, H, D]``, Hq a multiple of H.
        scale: softmax scale.
        logit_cap: cap·tanh(score/cap) if positive.
        prefix_len: query i sees tokens 0 .. prefix_len + i; None: every query sees all tokens.

    Returns:
        out ``[Lq, Hq, D]`` and log-sum-exp ``[Lq, Hq]`` (natural log), fp32.
    """
    q, k, v = q.float(), k.float(), v.float()
    out = torch.zeros(q.shape)
    lse = torch.zeros(q.shape[:2])
    per_head = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        seen = k.shape[0] if prefix_len is None else prefix_len + i + 1
        for head in range(q.shape[1]):
            kv_head = head // per_head
            scores = (k[:seen, kv_head] @ q[i, head]) * scale
            if logit_cap > 0:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            lse[i, head] = torch.logsumexp(scores, dim=0)
            out[i, head] = torch.softmax(scores, dim=0) @ v[:seen, kv_head]
    return out, lse


def read_page(storage: GroupStorage, side: int, layer: int, page: int) -> torch.Tensor:
    """One page of a storage as fp32 ``[P, H, D]`` on the host, through its table, at whatever tier it has.

    Keys and values come back in the model's own units, transform and centre undone. Addresses are computed
    from bytes here, not by the storage's views.
    """
    shape, group = storage.shape, storage.group
    entry = int(storage.table[0 if group.shared else side, page])
    assert entry >= 0, f"page {page} is unmapped"
    tier = group.steps[entry & STEP_MASK][side]
    start = (entry >> STEP_BITS) * shape.unit_bytes
    raw = storage.arenas[side][layer][start : start + tier_units(tier) * shape.unit_bytes].cpu().clone()
    heads, tokens, dim = shape.num_kv_heads, shape.page_size, shape.head_dim
    if tier == 16:
        assert (entry >> STEP_BITS) % UNITS_PER_SUPERBLOCK == 0
        return raw.view(storage.dtype).view(tokens, heads, dim).float()
    codes = unpack_page(raw.view(heads, tokens, dim * tier // 8), tier)
    meta = storage.meta[side]
    assert meta is not None
    pair = meta[layer, page].cpu()  # [H, D/G, P, 2]
    pair = pair.permute(0, 2, 1, 3).repeat_interleave(shape.group_size, dim=2)  # [H, P, D, 2]
    zero, span = pair[..., 0], pair[..., 1]
    coding = storage.coding.on("cpu").pick(layer)
    if side == K and tier == 2 and coding.key_clip is not None:
        zero, span = clipped_range(zero, span, coding.key_clip[:, None, None])
    values = dequantize(codes, zero, span, tier)
    values = restored_keys(values, coding.transform_of(side))
    if side == K and storage.page_columns is not None:
        start = int(storage.page_columns[page]) * tokens
        center = center_term(coding, torch.arange(start, start + tokens))
        if center is not None:
            values = values + center
    return values.transpose(0, 1)


def read_sequence(storage: GroupStorage, side: int, layer: int, pages: Sequence[int], length: int) -> torch.Tensor:
    """The first ``length`` tokens of a sequence of logical pages, fp32 ``[length, H, D]``."""
    assert math.ceil(length / storage.shape.page_size) <= len(pages)
    return torch.cat([read_page(storage, side, layer, int(p)) for p in pages])[:length]
