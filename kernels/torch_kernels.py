"""The torch backend: what serves on the CPU, and correct on any torch device."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, TableUpdate
from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, K, V, block_order
from sglang_pmkvq.kernels.backend import Kernels, tier_pairs
from sglang_pmkvq.kernels.cpu.copies import copy_blocks
from sglang_pmkvq.kernels.host_attention import HostDecode, HostExtend
from sglang_pmkvq.kernels.storage import GroupStorage

# From a page-table entry to the superblock of a 16-bit page.
_SUPERBLOCK_SHIFT = STEP_BITS + block_order(16)


class TorchKernels(Kernels):
    """Slots of a forward are resolved to arena rows once, for all layers of a group."""

    name: ClassVar[str] = "torch"
    compiles: ClassVar[bool] = False

    def __init__(self) -> None:
        # By identity of the storage: the storage, the slots last stored to, and their rows.
        self._resolved: dict[int, tuple[GroupStorage, torch.Tensor, torch.Tensor]] = {}

    def begin_forward(self) -> None:
        self._resolved.clear()

    def decode(self, use_stock: bool = True) -> HostDecode:
        return HostDecode(use_stock)

    def extend(self, use_stock: bool = True) -> HostExtend:
        return HostExtend(use_stock)

    def _store(self, storage: GroupStorage, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        resolved = self._resolved.get(id(storage))
        if resolved is None or resolved[0] is not storage or resolved[1] is not slots:
            resolved = self._resolved[id(storage)] = (storage, slots, resolve_slots(storage, slots))
        width = storage.shape.num_kv_heads * storage.shape.head_dim
        for side, x in ((K, k), (V, v)):
            flat = storage.token_rows16[side][layer]
            flat.index_copy_(0, resolved[2][storage.arena_of(side)], x.reshape(-1, width).to(storage.dtype))

    def _copy(self, storage: GroupStorage, copies: ArenaCopies) -> None:
        for src_tier, dst_tier, pick in tier_pairs(copies):
            page, src, dst = (
                _upload(storage, a) for a in (copies.page[pick], copies.src_unit[pick], copies.dst_unit[pick])
            )
            for side in storage.group.arena_sides[copies.arena]:
                copy_blocks(storage, side, src_tier, dst_tier, page, src, dst)

    def _update_table(self, storage: GroupStorage, update: TableUpdate) -> None:
        self._resolved.pop(id(storage), None)
        entry = _upload(storage, update.entry).to(torch.int32)
        storage.table[update.arena].index_copy_(0, _upload(storage, update.page), entry)


def resolve_slots(storage: GroupStorage, slots: torch.Tensor) -> torch.Tensor:
    """Rows of 16-bit pages behind token slots: int64 ``[num_arenas, T]`` into ``[superblocks * P]``.

    Args:
        slots: integer ``[T]``, slot = page · P + offset.

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


def _upload(storage: GroupStorage, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(storage.device)
