"""Random pools and requests with pages at chosen steps, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, TableUpdate
from sglang_pmkvq.formats import STEP_BITS, UNITS_PER_SUPERBLOCK, LayerGroup, PageShape, tier_units
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import center_term
from sglang_pmkvq.kernels.rotary import Center, RotaryTable, on_one_table
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Scaled, Transform, key_transform


@dataclass(frozen=True)
class Inputs:
    """A filled storage and the requests that live in it.

    Attributes:
        storage: every request's pages mapped at their steps, page 0 mapped at 16 bits.
        req_pages: int64 ``[R, max_pages + 1]``, garbage beyond a request's own pages.
        kv_lens: tokens per request.
        steps: int64 ``[N + 1]``, step of each logical page.
        q: fp32 ``[R, Hq, D]``.
        written: per side, ``[L, (N+1)*P, H, D]`` in the model dtype, what was stored at each slot.
    """

    storage: GroupStorage
    req_pages: torch.Tensor
    kv_lens: list[int]
    steps: np.ndarray
    q: torch.Tensor
    written: tuple[torch.Tensor, torch.Tensor]

    def pages(self, request: int) -> list[int]:
        """A request's own logical pages in order."""
        count = -(-self.kv_lens[request] // self.storage.shape.page_size)
        own: list[int] = self.req_pages[request, :count].tolist()
        return own


def make_inputs(
    seed: int,
    shape: PageShape,
    group: LayerGroup,
    kv_lens: Sequence[int],
    steps: int | Sequence[int] | None = None,
    *,
    query_heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    transform: str | Transform = "none",
    clip: bool = False,
    value_transform: str | Transform = "none",
    center: str | None = None,
    stale: bool = True,
) -> Inputs:
    """Requests with random K and V, their pages taken down to their steps one step at a time.

    Args:
        steps: step of every page, or one per page in order of the requests, or None for random ones.
        query_heads: Hq, default H.
        transform: of keys, see ``kernels/coding.py``, or its name; key scales are then random, between 1/4 and 4.
        clip: random clip factors of keys between 0.4 and 1 instead of None.
        value_transform: of values; scales do not exist for them.
        center: None, or how rotary pairs lie, ``neox``, ``interleaved`` or ``partial`` (neox, half of the channels):
            keys then have centres of up to some hundred in random blocks of pairs, none in every third layer.
        stale: fill arenas and side arrays with random bytes first, and leave slots past the end of
            a sequence unwritten, so that reading what does not belong to a request shows.
    """
    rng = np.random.default_rng(seed)
    gen = torch.Generator().manual_seed(seed)
    p, h, d = shape.page_size, shape.num_kv_heads, shape.head_dim
    layers = len(group.layers)
    counts = [-(-n // p) for n in kv_lens]
    n_pages = max(1, sum(counts))
    page_steps = np.zeros(n_pages + 1, dtype=np.int64)
    ids = rng.permutation(n_pages) + 1  # logical id of the i-th page over all requests
    if steps is None:
        page_steps[1:] = rng.integers(0, group.final_step + 1, n_pages)
    else:
        page_steps[ids] = steps
    scale = torch.exp2(torch.rand(layers, h, d, generator=gen) * 4 - 2) if transform == Scaled.name else None
    factor = 0.4 + 0.6 * torch.rand(layers, h, generator=torch.Generator().manual_seed(seed + 1)) if clip else None
    centers = None if center is None else random_center(seed, layers, shape, max(kv_lens, default=0), center)
    of_keys = key_transform(transform, d, scale) if isinstance(transform, str) else transform
    of_values = key_transform(value_transform, d) if isinstance(value_transform, str) else value_transform
    coding = Coding(of_keys, factor, of_values, centers)
    superblocks = [2 * (n_pages + 1) + len(group.steps)] * len(group.arena_sides)
    if centers is not None:
        coding = replace(coding, center=on_one_table([centers], "cpu", dtype)[0])
    storage = GroupStorage.allocate(shape, group, superblocks, n_pages, dtype, coding=coding)
    if stale:
        for t in (*storage.arenas, *(m for m in storage.meta if m is not None)):
            raw = t.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=gen))

    units = [rng.permutation(n_pages + 1) * UNITS_PER_SUPERBLOCK for _ in group.arena_sides]
    _map(storage, units, np.zeros_like(page_steps))
    slots, req_pages, at = [], np.full((len(kv_lens), max(counts, default=0) + 1), -(10**9), dtype=np.int64), 0
    for r, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
        req_pages[r, :count] = ids[at : at + count]
        at += count
        token = np.arange(length)
        slots.append(req_pages[r, token // p] * p + token % p)
    keys, values = (torch.randn(layers, (n_pages + 1) * p, h, d, generator=gen) for _ in range(2))
    slot = torch.from_numpy(np.concatenate(slots))
    if storage.page_columns is not None:
        storage.page_columns.copy_(torch.randint(0, 4, (n_pages + 1,), generator=gen))  # of pages nobody wrote
        columns = [np.arange(count) for count in counts]
        storage.page_columns[torch.from_numpy(ids)] = torch.from_numpy(np.concatenate(columns)).to(torch.int32)
        position = torch.from_numpy(np.concatenate([np.arange(length) for length in kv_lens]))
        for layer in range(layers):
            term = center_term(storage.coding.pick(layer), position)
            if term is not None:
                keys[layer, slot] += term.transpose(0, 1)
    written = (keys.to(dtype), values.to(dtype))
    for layer in range(layers):
        TorchKernels().store(storage, layer, slot, written[0][layer, slot], written[1][layer, slot])

    # Blocks of a step go to fresh superblocks, in random order: out of place, as the ledger does it.
    fresh = [(n_pages + 1) * UNITS_PER_SUPERBLOCK] * len(group.arena_sides)
    for step in range(1, len(group.steps)):
        moving = rng.permutation(np.flatnonzero(page_steps >= step))
        for a in range(len(group.arena_sides)):
            src_tier, dst_tier = group.arena_tier(a, step - 1), group.arena_tier(a, step)
            if src_tier == dst_tier or not moving.size:
                continue
            dst = fresh[a] + np.arange(moving.size) * tier_units(dst_tier)
            fresh[a] = -(-(int(dst[-1]) + tier_units(dst_tier)) // UNITS_PER_SUPERBLOCK) * UNITS_PER_SUPERBLOCK
            TorchKernels().copy(storage, copies(a, moving, units[a][moving], dst, src_tier, dst_tier))
            units[a][moving] = dst
    _map(storage, units, page_steps)
    q = torch.randn(len(kv_lens), query_heads or h, d, generator=gen)
    return Inputs(storage, torch.from_numpy(req_pages), list(kv_lens), page_steps, q, (written[0], written[1]))


def random_center(seed: int, layers: int, shape: PageShape, length: int, style: str) -> Center:
    """Centres in random blocks of pairs, none in every third layer; see ``make_inputs``."""
    gen = torch.Generator().manual_seed(seed + 2)
    d = shape.head_dim
    half = d // 4 if style == "partial" else d // 2
    positions = -(-(length + 1) // 64) * 64
    angle = torch.arange(positions)[:, None] * 1e4 ** (-torch.arange(half) / half)
    table = RotaryTable.of(angle.cos() * 1.25, angle.sin() * 1.25, d, neox=style != "interleaved")
    vector = torch.randn(layers, shape.num_kv_heads, d, generator=gen).pow_(3) * 20
    count = len(table.blocks)
    blocks = [
        () if layer % 3 == 2 else torch.randperm(count, generator=gen)[: 1 + layer % 2 * (count - 1)].tolist()
        for layer in range(layers)
    ]
    return Center.of(vector, blocks, table)


def copies(
    arena: int, page: np.ndarray, src_unit: np.ndarray, dst_unit: np.ndarray, src_tier: int, dst_tier: int
) -> ArenaCopies:
    """Copies of one pair of tiers in group 0."""
    n = len(page)
    return ArenaCopies(
        group=0,
        arena=arena,
        page=np.asarray(page, dtype=np.int32),
        src_unit=np.asarray(src_unit, dtype=np.int32),
        dst_unit=np.asarray(dst_unit, dtype=np.int32),
        src_tier=np.full(n, src_tier, dtype=np.uint8),
        dst_tier=np.full(n, dst_tier, dtype=np.uint8),
    )


def _map(storage: GroupStorage, units: list[np.ndarray], steps: np.ndarray) -> None:
    pages = np.arange(len(steps), dtype=np.int32)
    for arena, unit in enumerate(units):
        entries = ((unit << STEP_BITS) | steps).astype(np.int32)
        TorchKernels().update_table(storage, TableUpdate(0, arena, pages, entries))
