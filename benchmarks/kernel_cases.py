"""Pools, checks and baselines of ``benchmarks/kernels.py``. Everything here works on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from sglang_pmkvq.kernels.attention import MixedKVDecodeWrapper, MixedKVExtendWrapper
from sglang_pmkvq.kernels.storage import GroupStorage

# Share of the pages at 16, 8, 4 and 2 bits. "mix" is a long-running server under pressure: a window at
# 16 bits, recent pages at 8, most at 4, the oldest at 2.
MIXES: dict[str, tuple[float, ...]] = {
    "all-16": (1.0, 0.0, 0.0, 0.0),
    "all-8": (0.0, 1.0, 0.0, 0.0),
    "all-4": (0.0, 0.0, 1.0, 0.0),
    "all-2": (0.0, 0.0, 0.0, 1.0),
    "mix": (0.03, 0.17, 0.5, 0.3),
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


def layer_bytes_of(shape: PageShape, batch: int, tokens: int, mix: Sequence[float]) -> int:
    """Bytes of one layer of ``batch`` requests, by the pool's own arithmetic."""
    group = LayerGroup((0,), 2, 2)
    pages = -(-tokens // shape.page_size)
    return batch * sum(n * page_bytes(shape, group, s) for s, n in enumerate(page_counts(pages, mix)))


def page_counts(pages: int, mix: Sequence[float]) -> list[int]:
    """Pages per step of a request; the rest of the rounding goes to the commonest step."""
    counts = [int(pages * share) for share in mix]
    counts[int(np.argmax(mix))] += pages - sum(counts)
    return counts


def make_case(
    shape: PageShape, batch: int, tokens: int, mix: Sequence[float], layers: int, dtype: torch.dtype,
    device: torch.device, seed: int = 0,
) -> Case:  # fmt: skip
    """Random values in random places; every page of a request at a step drawn from ``mix``."""
    rng = np.random.default_rng(seed)
    gen = torch.Generator(device=device).manual_seed(seed)
    group = LayerGroup(tuple(range(layers)), 2, 2)
    pages = -(-tokens // shape.page_size)
    counts = page_counts(pages, mix)
    step = np.concatenate([rng.permutation(np.repeat(np.arange(4), counts)) for _ in range(batch)])
    total = batch * pages
    unit = np.zeros(total, dtype=np.int64)
    at = UNITS_PER_SUPERBLOCK  # superblock 0 is page 0
    for s, (tier, _) in enumerate(group.steps):
        mine = np.flatnonzero(step == s)
        unit[rng.permutation(mine)] = at + np.arange(mine.size) * tier_units(tier)
        at = -(-(at + mine.size * tier_units(tier)) // UNITS_PER_SUPERBLOCK) * UNITS_PER_SUPERBLOCK
    storage = GroupStorage.allocate(shape, group, [at // UNITS_PER_SUPERBLOCK], total, dtype, device)
    wide = 1 + int((step == 0).sum())
    for side in SIDES:
        meta = storage.meta[side]
        assert meta is not None
        for layer in range(layers):
            storage.arenas[side][layer].random_(0, 256, generator=gen)
            storage.pages16(side, layer)[:wide].normal_(generator=gen)
            meta[layer, ..., 0].normal_(-2.5, 0.3, generator=gen)
            meta[layer, ..., 1].uniform_(3.0, 6.0, generator=gen)
    ids = rng.permutation(total) + 1
    entries = np.zeros(total + 1, dtype=np.int32)
    entries[ids] = unit << STEP_BITS | step
    storage.table[0] = torch.from_numpy(entries).to(device)
    req_pages = torch.from_numpy(ids.reshape(batch, pages).astype(np.int32)).to(device)
    lens = torch.full((batch,), tokens, dtype=torch.int64, device=device)
    return Case(storage, req_pages, lens, layer_bytes_of(shape, batch, tokens, mix))


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
        wrapper = MixedKVDecodeWrapper(use_stock=False, backend="torch")
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
        wrapper = MixedKVExtendWrapper(use_stock=False, backend="torch")
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


def sglang_decode(case: Case, q: torch.Tensor, scale: float) -> Callable[[int], torch.Tensor]:
    """SGLang's Triton decode over the case's own 16-bit pages, with its default number of splits; run(layer)."""
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd

    s, batch, splits = case.storage.shape, q.shape[0], 8
    superblocks = case.storage.table[0][case.req_pages.long()] >> STEP_BITS + 3
    slots = superblocks[:, :, None] * s.page_size + torch.arange(s.page_size, device=q.device)
    tokens = int(case.kv_lens[0])
    indices = slots.flatten(1)[:, :tokens].flatten().long().contiguous()
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    out = torch.empty_like(q)
    logits = torch.empty(batch, q.shape[1], splits, s.head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, q.shape[1], splits, dtype=torch.float32, device=q.device)
    counts = torch.full((batch,), splits, dtype=torch.int32, device=q.device)
    rows = [
        tuple(case.storage.pages16(side, i).view(-1, s.num_kv_heads, s.head_dim) for side in SIDES)
        for i in range(case.storage.num_layers)
    ]

    def run(layer: int) -> torch.Tensor:
        decode_attention_fwd(
            q, *rows[layer], out, indptr, indices, logits, lse, counts, splits, scale, k_scale=1.0, v_scale=1.0
        )
        return out

    return run
