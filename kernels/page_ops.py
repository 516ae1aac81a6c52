"""Launchers that write KV: new rows, block copies, page-table updates. Nothing here plans.

Every function works on the current stream of the storage's device and never waits for it. Who runs is
decided by that device: torch on the CPU, Triton on CUDA; ``backend`` overrides it for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, TIERS, UNITS_PER_SUPERBLOCK, K, V, tier_units
from sglang_pmkvq.kernels.cpu.copies import copy_blocks
from sglang_pmkvq.kernels.launch import Backend, uses_triton
from sglang_pmkvq.kernels.storage import GroupStorage

# From a page-table entry to the superblock of a 16-bit page.
_SUPERBLOCK_SHIFT = STEP_BITS + UNITS_PER_SUPERBLOCK.bit_length() - 1


def resolve_slots(storage: GroupStorage, slots: torch.Tensor) -> torch.Tensor:
    """Rows of 16-bit pages behind token slots: int64 ``[num_arenas, T]`` into ``[superblocks * P]``.

    Once per forward and group; all layers reuse the result. ``slots`` is an integer tensor ``[T]``,
    slot = page · P + offset.

    Raises:
        ValueError: on the CPU, a slot of a page that is unmapped or already below 16 bits. On other
            devices nothing is read back, so there the caller must know.
    """
    p = storage.shape.page_size
    if storage.device.type == "cpu":
        # numpy: at small batches the cost of calling torch is what a decode step would notice.
        page, offset = np.divmod(slots.numpy(), p)
        entry = storage.table.numpy()[:, page].astype(np.int64)
        # The step sits in the low bits of an entry and UNMAPPED has all bits set.
        if (entry & STEP_MASK).any():
            bad = np.unique(page[(entry & STEP_MASK).any(axis=0)]).tolist()
            raise ValueError(f"rows can only be written to mapped 16-bit pages, got pages {bad[:8]}")
        return torch.from_numpy((entry >> _SUPERBLOCK_SHIFT) * p + offset)
    slots = slots.to(torch.int64)
    page_t = torch.div(slots, p, rounding_mode="floor")
    superblock = storage.table[:, page_t].to(torch.int64) >> _SUPERBLOCK_SHIFT
    return superblock * p + (slots - page_t * p)


def store_rows(storage: GroupStorage, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Writes K and V ``[T, H, D]`` of layer ``layer`` into the rows that ``resolve_slots`` gave."""
    width = storage.shape.num_kv_heads * storage.shape.head_dim
    for side, x in ((K, k), (V, v)):
        flat = storage.token_rows16[side][layer]
        flat.index_copy_(0, rows[storage.arena_of(side)], x.reshape(-1, width).to(storage.dtype))


def store(
    storage: GroupStorage,
    layer: int,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    backend: Backend = "auto",
) -> None:
    """Writes K and V ``[T, H, D]`` of layer ``layer`` at token ``slots [T]``.

    On CUDA one launch reads slots and page table, so it may be part of a CUDA graph: padded rows go to
    page 0. Nothing is read back, so there a slot of a page that is unmapped or below 16 bits is not
    written at all; on the CPU it raises, see ``resolve_slots``.

    Raises:
        ValueError: a shape that does not fit.
    """
    expected = (slots.numel(), storage.shape.num_kv_heads, storage.shape.head_dim)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if uses_triton(storage, backend):
        from sglang_pmkvq.kernels.device_pages import store_launch

        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        store_launch(storage, layer, slots.contiguous(), k, v).run()
    else:
        store_rows(storage, layer, resolve_slots(storage, slots), k, v)


def execute(storage: GroupStorage, copies: Iterable[ArenaCopies], backend: Backend = "auto") -> None:
    """Executes the block copies of one wave that belong to this storage's group, all layers.

    On CUDA one launch per arena, whatever the tiers.

    Raises:
        ValueError: a pair of tiers that widens, or units that are unaligned or outside the arena.
    """
    triton = uses_triton(storage, backend)
    for c in copies:
        pair = c.src_tier.astype(np.int64) * 32 + c.dst_tier
        keys = np.unique(pair).tolist()
        for key in keys:
            src_tier, dst_tier = divmod(key, 32)
            pick = pair == key
            _check_units(storage, c.arena, src_tier, c.src_unit[pick], "source")
            _check_units(storage, c.arena, dst_tier, c.dst_unit[pick], "destination")
            if src_tier < dst_tier:
                raise ValueError(f"a page never gains precision: expected to_tier <= {src_tier}, got {dst_tier}")
            if triton:
                _check_pages(storage, c, pick, dst_tier)
        if triton:
            from sglang_pmkvq.kernels.device_pages import copy_launch

            copy_launch(storage, c).run()
            continue
        for key in keys:
            src_tier, dst_tier = divmod(key, 32)
            pick = pair == key
            page_t, src_t, dst_t = (_upload(storage, a) for a in (c.page[pick], c.src_unit[pick], c.dst_unit[pick]))
            for side in storage.group.arena_sides[c.arena]:
                copy_blocks(storage, side, src_tier, dst_tier, page_t, src_t, dst_t)


def apply_table(storage: GroupStorage, updates: Iterable[TableUpdate], backend: Backend = "auto") -> None:
    """Writes new page-table entries of this storage's group, each page at most once per update."""
    triton = uses_triton(storage, backend)
    for u in updates:
        if triton:
            from sglang_pmkvq.kernels.device_pages import table_launch

            if u.page.size and (u.page.min() < 0 or u.page.max() > storage.num_pages):
                raise ValueError(f"pages must be in [0, {storage.num_pages}], got {u.page.min()}..{u.page.max()}")
            table_launch(storage, u).run()
        else:
            entry = _upload(storage, u.entry).to(torch.int32)
            storage.table[u.arena].index_copy_(0, _upload(storage, u.page), entry)


def execute_batch(storages: Sequence[GroupStorage], batch: CommandBatch, backend: Backend = "auto") -> None:
    """Executes a command batch over all layer groups: the waves in order, then the tables."""
    for wave in batch.waves:
        for c in wave:
            execute(storages[c.group], (c,), backend)
    for u in batch.table:
        apply_table(storages[u.group], (u,), backend)


def _upload(storage: GroupStorage, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(storage.device)


def _check_units(storage: GroupStorage, arena: int, tier: int, unit: np.ndarray, what: str) -> None:
    if tier not in TIERS:
        raise ValueError(f"{what} tier must be one of {TIERS}, got {tier}")
    limit = storage.superblocks[arena] * UNITS_PER_SUPERBLOCK
    if unit.size and (unit.min() < 0 or unit.max() >= limit or (unit % tier_units(tier)).any()):
        raise ValueError(
            f"{what} units of {tier}-bit blocks must be multiples of {tier_units(tier)} in [0, {limit}), "
            f"got {unit.min()}..{unit.max()}"
        )


def _check_pages(storage: GroupStorage, c: ArenaCopies, pick: np.ndarray, dst_tier: int) -> None:
    """What torch would raise by itself: a page outside the side arrays, a tier below the arena's final one."""
    page = c.page[pick]
    if page.size and (page.min() < 0 or page.max() > storage.num_pages):
        raise ValueError(f"pages must be in [0, {storage.num_pages}], got {page.min()}..{page.max()}")
    final = storage.group.final_of(storage.group.arena_sides[c.arena][0])
    if dst_tier < final:
        raise ValueError(f"blocks of this arena end at {final} bits, got a destination of {dst_tier}")
