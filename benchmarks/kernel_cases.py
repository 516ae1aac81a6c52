"""Pools, checks and baselines of ``benchmarks/kernels.py``. Everything here works on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sglang_pmkvq.formats import (
    SIDES,
    STEP_BITS,
    UNITS_PER_SUPERBLOCK,
    LayerGroup,
    PageShape,
    page_bytes,
    tier_units,
)
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.torch_kernels import TorchKernels


@dataclass(frozen=True)
class Mix:
    """A layer group and the share of its pages at each of its steps.

    Attributes:
        finals: final tiers of K and V. A group is timed with the finals it would have, since a kernel is compiled for
            all steps of its group.
        shares: per step, the rest of the steps have none.
    """

    finals: tuple[int, int]
    shares: tuple[float, ...]


# "mix" is a long-running server under pressure: a window at 16 bits, recent pages at 8, most at 4, the oldest at 2.
# "k4v2" is the same for a group whose keys end at 4 bits: two arenas, steps (16,16) (16,8) (8,4) (4,2).
MIXES: dict[str, Mix] = {
    "all-16": Mix((16, 16), (1.0,)),
    "all-8": Mix((8, 8), (0.0, 1.0)),
    "all-4": Mix((4, 4), (0.0, 0.0, 1.0)),
    "all-2": Mix((2, 2), (0.0, 0.0, 0.0, 1.0)),
    "mix": Mix((2, 2), (0.03, 0.17, 0.5, 0.3)),
    "k4v2": Mix((4, 2), (0.03, 0.17, 0.3, 0.5)),
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


class CheckFailed(RuntimeError):
    """A result that does not agree with its reference: no time is printed for it."""


@dataclass(frozen=True)
class Case:
    """A filled pool and the requests in it.

    Attributes:
        storage: ``layers`` layers, so that repeated runs can rotate through more bytes than the L2 holds.
        req_pages: int32 ``[batch, pages]``. kv_lens: int64 ``[batch]``, all ``tokens``.
        layer_bytes: bytes that attention must read per layer: codes, (zero, range), 16-bit pages.
    """

    storage: GroupStorage
    req_pages: torch.Tensor
    kv_lens: torch.Tensor
    layer_bytes: int


def layer_bytes_of(shape: PageShape, batch: int, tokens: int, mix: Mix) -> int:
    """Bytes of one layer of ``batch`` requests, by the pool's own arithmetic."""
    group = LayerGroup((0,), *mix.finals)
    pages = -(-tokens // shape.page_size)
    return batch * sum(n * page_bytes(shape, group, s) for s, n in enumerate(page_counts(pages, mix)))


def page_counts(pages: int, mix: Mix) -> list[int]:
    """Pages per step of a request; the rest of the rounding goes to the commonest step."""
    counts = [int(pages * share) for share in mix.shares]
    counts[int(np.argmax(mix.shares))] += pages - sum(counts)
    return counts


def make_case(
    shape: PageShape, batch: int, tokens: int, mix: Mix, layers: int, dtype: torch.dtype, device: torch.device,
    seed: int = 0,
) -> Case:  # fmt: skip
    """Random values in random places; every page of a request at a step drawn from ``mix``."""
    rng = np.random.default_rng(seed)
    gen = torch.Generator(device=device).manual_seed(seed)
    group = LayerGroup(tuple(range(layers)), *mix.finals)
    pages = -(-tokens // shape.page_size)
    counts = page_counts(pages, mix)
    step = np.concatenate([rng.permutation(np.repeat(np.arange(len(counts)), counts)) for _ in range(batch)])
    total = batch * pages
    units, ends = [], []
    for arena in range(len(group.arena_sides)):
        unit = np.zeros(total, dtype=np.int64)
        at = UNITS_PER_SUPERBLOCK  # superblock 0 is page 0
        for s in range(len(counts)):
            tier = group.arena_tier(arena, s)
            mine = np.flatnonzero(step == s)
            unit[rng.permutation(mine)] = at + np.arange(mine.size) * tier_units(tier)
            at = -(-(at + mine.size * tier_units(tier)) // UNITS_PER_SUPERBLOCK) * UNITS_PER_SUPERBLOCK
        units.append(unit)
        ends.append(at // UNITS_PER_SUPERBLOCK)
    storage = GroupStorage.allocate(shape, group, ends, total, dtype, device)
    for side in SIDES:
        meta, arena = storage.meta[side], storage.arena_of(side)
        whole = np.array([tier[side] == 16 for tier in group.steps])[step]
        blocks = torch.from_numpy(np.append(units[arena][whole] // UNITS_PER_SUPERBLOCK, 0)).to(device)
        size = (blocks.numel(), shape.page_size, shape.num_kv_heads, shape.head_dim)
        for layer in range(layers):
            storage.arenas[side][layer].random_(0, 256, generator=gen)
            storage.pages16(side, layer)[blocks] = torch.randn(size, generator=gen, device=device).to(dtype)
            if meta is not None:
                meta[layer, ..., 0].normal_(-2.5, 0.3, generator=gen)
                meta[layer, ..., 1].uniform_(3.0, 6.0, generator=gen)
    ids = rng.permutation(total) + 1
    for arena, unit in enumerate(units):
        entries = np.zeros(total + 1, dtype=np.int32)
        entries[ids] = unit << STEP_BITS | step
        storage.table[arena] = torch.from_numpy(entries).to(device)
    req_pages = torch.from_numpy(ids.reshape(batch, pages).astype(np.int32)).to(device)
    lens = torch.full((batch,), tokens, dtype=torch.int64, device=device)
    return Case(storage, req_pages, lens, layer_bytes_of(shape, batch, tokens, mix))


def request_table(case: Case) -> PageSource:
    """The pages of a case as SGLang keeps them: a table of token slots, requests at rows in any order."""
    p, batch = case.storage.shape.page_size, case.req_pages.shape[0]
    rows = torch.randperm(batch + 3, generator=torch.Generator().manual_seed(1))[:batch].to(case.req_pages.device)
    slots = case.req_pages[:, :, None] * p + torch.arange(p, device=case.req_pages.device)
    table = torch.zeros(batch + 3, slots.shape[1] * p, dtype=torch.int32, device=case.req_pages.device)
    table[rows] = slots.flatten(1).int()
    return PageSource(table, rows, p, p)


def plan_bytes(case: Case) -> int:
    """Bytes that a decode's plan must read and write: per page its id from the source, kept and read again, its table
    entry twice, and its entries in the lists."""
    pages, arenas = case.req_pages.numel(), len(case.storage.group.arena_sides)
    return pages * 4 * (1 + 2 + 2 + 2 + 2 * (arenas - 1))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def check(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    """The relative error, if it is within the tolerance (NaN never is)."""
    error = relative_error(got, want)
    if not error < tolerance:
        raise CheckFailed(f"{name}: relative error {error:.3g}, at most {tolerance:.3g} allowed")
    return error


def sample_requests(batch: int) -> list[int]:
    """Requests that the fp32 check looks at: the first and the last."""
    return sorted({0, batch - 1})


def check_decode(case: Case, q: torch.Tensor, out: torch.Tensor, layer: int, scale: float) -> float:
    """Decode against fp32 torch on the same pages, for some of the requests."""
    error = 0.0
    for r in sample_requests(q.shape[0]):
        wrapper = TorchKernels().decode(use_stock=False)
        wrapper.plan(case.storage, case.req_pages[r : r + 1], case.kv_lens[r : r + 1])
        want = wrapper.run(q[r : r + 1].float(), layer, scale)
        assert isinstance(want, torch.Tensor)
        error = max(error, check("decode", out[r : r + 1], want, TOLERANCE[q.dtype]))
    return error


def check_extend(case: Case, q: torch.Tensor, out: torch.Tensor, layer: int, scale: float, chunk: int) -> float:
    """Extend against fp32 torch, for the last queries of some of the requests."""
    error = 0.0
    few = min(chunk, 16)
    for r in sample_requests(case.req_pages.shape[0]):
        wrapper = TorchKernels().extend(use_stock=False)
        tokens = int(case.kv_lens[r])
        wrapper.plan(case.storage, case.req_pages[r : r + 1], [tokens - few], [tokens])
        rows = slice((r + 1) * chunk - few, (r + 1) * chunk)
        want = wrapper.run(q[rows].float(), layer, scale)
        assert isinstance(want, torch.Tensor)
        error = max(error, check("extend", out[rows], want, TOLERANCE[q.dtype]))
    return error


def flashinfer_decode(case: Case, q: torch.Tensor, scale: float) -> Callable[[int], torch.Tensor]:
    """FlashInfer's paged decode over the case's own 16-bit pages (it must hold no others); run(layer)."""
    import flashinfer

    s, batch = case.storage.shape, q.shape[0]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    superblocks = case.storage.table[0][case.req_pages.long()] >> STEP_BITS + 3
    pages = superblocks.shape[1]
    indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
    last = ((case.kv_lens - 1) % s.page_size + 1).int().cpu()
    wrapper.plan(
        indptr, superblocks.flatten().int().contiguous(), last, q.shape[1], s.num_kv_heads, s.head_dim, s.page_size,
        q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale,
    )  # fmt: skip
    caches = [tuple(case.storage.pages16(side, i) for side in SIDES) for i in range(case.storage.num_layers)]
    return lambda layer: wrapper.run(q, caches[layer])


def flashinfer_extend(case: Case, q: torch.Tensor, scale: float, chunk: int) -> Callable[[int], torch.Tensor]:
    """FlashInfer's paged causal prefill over the case's own 16-bit pages; run(layer)."""
    import flashinfer

    s, batch = case.storage.shape, case.req_pages.shape[0]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    superblocks = case.storage.table[0][case.req_pages.long()] >> STEP_BITS + 3
    indptr = torch.arange(batch + 1, dtype=torch.int32)
    last = ((case.kv_lens - 1) % s.page_size + 1).int().cpu()
    wrapper.plan(
        indptr * chunk, indptr * superblocks.shape[1], superblocks.flatten().int().contiguous(), last,
        q.shape[1], s.num_kv_heads, s.head_dim, s.page_size, causal=True, sm_scale=scale,
        q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    caches = [tuple(case.storage.pages16(side, i) for side in SIDES) for i in range(case.storage.num_layers)]
    return lambda layer: wrapper.run(q, caches[layer])


def token_rows(case: Case) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """int64 ``[batch, tokens]`` rows of the requests in the 16-bit pages, and per layer K and V ``[rows, H, D]``."""
    s = case.storage.shape
    superblocks = case.storage.table[0][case.req_pages.long()] >> STEP_BITS + 3
    slots = superblocks[:, :, None] * s.page_size + torch.arange(s.page_size, device=superblocks.device)
    buffers = [
        tuple(case.storage.pages16(side, i).view(-1, s.num_kv_heads, s.head_dim) for side in SIDES)
        for i in range(case.storage.num_layers)
    ]
    return slots.flatten(1)[:, : int(case.kv_lens[0])].long(), buffers


def sglang_extend(case: Case, q: torch.Tensor, scale: float, chunk: int) -> Callable[[int], torch.Tensor]:
    """SGLang's Triton extend: prefix from the case's own 16-bit pages, the chunk from rows of its own; run(layer)."""
    from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

    rows, buffers = token_rows(case)
    batch, prefix = rows.shape[0], rows.shape[1] - chunk
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    indices = rows[:, :prefix].flatten().contiguous()
    new = rows[:, prefix:].flatten()
    chunks = [tuple(side[new] for side in layer) for layer in buffers]
    out = torch.empty_like(q)

    def run(layer: int) -> torch.Tensor:
        extend_attention_fwd(
            q, *chunks[layer], out, *buffers[layer], indptr * chunk, indptr * prefix, indices, None, True, None, chunk,
            1.0, 1.0, sm_scale=scale,
        )  # fmt: skip
        return out

    return run


def sglang_decode(case: Case, q: torch.Tensor, scale: float) -> Callable[[int], torch.Tensor]:
    """SGLang's Triton decode over the case's own 16-bit pages, with its default number of splits; run(layer)."""
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd

    s, batch, splits = case.storage.shape, q.shape[0], 8
    slots, rows = token_rows(case)
    indices = slots.flatten().contiguous()
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * slots.shape[1]
    out = torch.empty_like(q)
    logits = torch.empty(batch, q.shape[1], splits, s.head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, q.shape[1], splits, dtype=torch.float32, device=q.device)
    counts = torch.full((batch,), splits, dtype=torch.int32, device=q.device)
    def run(layer: int) -> torch.Tensor:
        decode_attention_fwd(
            q, *rows[layer], out, indptr, indices, logits, lse, counts, splits, scale, k_scale=1.0, v_scale=1.0
        )
        return out

    return run
