"""Compiles the Triton kernels of a layer group at start-up, so that no forward waits for a compiler.

Triton compiles a kernel at its first launch with arguments of a new kind. What kind an argument is
(dtype, alignment, divisibility, 1 or not) depends on the model, the flags and the layer group, never
on a batch or on the size of the pool, so a pool of a few pages stands for the real one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, TableUpdate
from sglang_pmkvq.formats import STEP_BITS, UNITS_PER_SUPERBLOCK
from sglang_pmkvq.kernels.attention import DecodeAttention, ExtendAttention, PageSource
from sglang_pmkvq.kernels.backend import Kernels
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.storage import GroupStorage


def warm_up(
    kernels: Kernels,
    storage: GroupStorage,
    query_heads: int,
    logit_caps: Iterable[float] = (0.0,),
    slot_dtype: torch.dtype = torch.int32,
) -> None:
    """Launches every kernel that serving a storage needs, on a small pool of the same kind.

    A table update, stores, copies to every tier, then an extend with a request of one query and a
    decode of every kind of layer, planned from token slots as SGLang keeps them. The storage itself is neither read
    nor written.

    The arguments are those of ``Kernels.warm_up``.
    """
    device, p = storage.device, storage.shape.page_size
    small = _small_twin(storage)
    # One page of each step and a last one at 16 bits, which the new tokens are in.
    pages = np.arange(1, small.num_pages + 1, dtype=np.int32)
    steps = np.append(np.arange(pages.size - 1), 0)
    whole = pages * UNITS_PER_SUPERBLOCK
    shrunk = whole + small.num_pages * UNITS_PER_SUPERBLOCK
    arenas = range(len(small.group.arena_sides))
    for arena in arenas:
        kernels.update_table(small, TableUpdate(0, arena, pages, whole << STEP_BITS))
    tokens = pages.size * p
    slots = torch.arange(p, p + tokens, device=device)
    kv = torch.ones(tokens, small.shape.num_kv_heads, small.shape.head_dim, dtype=small.dtype, device=device)
    kernels.store(small, 0, slots, kv, kv)
    for arena in arenas:
        side = small.group.arena_sides[arena][0]
        tier = np.array([small.group.steps[s][side] for s in steps], dtype=np.uint8)
        kernels.copy(small, ArenaCopies(0, arena, pages, whole, shrunk, np.full_like(tier, 16), tier))
        entries = (shrunk << STEP_BITS | steps).astype(np.int32)
        kernels.update_table(small, TableUpdate(0, arena, pages, entries))

    rows = torch.zeros(2, dtype=torch.int64, device=device)
    source = PageSource(slots.to(slot_dtype)[None], rows, p, p)
    lens = torch.full((2,), tokens, device=device)
    extend, decode = kernels.extend(), kernels.decode()
    extend.plan_source(small, source, [tokens - 2, tokens - 1], [tokens, tokens])
    decode.plan_source(small, source, lens)
    planned: tuple[tuple[ExtendAttention | DecodeAttention, int], ...] = ((extend, 3), (decode, 2))
    for cap in logit_caps:
        for wrapper, queries in planned:
            q = torch.ones(queries, query_heads, small.shape.head_dim, dtype=small.dtype, device=device)
            for layer in range(small.num_layers):
                wrapper.run(q, layer, 1.0, cap)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _small_twin(storage: GroupStorage) -> GroupStorage:
    """An empty storage of a layer of each kind and a few pages, alike in all that kernels are compiled for."""
    pages = len(storage.group.steps) + 1
    kinds = _kinds(storage.coding, storage.num_layers)
    group = replace(storage.group, layers=tuple(range(len(kinds))))
    superblocks = [2 * pages + 1] * len(storage.group.arena_sides)
    coding = storage.coding.pick(kinds)
    return GroupStorage.allocate(
        storage.shape, group, superblocks, pages, storage.dtype, storage.device, coding
    )


def _kinds(coding: Coding, layers: int) -> list[int]:
    """One layer of each kind that kernels are compiled for: by both transforms and blocks of the centre."""
    keys, values = coding.key_transform, coding.value_transform
    kinds: dict[tuple[object, ...], int] = {}
    for layer in range(layers):
        parts = (keys.pick(layer).name, values.pick(layer).name, coding.center_blocks(layer))
        kinds.setdefault(parts, layer)
    return list(kinds.values())
