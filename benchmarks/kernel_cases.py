"""Pools, checks and baselines of the table of kernel speeds. Everything here works on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.cells import CheckFailed
from sglang_pmkvq.formats import SIDES, STEP_BITS, UNITS_PER_SUPERBLOCK, LayerGroup, PageShape, page_bytes, tier_units
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


def check(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    """The relative error, if it is within the tolerance (NaN never is)."""
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < tolerance:
        raise CheckFailed(f"{name}: relative error {error:.3g}, at most {tolerance:.3g} allowed")
    return float(f"{error:.2g}")


def check_fp32(
    part: str, case: Case, q: torch.Tensor, out: torch.Tensor, layer: int, scale: float, chunk: int
) -> float:
    """Attention against fp32 torch on the same pages: the last queries of the first and of the last request."""
    error, few = 0.0, min(chunk, 16)
    for r in sorted({0, case.req_pages.shape[0] - 1}):
        wrapper = TorchKernels().extend(use_stock=False)
        tokens = int(case.kv_lens[r])
        wrapper.plan(case.storage, case.req_pages[r : r + 1], [tokens - few], [tokens])
        rows = slice((r + 1) * chunk - few, (r + 1) * chunk)
        want = wrapper.run(q[rows].float(), layer, scale)
        assert isinstance(want, torch.Tensor)
        error = max(error, check(part, out[rows], want, TOLERANCE[q.dtype]))
    return error


def check_same_bytes(name: str, a: Case, b: Case) -> None:
    """Pages and their (zero, range) in two pools are the same, bit for bit."""
    for x, y in zip((*a.storage.arenas, *a.storage.meta), (*b.storage.arenas, *b.storage.meta), strict=True):
        if x is not None and y is not None and not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            raise CheckFailed(f"{name}: bytes differ from torch's")


def flashinfer_attention(
    part: str, case: Case, q: torch.Tensor, scale: float, chunk: int
) -> Callable[[int], torch.Tensor]:
    """FlashInfer's paged decode, or its paged causal prefill."""
    import flashinfer

    s = case.storage.shape
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    superblocks = case.storage.table[0][case.req_pages.long()] >> STEP_BITS + 3
    indptr = torch.arange(len(superblocks) + 1, dtype=torch.int32)
    last = ((case.kv_lens - 1) % s.page_size + 1).int().cpu()
    pages = (indptr * superblocks.shape[1], superblocks.flatten().int().contiguous(), last)
    heads = (q.shape[1], s.num_kv_heads, s.head_dim, s.page_size)
    more = {"q_data_type": q.dtype, "kv_data_type": q.dtype, "sm_scale": scale}
    if part == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*pages, *heads, **more)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(indptr * chunk, *pages, *heads, causal=True, **more)
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


def sglang_attention(part: str, case: Case, q: torch.Tensor, scale: float, chunk: int) -> Callable[[int], torch.Tensor]:
    """SGLang's Triton decode with its default number of splits, or its extend, whose chunk has rows of its own."""
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd
    from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

    rows, buffers = token_rows(case)
    batch, tokens = rows.shape
    prefix = tokens - chunk if part == "extend" else tokens
    indices = rows[:, :prefix].flatten().contiguous()
    requests = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    indptr, q_indptr = requests * prefix, requests * chunk
    out = torch.empty_like(q)
    if part == "decode":
        splits = 8
        shape = (batch, q.shape[1], splits, case.storage.shape.head_dim)
        logits, lse = (torch.empty(shape[:n], dtype=torch.float32, device=q.device) for n in (4, 3))
        counts = torch.full((batch,), splits, dtype=torch.int32, device=q.device)

        def run(layer: int) -> torch.Tensor:
            k, v = buffers[layer]
            decode_attention_fwd(
                q, k, v, out, indptr, indices, logits, lse, counts, splits, scale, k_scale=1.0, v_scale=1.0
            )
            return out
    else:
        new = rows[:, prefix:].flatten()
        chunks = [tuple(side[new] for side in layer) for layer in buffers]

        def run(layer: int) -> torch.Tensor:
            k, v = chunks[layer]
            extend_attention_fwd(
                q, k, v, out, *buffers[layer], q_indptr, indptr, indices, None, True, None, chunk, 1.0, 1.0,
                sm_scale=scale,
            )  # fmt: skip
            return out

    return run


# Both read the 16-bit pages of a case that holds no others, with `chunk` queries per request, and give run(layer).
BASELINES = {"flashinfer": flashinfer_attention, "sglang_triton": sglang_attention}
