"""The tensors of one layer group: arenas, (zero, range) side arrays, page table; and how its pages are coded.

Layouts (P tokens per page, H KV heads, D channels, G channels per group, b bits):

* 16-bit page: ``[P, H, D]`` of the model dtype, so that stock paged kernels can read it.
* quantized page: ``[H, P, D*b/8]`` uint8, planar: byte ``j`` of a row holds channels ``j``,
  ``j + D*b/8``, ``j + 2*D*b/8``, ... from its lowest bits up. Plane ``i`` of a row is therefore the
  ``i``-th run of ``D*b/8`` consecutive channels, and unpacking needs no shuffle.
* side array: ``[L, N+1, H, D/G, P, 2]`` fp16, last axis (zero, range), indexed by logical page.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sglang_pmkvq.formats import (
    MAX_UNITS,
    SIDES,
    TIERS,
    UNITS_PER_SUPERBLOCK,
    UNMAPPED,
    LayerGroup,
    PageShape,
    PoolGeometry,
    tier_units,
)
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.rotary import center_bytes, on_one_table

MODEL_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A zero-filled tensor; on the CPU its memory is not touched (``torch.zeros`` writes all of it)."""
    count = math.prod(dims)
    if torch.device(device).type != "cpu" or count == 0:
        return torch.zeros(dims, dtype=dtype, device=device)
    # Private: shared anonymous memory is accounted as shmem and by default gets no huge pages.
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(dims)


