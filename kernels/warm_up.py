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
from sglang_pmkvq.kernels import page_ops
from sglang_pmkvq.kernels.attention import MixedKVDecodeWrapper, MixedKVExtendWrapper
from sglang_pmkvq.kernels.device_plan import PageSource
from sglang_pmkvq.kernels.storage import GroupStorage


def warm_up(
    storage: GroupStorage,
    query_heads: int,
    logit_caps: Iterable[float] = (0.0,),
    slot_dtype: torch.dtype = torch.int32,
) -> None:
    """Launches every kernel that serving a storage needs, on a small pool of the same kind.

    A table update, stores, copies to every tier, then an extend with a request of one query and a
    decode, planned from token slots as SGLang keeps them. The storage itself is neither read nor
    written.

    Args:
        query_heads: Hq of this rank.
        logit_caps: caps of the model's layers; 0 is none.
        slot_dtype: dtype of SGLang's request table; row numbers, slots and lengths are int64.
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
        page_ops.apply_table(small, [TableUpdate(0, arena, pages, whole << STEP_BITS)], "triton")
    tokens = pages.size * p
    slots = torch.arange(p, p + tokens, device=device)
    kv = torch.ones(tokens, small.shape.num_kv_heads, small.shape.head_dim, dtype=small.dtype, device=device)
    page_ops.store(small, 0, slots, kv, kv, "triton")
    for arena in arenas:
        side = small.group.arena_sides[arena][0]
        tier = np.array([small.group.steps[s][side] for s in steps], dtype=np.uint8)
        copy = ArenaCopies(0, arena, pages, whole, shrunk, np.full_like(tier, 16), tier)
        page_ops.execute(small, [copy], "triton")
        entries = (shrunk << STEP_BITS | steps).astype(np.int32)
        page_ops.apply_table(small, [TableUpdate(0, arena, pages, entries)], "triton")

    rows = torch.zeros(2, dtype=torch.int64, device=device)
    source = PageSource(slots.to(slot_dtype)[None], rows, p, p)
    lens = torch.full((2,), tokens, device=device)
    extend, decode = MixedKVExtendWrapper(backend="triton"), MixedKVDecodeWrapper(backend="triton")
    extend.plan_source(small, source, [tokens - 2, tokens - 1], [tokens, tokens])
    decode.plan_source(small, source, lens)
    for cap in logit_caps:
        for wrapper, queries in ((extend, 3), (decode, 2)):
            q = torch.ones(queries, query_heads, small.shape.head_dim, dtype=small.dtype, device=device)
            wrapper.run(q, 0, 1.0, cap)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _small_twin(storage: GroupStorage) -> GroupStorage:
    """An empty storage of one layer and a few pages, alike in all that kernels are compiled for."""
    pages = len(storage.group.steps) + 1
    group = replace(storage.group, layers=(0,))
    one_layer = (storage.key_scale, storage.key_clip)
    scale, clip = (None if t is None else torch.ones_like(t[:1]) for t in one_layer)
    superblocks = [2 * pages + 1] * len(storage.group.arena_sides)
    return GroupStorage.allocate(
        storage.shape, group, superblocks, pages, storage.dtype, storage.device, scale, clip,
        hadamard=storage.rotation is not None,
    )  # fmt: skip

