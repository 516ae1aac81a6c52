"""Block copies of one arena side: quantize, equivalent right shift, move. Batched over layers."""

from __future__ import annotations

import torch

from sglang_pmkvq.formats import tier_units
from sglang_pmkvq.kernels.cpu import codes as codec
from sglang_pmkvq.kernels.storage import GroupStorage

# Elements (over all layers) that one round of copies converts at once: bounds the fp32 workspace
# at a few tens of MiB however many pages shrink in a wave.
ROUND_ELEMENTS = 1 << 21


def copy_blocks(
    storage: GroupStorage,
    side: int,
    src_tier: int,
    dst_tier: int,
    page: torch.Tensor,
    src_unit: torch.Tensor,
    dst_unit: torch.Tensor,
) -> None:
    """Copies n blocks of one side, all layers; ``page``, ``src_unit``, ``dst_unit`` int64 ``[n]``.

    Blocks must be aligned to their tier, sources and destinations disjoint.
    """
    s = storage.shape
    per_block = s.page_size * s.num_kv_heads * s.head_dim * storage.num_layers
    n = max(1, ROUND_ELEMENTS // per_block)
    for start in range(0, page.numel(), n):
        part = slice(start, start + n)
        src = src_unit[part] // tier_units(src_tier)
        dst = dst_unit[part] // tier_units(dst_tier)
        if src_tier == dst_tier:
            data = storage.blocks(side, src_tier).index_select(1, src)
        elif src_tier == 16:
            data = _quantize(storage, side, dst_tier, page[part], src)
        else:
            data = _shift(storage, side, src_tier, dst_tier, src)
        storage.blocks(side, dst_tier).index_copy_(1, dst, data)


def _quantize(storage: GroupStorage, side: int, dst_tier: int, page: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
    """Bytes ``[L, n, code_bytes]`` of 16-bit blocks at ``dst_tier``; writes their (zero, range)."""
    s = storage.shape
    meta = storage.meta[side]
    assert meta is not None, "a side that stays at 16 bits cannot be quantized"
    data = storage.blocks(side, 16).index_select(1, src).view(storage.dtype)
    x = data.view(storage.num_layers, -1, s.page_size, s.num_kv_heads, s.head_dim).transpose(2, 3)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)  # [L, n, H, P, D]
    columns = None if storage.page_columns is None else storage.page_columns.index_select(0, page).long()
    q = codec.quantize(storage.coding.transformed(side, x, columns), s.group_size)
    meta.index_copy_(1, page, q.meta.transpose(3, 4).contiguous())
    storage.overflow_groups.add_(q.clipped)
    return codec.pack(codec.shift_down(q.codes, 8, dst_tier, _edge(storage, side)), dst_tier).flatten(2)


def _shift(storage: GroupStorage, side: int, src_tier: int, dst_tier: int, src: torch.Tensor) -> torch.Tensor:
    """Bytes ``[L, n, code_bytes]`` of quantized blocks at a lower tier; (zero, range) stay as they are."""
    s = storage.shape
    data = storage.blocks(side, src_tier).index_select(1, src)
    rows = data.view(*data.shape[:2], s.num_kv_heads, s.page_size, s.head_dim * src_tier // 8)
    wide = codec.shift_down(codec.unpack(rows, src_tier), src_tier, dst_tier, _edge(storage, side))
    return codec.pack(wide, dst_tier).flatten(2)


def _edge(storage: GroupStorage, side: int) -> torch.Tensor | None:
    """Clip edges of a side, to be broadcast against codes ``[L, n, H, P, D]``."""
    edges = storage.coding.edges(side)
    return None if edges is None else edges[:, None, :, None, None]