@dataclass(frozen=True)
class GroupStorage:
    """Device memory of one layer group. ``layer`` in its methods is the index *within* the group.

    Attributes:
        shape: bytes of a page in one layer.
        group: the layers and their final tiers.
        num_pages: N, logical pages; ids 1..N, page 0 is the sink of padded tokens.
        dtype: model dtype of 16-bit pages.
        superblocks: superblocks per arena.
        arenas: per side, uint8 ``[L, superblocks * 8 * unit_bytes]``.
        meta: per side, fp16 ``[L, N+1, H, D/G, P, 2]``, or None where the side never leaves 16 bits.
        table: int32 ``[num_arenas, N+1]``, ``unit << STEP_BITS | step`` or ``UNMAPPED``.
        coding: how keys and values become codes, and queries meet them.
        page_columns: int32 ``[N+1]``, pages of the sequence before each page, so that its first token is at position
            column · P; written by the plan of the forward that writes the page. One tensor for all groups of a pool,
            None where no keys are centred.
        overflow_groups: int64 scalar on the device, (zero, range) pairs whose finite value did not
            fit fp16 and was clamped, since the start.
        dropped_rows: int64 scalar on the device, rows of a token in a layer that Triton's store did
            not write because their page was unmapped or below 16 bits.
        unmapped_reads: int64 scalar on the device, pages without a block that a plan in Triton met;
            they read block 0. Both stay 0 as long as ledger and SGLang agree. Reading any of the
            three on the host synchronizes.
    """

    shape: PageShape
    group: LayerGroup
    num_pages: int
    dtype: torch.dtype
    superblocks: tuple[int, ...]
    arenas: tuple[torch.Tensor, torch.Tensor]
    meta: tuple[torch.Tensor | None, torch.Tensor | None]
    table: torch.Tensor
    coding: Coding
    page_columns: torch.Tensor | None
    overflow_groups: torch.Tensor
    dropped_rows: torch.Tensor
    unmapped_reads: torch.Tensor

    @classmethod
    def allocate(
        cls,
        shape: PageShape,
        group: LayerGroup,
        superblocks: Sequence[int],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        coding: Coding | None = None,
        page_columns: torch.Tensor | None = None,
    ) -> GroupStorage:
        """Zero-filled storage, every page unmapped.

        On the CPU an arena costs resident memory only where written.

        Args:
            superblocks: superblocks per arena of the group.
            coding: None codes keys and values as they are.
            page_columns: that of the pool; None makes one if keys are centred.

        Raises:
            ValueError: a dtype, count or shape that does not fit, or a coding that does not (``Coding.for_group``).
        """
        layers, arenas_n = len(group.layers), len(group.arena_sides)
        h, p = shape.num_kv_heads, shape.page_size
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"16-bit pages need one of {MODEL_DTYPES}, got {dtype}")
        counts = tuple(int(n) for n in superblocks)
        if len(counts) != arenas_n or min(counts) < 1:
            raise ValueError(f"expected {arenas_n} positive superblock counts, got {counts}")
        if max(counts) * UNITS_PER_SUPERBLOCK > MAX_UNITS:
            raise ValueError(f"an arena holds at most {MAX_UNITS} units, got {counts} superblocks")
        if num_pages < 1:
            raise ValueError(f"num_pages must be positive, got {num_pages}")

        def arena(side: int) -> torch.Tensor:
            n = counts[0 if group.shared else side] * UNITS_PER_SUPERBLOCK * shape.unit_bytes
            return _zeros((layers, n), torch.uint8, device)

        def side_array(side: int) -> torch.Tensor | None:
            if group.final_of(side) == 16:
                return None
            dims = (layers, num_pages + 1, h, shape.groups_per_head, p, 2)
            return _zeros(dims, torch.float16, device)

        coding = (coding or Coding()).for_group(group, shape, device)
        if coding.center is None:
            page_columns = None
        elif page_columns is None:
            page_columns = torch.zeros(num_pages + 1, dtype=torch.int32, device=device)
        return cls(
            shape=shape,
            group=group,
            num_pages=num_pages,
            dtype=dtype,
            superblocks=counts,
            arenas=(arena(0), arena(1)),
            meta=(side_array(0), side_array(1)),
            table=torch.full((arenas_n, num_pages + 1), UNMAPPED, dtype=torch.int32, device=device),
            coding=coding,
            page_columns=page_columns,
            overflow_groups=torch.zeros((), dtype=torch.int64, device=device),
            dropped_rows=torch.zeros((), dtype=torch.int64, device=device),
            unmapped_reads=torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def num_layers(self) -> int:
        return len(self.group.layers)

    def arena_of(self, side: int) -> int:
        """Number of the arena (row of the table) that holds a side."""
        return 0 if self.group.shared else side

    def pages16(self, side: int, layer: int) -> torch.Tensor:
        """Layer ``layer`` of a side as 16-bit pages: model dtype ``[superblocks, P, H, D]``, a view."""
        s = self.shape
        flat = self.arenas[side][layer].view(self.dtype)
        return flat.view(-1, s.page_size, s.num_kv_heads, s.head_dim)

    @cached_property
    def page_rows16(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Per side and layer, 16-bit pages as rows: model dtype ``[superblocks, P*H*D]``, views made once."""
        return tuple(
            tuple(self.pages16(side, layer).flatten(1) for layer in range(self.num_layers)) for side in SIDES
        )

    @cached_property
    def token_rows16(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The same by token: model dtype ``[superblocks * P, H*D]``."""
        width = self.shape.num_kv_heads * self.shape.head_dim
        return tuple(tuple(rows.view(-1, width) for rows in layers) for layers in self.page_rows16)

    def codes(self, side: int, layer: int, tier: int) -> torch.Tensor:
        """Layer ``layer`` of a side as quantized pages: uint8 ``[blocks, H, P, D*tier/8]``, a view.

        The block index is ``unit // tier_units(tier)``.
        """
        assert tier in TIERS and tier < 16
        s = self.shape
        return self.arenas[side][layer].view(-1, s.num_kv_heads, s.page_size, s.head_dim * tier // 8)

    @cached_property
    def code_words(self) -> dict[int, tuple[tuple[torch.Tensor, ...], ...]]:
        """Per tier, side and layer, quantized pages as int64 rows ``[blocks * H, P*D*tier/64]``, views made once.

        Row = block · H + head: one head of one page. Rows are at least 256 bytes, so whole words.
        """
        width = self.shape.page_size * self.shape.head_dim
        return {
            tier: tuple(
                tuple(layer.view(torch.int64).view(-1, width * tier // 64) for layer in self.arenas[side])
                for side in SIDES
            )
            for tier in TIERS
            if tier < 16
        }

    @cached_property
    def meta_rows(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Per side and layer, (zero, range) as fp16 rows ``[(N+1) * H, D/G * P * 2]``, views made once.

        A side that never leaves 16 bits has none.
        """
        width = self.shape.groups_per_head * self.shape.page_size * 2
        return tuple(() if meta is None else tuple(layer.view(-1, width) for layer in meta) for meta in self.meta)

    def blocks(self, side: int, tier: int) -> torch.Tensor:
        """All layers of a side as raw blocks of a tier: uint8 ``[L, blocks, code_bytes]``, a view."""
        return self.arenas[side].view(self.num_layers, -1, self.shape.unit_bytes * tier_units(tier))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that hold KV, (zero, range) or page tables.

        This is what the byte budget pays for, and equals the group's share of
        ``PoolGeometry.total_bytes``, but for what the groups of a pool share (``shared_bytes``).
        """
        tensors = [*self.arenas, self.table, *(m for m in self.meta if m is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)


def shared_bytes(pool: Sequence[GroupStorage]) -> int:
    """Bytes of centres, and of the rotary table and page columns that the groups of a pool share."""
    centers = [s.coding.center for s in pool]
    columns = next((s.page_columns for s in pool if s.page_columns is not None), None)
    return center_bytes(centers) + (0 if columns is None else columns.nbytes)


def allocate_pool(
    geometry: PoolGeometry,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    codings: Sequence[Coding] | None = None,
) -> tuple[GroupStorage, ...]:
    """One ``GroupStorage`` per layer group of a geometry; with ``shared_bytes`` their ``nbytes`` are ``total_bytes``.

    Args:
        codings: per group; None codes keys and values as they are.

    Raises:
        ValueError: another number of codings than of groups; see ``GroupStorage.allocate``.
    """
    given = [Coding()] * len(geometry.groups) if codings is None else list(codings)
    if len(given) != len(geometry.groups):
        raise ValueError(f"expected {len(geometry.groups)} codings, got {len(given)}")
    centers = [
        c.center if g.k_final < 16 else None for g, c in zip(geometry.groups, given, strict=True)
    ]
    given = [replace(c, center=x) for c, x in zip(given, on_one_table(centers, device, dtype), strict=True)]
    columns = None
    if any(c.center is not None for c in given):
        columns = torch.zeros(geometry.num_pages + 1, dtype=torch.int32, device=device)
    pool = tuple(
        GroupStorage.allocate(geometry.shape, g, n, geometry.num_pages, dtype, device, c, columns)
        for g, n, c in zip(geometry.groups, geometry.superblocks, given, strict=True)
    )
    assert sum(s.nbytes for s in pool) + shared_bytes(pool) == geometry.total_bytes
    assert all(len(s.arenas) == len(SIDES) for s in pool)
    return pool
