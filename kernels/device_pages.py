"""Triton launches that write KV; ``backend`` checks the arguments."""

from __future__ import annotations

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, TableUpdate
from sglang_pmkvq.formats import SIDES, K
from sglang_pmkvq.kernels.launch import Launch, next_power_of_two, upload
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.triton import pages as kernels

TABLE_BLOCK = 256
# Tokens that one quantizing program holds in registers at a time.
QUANTIZE_TOKENS = 16


def store_launch(
    storage: GroupStorage, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Launch:
    """New rows ``k``, ``v [T, H, D]`` (last axis contiguous) at token ``slots [T]``."""
    import triton.language as tl

    s = storage.shape
    return Launch(
        kernels.store_kernel,
        (slots.numel(),),
        {
            "slots": slots,
            "k": k,
            "v": v,
            "k_stride_t": k.stride(0),
            "k_stride_h": k.stride(1),
            "v_stride_t": v.stride(0),
            "v_stride_h": v.stride(1),
            "k16": storage.arenas[0][layer].view(storage.dtype),
            "v16": storage.arenas[1][layer].view(storage.dtype),
            "table": storage.table,
            "table_stride": storage.table.stride(0),
            "num_pages": storage.num_pages,
            "dropped": storage.dropped_rows,
            "H": s.num_kv_heads,
            "D": s.head_dim,
            "P": s.page_size,
            "ROWS": next_power_of_two(s.num_kv_heads),
            "ARENAS": len(storage.group.arena_sides),
            "DTYPE": tl.bfloat16 if storage.dtype == torch.bfloat16 else tl.float16,
        },
        num_warps=4 if s.num_kv_heads * s.head_dim >= 512 else 1,
    )


def copy_launch(storage: GroupStorage, copies: ArenaCopies) -> Launch:
    """All copies of one wave in one arena, every layer and side: one launch whatever the tiers."""
    s, group = storage.shape, storage.group
    sides = group.arena_sides[copies.arena]
    fields = (copies.page, copies.src_unit, copies.dst_unit, copies.src_tier, copies.dst_tier)
    commands = torch.from_numpy(np.stack([f.astype(np.int32) for f in fields]))
    first, last = sides[0], sides[-1]
    meta = [storage.meta[side] for side in (first, last)]
    pairs = [None if m is None else m.view(torch.int32) for m in meta]
    meta_stride = 0 if pairs[0] is None else pairs[0].stride(0)
    return Launch(
        kernels.copy_kernel,
        (commands.shape[1], storage.num_layers, len(sides) * s.num_kv_heads),
        {
            "commands": upload(commands, storage.device),
            "count": commands.shape[1],
            "values0": storage.arenas[first].view(storage.dtype),
            "bytes0": storage.arenas[first],
            "meta0": pairs[0],
            "values1": storage.arenas[last].view(storage.dtype),
            "bytes1": storage.arenas[last],
            "meta1": pairs[1],
            **storage.coding.copy_arguments(sides, storage.num_layers, s, storage.device),
            "page_columns": storage.page_columns if first == K else None,
            "clipped": storage.overflow_groups,
            "bytes_stride_l": storage.arenas[first].stride(0),
            "meta_stride_l": meta_stride,
            "MIN_TIER": group.final_of(first),
            "H": s.num_kv_heads,
            "D": s.head_dim,
            "G": s.group_size,
            "P": s.page_size,
            "T": QUANTIZE_TOKENS,
        },
    )


def table_launch(storage: GroupStorage, update: TableUpdate) -> Launch:
    """New page-table entries of one arena."""
    both = torch.from_numpy(np.stack([update.page.astype(np.int32), update.entry.astype(np.int32)]))
    n = both.shape[1]
    return Launch(
        kernels.table_kernel,
        (-(-n // TABLE_BLOCK),),
        {
            "updates": upload(both, storage.device),
            "count": n,
            "table": storage.table[update.arena],
            "BLOCK": TABLE_BLOCK,
        },
        num_warps=1,
    )


assert len(SIDES) == 2 and K == 0, "the kernels take K as side 0"
