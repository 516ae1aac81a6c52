"""What a kernel backend is: one object per pool, chosen once by ``choose.kernels_for``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.formats import TIERS, UNITS_PER_SUPERBLOCK, tier_units
from sglang_pmkvq.kernels.attention import DecodeAttention, ExtendAttention
from sglang_pmkvq.kernels.storage import GroupStorage


class Kernels(ABC):
    """Everything that reads or writes the bytes of a pool.

    Every method works on the current stream of the storage's device.

    Attributes:
        name: for logs and tests.
        compiles: ``warm_up`` has something to do.
    """

    name: ClassVar[str]
    compiles: ClassVar[bool]

    def begin_forward(self) -> None:  # noqa: B027 - most backends keep nothing between stores
        """Slots that were stored to before may mean other pages from now on."""

    def store(self, storage: GroupStorage, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes K and V ``[T, H, D]`` of layer ``layer`` at token ``slots [T]``, slot = page · P + offset.

        On CUDA one launch reads slots and page table, so it may be part of a CUDA graph: padded rows go to
        page 0. Nothing is read back, so there a slot of a page that is unmapped or below 16 bits is not
        written at all and counted in ``dropped_rows``; on the CPU it raises.

        Raises:
            ValueError: a shape that does not fit; on the CPU, a page that is not at 16 bits.
        """
        expected = (slots.numel(), storage.shape.num_kv_heads, storage.shape.head_dim)
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
        self._store(storage, layer, slots, k, v)

    def copy(self, storage: GroupStorage, copies: ArenaCopies) -> None:
        """Executes the block copies of one arena in one wave, all layers.

        Raises:
            ValueError: a pair of tiers that widens, a tier below the arena's final one, a page that is not there, or
                units that are unaligned or outside the arena.
        """
        for src_tier, dst_tier, pick in tier_pairs(copies):
            _check_units(storage, copies.arena, src_tier, copies.src_unit[pick], "source")
            _check_units(storage, copies.arena, dst_tier, copies.dst_unit[pick], "destination")
            if src_tier < dst_tier:
                raise ValueError(f"a page never gains precision: expected to_tier <= {src_tier}, got {dst_tier}")
            final = storage.group.final_of(storage.group.arena_sides[copies.arena][0])
            if dst_tier < final:
                raise ValueError(f"blocks of this arena end at {final} bits, got a destination of {dst_tier}")
        _check_pages(storage, copies.page)
        self._copy(storage, copies)

    def update_table(self, storage: GroupStorage, update: TableUpdate) -> None:
        """Writes new page-table entries of one arena, each page at most once per update.

        Raises:
            ValueError: a page that is not there.
        """
        _check_pages(storage, update.page)
        self._update_table(storage, update)

    def execute(self, storages: Sequence[GroupStorage], batch: CommandBatch) -> None:
        """Executes a command batch over all layer groups: the waves in order, then the tables."""
        for wave in batch.waves:
            for copies in wave:
                self.copy(storages[copies.group], copies)
        for update in batch.table:
            self.update_table(storages[update.group], update)

    @abstractmethod
    def decode(self, use_stock: bool = True) -> DecodeAttention:
        """A plan and its buffers for one layer group.

        Args:
            use_stock: on the CPU, requests with no shrunk page run stock's own call; False sends them
                through the batched path too. Triton has one path.
        """

    @abstractmethod
    def extend(self, use_stock: bool = True) -> ExtendAttention:
        """As ``decode``."""

    def warm_up(  # noqa: B027 - only a backend that compiles has something to do
        self,
        storage: GroupStorage,
        query_heads: int,
        logit_caps: Iterable[float] = (0.0,),
        slot_dtype: torch.dtype = torch.int32,
    ) -> None:
        """Compiles what serving a storage will launch, so that no forward waits for a compiler.

        Args:
            query_heads: Hq of this rank.
            logit_caps: caps of the model's layers; 0 is none.
            slot_dtype: dtype of SGLang's request table; row numbers, slots and lengths are int64.
        """

    @abstractmethod
    def _store(self, storage: GroupStorage, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """``store`` with shapes that fit."""

    @abstractmethod
    def _copy(self, storage: GroupStorage, copies: ArenaCopies) -> None:
        """``copy`` of what was checked."""

    @abstractmethod
    def _update_table(self, storage: GroupStorage, update: TableUpdate) -> None:
        """``update_table`` of what was checked."""


def tier_pairs(copies: ArenaCopies) -> Iterator[tuple[int, int, np.ndarray]]:
    """(source tier, destination tier, bool ``[n]`` which copies) of each pair that occurs."""
    pair = copies.src_tier.astype(np.int64) * 32 + copies.dst_tier
    for key in np.unique(pair).tolist():
        yield key // 32, key % 32, pair == key


def _check_units(storage: GroupStorage, arena: int, tier: int, unit: np.ndarray, what: str) -> None:
    if tier not in TIERS:
        raise ValueError(f"{what} tier must be one of {TIERS}, got {tier}")
    limit = storage.superblocks[arena] * UNITS_PER_SUPERBLOCK
    if unit.size and (unit.min() < 0 or unit.max() >= limit or (unit % tier_units(tier)).any()):
        raise ValueError(
            f"{what} units of {tier}-bit blocks must be multiples of {tier_units(tier)} in [0, {limit}), "
            f"got {unit.min()}..{unit.max()}"
        )


def _check_pages(storage: GroupStorage, page: np.ndarray) -> None:
    if page.size and (page.min() < 0 or page.max() > storage.num_pages):
        raise ValueError(f"pages must be in [0, {storage.num_pages}], got {page.min()}..{page.max()}")
