"""Plan and run of attention in Triton; ``attention.py`` documents the arguments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sglang_pmkvq.kernels.attention import (
    DecodeAttention,
    ExtendAttention,
    Lengths,
    PageSource,
    host_lengths,
)
from sglang_pmkvq.kernels.device_plan import PlanBuffers, plan_launches, token_tile
from sglang_pmkvq.kernels.launch import Launch, dot_dtype, interpreted, mantissa_bits, next_power_of_two, upload_rows
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.triton.decode import decode_kernel, merge_kernel
from sglang_pmkvq.kernels.triton.extend import extend_kernel

MAX_GQA = 16
# The tensor cores' smallest tile of rows; a GQA group is padded to it.
DECODE_ROWS = 16
# Query rows (queries times GQA members) of an extend program: one warpgroup's matrix instruction.
EXTEND_ROWS = 64
# Partials that a merging program reads at a time.
MERGE_PARTIALS = 16


class DecodeBuffers:
    """Split-KV partials, fp32: out ``[items, Hq, D]`` and natural-log LSE ``[items, Hq]``."""

    def __init__(self, storage: GroupStorage, items: int, query_heads: int) -> None:
        dims = (items, query_heads)
        self.query_heads = query_heads
        self.items = items
        self.out = torch.empty((*dims, storage.shape.head_dim), dtype=torch.float32, device=storage.device)
        self.lse = torch.empty(dims, dtype=torch.float32, device=storage.device)


class DevicePlan:
    """One forward's requests in one layer group. Addresses stay as long as the buffers fit.

    Attributes:
        buffers: index lists and schedule.
        requests: R.
        num_queries: rows of q.
        singles: bound on requests served by decode.
        q_row: int32 ``[R]``, first row of q of each request.
        q_len, tile_request, tile_first: extend only: queries of each request; request and first
            query of each tile of ``tile_queries`` queries. None in decode.
    """

    def __init__(self) -> None:
        self.buffers: PlanBuffers | None = None
        self.partials: DecodeBuffers | None = None
        self.fixed = False
        self.requests = self.num_queries = self.singles = 0
        self.kv_lens: torch.Tensor | None = None
        self.q_row: torch.Tensor | None = None
        self.q_len: torch.Tensor | None = None
        self.chunks: tuple[np.ndarray, np.ndarray] | None = None
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: torch.Tensor | None = None

    def reserve(
        self, storage: GroupStorage, requests: int, pages: int, query_heads: int, columns: bool = False
    ) -> None:
        """Allocates once and for all, for CUDA graphs: a larger plan is then refused."""
        self.buffers = PlanBuffers.allocate(storage, requests, pages, columns)
        self.partials = DecodeBuffers(storage, requests + self.buffers.target, query_heads)
        self._rows = torch.arange(requests, dtype=torch.int32, device=storage.device)
        self.fixed = True

    def _buffers_for(self, storage: GroupStorage, requests: int, pages: int, columns: bool) -> PlanBuffers:
        """The buffers, grown if need be.

        Raises:
            ValueError: reserved buffers that are too small.
        """
        have = self.buffers
        if have is not None and have.fits(storage, requests, pages, columns):
            return have
        if self.fixed:
            assert have is not None
            raise ValueError(
                f"buffers are reserved for {have.max_requests} requests of {have.max_pages} pages, "
                f"got {requests} of {pages}"
            )
        r = next_power_of_two(max(requests, 1 if have is None else have.max_requests))
        n = next_power_of_two(max(pages, 1 if have is None else have.max_pages))
        self.buffers = PlanBuffers.allocate(storage, r, n, columns)
        self._rows = torch.arange(r, dtype=torch.int32, device=storage.device)
        return self.buffers

    def plan_decode(
        self, storage: GroupStorage, source: PageSource, kv_lens: torch.Tensor, max_pages: int | None = None
    ) -> None:
        """One query per request; ``kv_lens`` on the device, not read by the host."""
        requests = kv_lens.numel()
        pages = source.max_pages if max_pages is None else max_pages
        buffers = self._buffers_for(storage, requests, max(1, pages), columns=False)
        assert self._rows is not None
        self.requests = self.num_queries = self.singles = requests
        self.kv_lens, self.q_row, self.q_len, self.chunks = kv_lens, self._rows, None, None
        for launch in plan_launches(buffers, source, kv_lens, None, max_pages):
            launch.run()

    def plan_extend(
        self, storage: GroupStorage, source: PageSource, prefix: np.ndarray, lens: np.ndarray
    ) -> None:
        """The last ``lens − prefix`` tokens of each request; lengths int64 ``[R]`` on the host."""
        pages = int(max(1, -(-lens.max(initial=0) // storage.shape.page_size)))
        if pages > max(1, source.max_pages):
            raise ValueError(f"a request of {pages} pages, but req_pages has {source.max_pages} columns")
        buffers = self._buffers_for(storage, lens.size, pages, columns=True)
        q_len = lens - prefix
        q_row = np.cumsum(q_len) - q_len
        self.kv_lens, self.q_len, self.q_row = upload_rows([lens, q_len, q_row], storage.device)
        self.requests, self.num_queries = lens.size, int(q_len.sum())
        self.singles = int((q_len == 1).sum())
        self.chunks, self._tiles = (q_len, q_row), {}
        for launch in plan_launches(buffers, source, self.kv_lens, self.q_len, pages):
            launch.run()

    def tiles(self, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 request and first query of each tile of ``queries`` queries, requests of one query left out."""
        if queries not in self._tiles:
            assert self.chunks is not None and self.buffers is not None
            q_len = np.where(self.chunks[0] > 1, self.chunks[0], 0)
            per_request = -(-q_len // queries)
            request = np.repeat(np.arange(q_len.size), per_request)
            first = (np.arange(request.size) - (np.cumsum(per_request) - per_request)[request]) * queries
            # Late tiles see most and start first, so that the last ones to finish are short.
            request_t, first_t = upload_rows([request[::-1], first[::-1]], self.buffers.storage.device)
            self._tiles[queries] = (request_t, first_t)
        return self._tiles[queries]

    def partials_for(self, query_heads: int) -> DecodeBuffers:
        assert self.buffers is not None
        items = self.buffers.max_requests + self.buffers.target
        have = self.partials
        if have is None or have.query_heads != query_heads or have.items < items:
            self.partials = have = DecodeBuffers(self.buffers.storage, items, query_heads)
        return have


class _Planned:
    """Attention over a ``DevicePlan``."""

    def __init__(self) -> None:
        self.device_plan = DevicePlan()

    def _planned(self) -> tuple[GroupStorage, int] | None:
        plan = self.device_plan
        return None if plan.buffers is None else (plan.buffers.storage, plan.num_queries)

    def _attend(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return run(self.device_plan, q, layer, scale, logit_cap, return_lse)


class DeviceDecode(_Planned, DecodeAttention):
    """Decode in Triton: plan and run at fixed addresses, no host synchronization."""

    def plan_source(
        self, storage: GroupStorage, source: PageSource, kv_lens: Lengths, max_pages: int | None = None
    ) -> None:
        if not (isinstance(kv_lens, torch.Tensor) and kv_lens.device == storage.device):
            kv_lens = torch.as_tensor(host_lengths(kv_lens)).to(storage.device)
        self.device_plan.plan_decode(storage, source, kv_lens, max_pages)

    def reserve(self, storage: GroupStorage, requests: int, max_pages: int, query_heads: int) -> None:
        self.device_plan.reserve(storage, requests, max_pages, query_heads)


class DeviceExtend(_Planned, ExtendAttention):
    """Extend in Triton; lengths on the host size its grid."""

    def _plan_lengths(self, storage: GroupStorage, source: PageSource, prefix: np.ndarray, lens: np.ndarray) -> None:
        self.device_plan.plan_extend(storage, source, prefix, lens)


def run(
    plan: DevicePlan,
    q: torch.Tensor,
    layer: int,
    scale: float,
    logit_cap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer: out ``[num_queries, Hq, D]`` in q's dtype, LSE fp32 or None.

    Raises:
        ValueError: more than 16 query heads per KV head, or rows of q that are not contiguous.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    for launch in run_launches(plan, q, layer, scale, logit_cap, out, lse):
        launch.run()
    return out, lse


def run_launches(
    plan: DevicePlan,
    q: torch.Tensor,
    layer: int,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> Iterator[Launch]:
    """The launches of ``run``: decode and merge for requests of one query, extend for the others.

    Where quantized keys are transformed the queries are too, once, at the first launch that is asked for.
    """
    assert plan.buffers is not None
    gqa = q.shape[1] // plan.buffers.storage.shape.num_kv_heads
    if gqa > MAX_GQA:
        raise ValueError(f"at most {MAX_GQA} query heads per KV head, got {gqa}")
    if q.stride(2) != 1:
        raise ValueError("the last axis of q must be contiguous")
    coding, q_low = plan.buffers.storage.coding, None
    if not coding.key_transform.is_plain(layer):
        # Both must have the same strides; and of contiguous queries a rotation is one product.
        q = q.contiguous()
        q_low = coding.queries(q.unflatten(1, (-1, gqa)), layer).flatten(1, 2)
    if plan.singles:
        partials = plan.partials_for(q.shape[1])
        yield decode_launch(plan, partials, q, q_low, layer, scale, logit_cap)
        yield merge_launch(plan, partials, out, lse)
    if plan.chunks is not None and (plan.chunks[0] > 1).any():
        yield extend_launch(plan, q, q_low, layer, scale, logit_cap, out, lse)


def _layer_args(plan: DevicePlan, layer: int) -> dict[str, object]:
    """What decode and extend take alike."""
    buffers = plan.buffers
    assert buffers is not None
    storage = buffers.storage
    s = storage.shape
    meta = [None if m is None else m[layer].view(torch.int32) for m in storage.meta]
    tiers = storage.group.steps
    return {
        "k16": storage.arenas[0][layer].view(storage.dtype),
        "v16": storage.arenas[1][layer].view(storage.dtype),
        "k_codes": storage.arenas[0][layer],
        "v_codes": storage.arenas[1][layer],
        "k_meta": meta[0],
        "v_meta": meta[1],
        **storage.coding.read_arguments(layer, storage.num_layers),
        "page_columns": storage.page_columns if storage.coding.center_blocks(layer) else None,
        "pages": buffers.pages,
        "k_units": buffers.k_units,
        "v_units": buffers.v_units,
        "list_stride": buffers.max_pages,
        "q_row": plan.q_row,
        "K_TIERS": tuple(k for k, _ in tiers),
        "V_TIERS": tuple(v for _, v in tiers),
        "STEPS": len(tiers),
        "H": s.num_kv_heads,
        "D": s.head_dim,
        "G": s.group_size,
        "P": s.page_size,
        "DOT": dot_dtype(storage.dtype),
        "MANTISSA": mantissa_bits(storage.dtype),
        "ASM": not interpreted(),
    }


def decode_launch(
    plan: DevicePlan,
    partials: DecodeBuffers,
    q: torch.Tensor,
    q_low: torch.Tensor | None,
    layer: int,
    scale: float,
    logit_cap: float,
) -> Launch:
    buffers = plan.buffers
    assert buffers is not None
    storage = buffers.storage
    heads = storage.shape.num_kv_heads
    args = {
        **_layer_args(plan, layer),
        "q": q,
        "q_stride_t": q.stride(0),
        "q_stride_h": q.stride(1),
        "q_low": q_low,
        "part_out": partials.out,
        "part_lse": partials.lse,
        "split_indptr": buffers.split_indptr,
        "item_request": buffers.item_request,
        "item_first": buffers.item_first,
        "item_tokens": buffers.item_tokens,
        "num_requests": plan.requests,
        "sm_scale": float(scale),
        "logit_cap": float(logit_cap),
        "GQA": q.shape[1] // heads,
        "M": DECODE_ROWS,
        "N": token_tile(storage),
        "CAP": logit_cap > 0.0,
    }
    return Launch(decode_kernel, (heads, plan.singles + buffers.target), args, num_warps=4, num_stages=3)


def merge_launch(
    plan: DevicePlan, partials: DecodeBuffers, out: torch.Tensor, lse: torch.Tensor | None
) -> Launch:
    assert plan.buffers is not None
    args = {
        "part_out": partials.out,
        "part_lse": partials.lse,
        "split_indptr": plan.buffers.split_indptr,
        "q_row": plan.q_row,
        "out": out,
        "lse": lse,
        "out_stride_t": out.stride(0),
        "out_stride_h": out.stride(1),
        "HQ": out.shape[1],
        "D": out.shape[2],
        "BLOCK": MERGE_PARTIALS,
    }
    return Launch(merge_kernel, (plan.requests, out.shape[1]), args, num_warps=2)


def extend_launch(
    plan: DevicePlan,
    q: torch.Tensor,
    q_low: torch.Tensor | None,
    layer: int,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> Launch:
    buffers = plan.buffers
    assert buffers is not None
    storage = buffers.storage
    heads = storage.shape.num_kv_heads
    gqa = q.shape[1] // heads
    per_query = next_power_of_two(gqa)
    rows = EXTEND_ROWS
    tile_request, tile_first = plan.tiles(rows // per_query)
    args = {
        **_layer_args(plan, layer),
        "q": q,
        "q_stride_t": q.stride(0),
        "q_stride_h": q.stride(1),
        "q_low": q_low,
        "out": out,
        "out_stride_t": out.stride(0),
        "out_stride_h": out.stride(1),
        "lse": lse,
        "cols": buffers.cols,
        "tier_indptr": buffers.tier_indptr,
        "tier_tokens": buffers.tier_tokens,
        "tile_request": tile_request,
        "tile_first": tile_first,
        "q_len": plan.q_len,
        "kv_lens": plan.kv_lens,
        "sm_scale": float(scale),
        "logit_cap": float(logit_cap),
        "GQA": gqa,
        "M": rows,
        "N": token_tile(storage),
        "ROWS_PER_QUERY": per_query,
        "CAP": logit_cap > 0.0,
    }
    return Launch(extend_kernel, (heads, tile_request.numel()), args, num_warps=4, num_stages=2)
