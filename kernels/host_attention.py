"""Plan and run of attention in torch, on the CPU; ``attention.py`` documents the arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from sglang_pmkvq.formats import K, V
from sglang_pmkvq.kernels.attention import (
    DecodeAttention,
    ExtendAttention,
    Lengths,
    PageSource,
    host_lengths,
)
from sglang_pmkvq.kernels.cpu import partials, stock
from sglang_pmkvq.kernels.page_lists import PageLists, read_page_lists, upload, write_columns
from sglang_pmkvq.kernels.plan import Tile, build_tiles
from sglang_pmkvq.kernels.storage import GroupStorage

# fp32 scores of one query tile in extend, over the groups of channels (8 MiB): bounds the workspace however long a
# chunk is.
SCORE_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class ExtendRequest:
    """A request of several queries with shrunk pages: rows ``start..end`` of q, its own tiles."""

    start: int
    end: int
    prefix_len: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class HostPlan:
    """Where the queries of one forward find their KV in one layer group.

    Attributes:
        storage: the group's tensors.
        num_queries: rows of q.
        stock_requests: requests served by stock's own call.
        batched_rows: int64 ``[B]``, rows of q of the single-query requests served together.
        tiles: their pages by step; ``Tile.request`` indexes ``batched_rows``.
        item_request: int64 ``[I]``, ``Tile.request`` of all tiles in a row.
        extends: multi-query requests, one at a time.
    """

    storage: GroupStorage
    num_queries: int
    stock_requests: list[stock.StockRequest]
    batched_rows: torch.Tensor
    tiles: tuple[Tile, ...]
    item_request: torch.Tensor
    extends: list[ExtendRequest]

    @classmethod
    def build(
        cls,
        storage: GroupStorage,
        lists: PageLists,
        starts: np.ndarray,
        lengths: np.ndarray,
        use_stock: bool,
    ) -> HostPlan:
        """Plan for requests with rows ``starts[i] : starts[i] + lengths[i]`` of q, int64 ``[R]`` each."""
        is_stock = (lists.all16 if use_stock else np.zeros(lists.kv_lens.size, dtype=bool)) & (lengths > 0)
        stock_requests = []
        if is_stock.any():
            k_blocks = v_blocks = upload(storage, lists.superblocks(storage, K))
            if not storage.group.shared:
                v_blocks = upload(storage, lists.superblocks(storage, V))
            counts = (-(-lists.kv_lens // storage.shape.page_size)).tolist()
            for i in np.flatnonzero(is_stock).tolist():
                k = k_blocks[i, : counts[i]]
                v = k if v_blocks is k_blocks else v_blocks[i, : counts[i]]
                start, n, kv_len = int(starts[i]), int(lengths[i]), int(lists.kv_lens[i])
                stock_requests.append(stock.StockRequest(start, start + n, kv_len - n, kv_len, (k, v)))
            if is_stock.all():
                nothing = upload(storage, starts[:0])
                return cls(storage, int(lengths.sum()), stock_requests, nothing, (), nothing, [])
        single = np.flatnonzero(~is_stock & (lengths == 1))
        extends = []
        for i in np.flatnonzero(~is_stock & (lengths > 1)).tolist():
            start, n = int(starts[i]), int(lengths[i])
            tiles = build_tiles(storage, lists.select(np.array([i])), one_item_tiles=True)
            extends.append(ExtendRequest(start, start + n, int(lists.kv_lens[i]) - n, tiles))
        tiles = build_tiles(storage, lists.select(single))
        return cls(
            storage=storage,
            num_queries=int(lengths.sum()),
            stock_requests=stock_requests,
            batched_rows=upload(storage, starts[single]),
            tiles=tiles,
            item_request=torch.cat([t.request for t in tiles]) if tiles else upload(storage, single[:0]),
            extends=extends,
        )

    @cached_property
    def one_item_each(self) -> bool:
        """One tile has one item of every batched request, in order: nothing to gather, nothing to merge."""
        return len(self.tiles) == 1 and torch.equal(
            self.item_request, torch.arange(self.batched_rows.numel(), device=self.item_request.device)
        )

    @property
    def all_stock(self) -> bool:
        """Stock's own call serves every request."""
        return not self.batched_rows.numel() and not self.extends

    def grown(self) -> HostPlan:
        """The plan one decode step later, of requests that all got one token more in a page they had."""
        assert self.all_stock
        grown = [
            stock.StockRequest(r.start, r.end, r.prefix_len + 1, r.kv_len + 1, r.superblocks)
            for r in self.stock_requests
        ]
        return replace(self, stock_requests=grown)


# Without what autograd books on each call, of some hundred.
@torch.inference_mode()
def run_batched(
    plan: HostPlan,
    q: torch.Tensor,
    layer: int,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Single-query requests: tiles of items of all of them, then one merge."""
    requests = plan.batched_rows.numel()
    if not requests:
        return
    storage = plan.storage
    h, d, heads = storage.shape.num_kv_heads, storage.shape.head_dim, q.shape[1]
    rows = plan.batched_rows
    every = requests == q.shape[0]  # then in order
    own = (q if every else q.index_select(0, rows)).to(torch.float32).mul(scale).view(requests, h, -1, d)
    own_low = storage.coding.queries(own, layer)
    own_center = storage.coding.center_queries(own, layer)
    parts: list[partials.Partial] = []
    for tile in plan.tiles:
        tile_q = (own if plan.one_item_each else own.index_select(0, tile.request)).flatten(0, 1)
        tile_low = tile_q
        if own_low is not own:
            tile_low = (own_low if plan.one_item_each else own_low.index_select(0, tile.request)).flatten(0, 1)
        center = own_center
        if center is not None:
            center = (center if plan.one_item_each else center.index_select(0, tile.request)).flatten(0, 1)
        queries = partials.Queries(tile_q, tile_low, center)
        parts.append(partials.attend_tile(storage, layer, tile, queries, logit_cap))
    if not parts:
        out.index_fill_(0, rows, 0.0)
        return
    if plan.one_item_each:
        peak, total, values = parts[0]
        merged = partials.Partial(peak.view(-1, heads), total.view(-1, heads), values.view(-1, heads, d))
    else:
        merged = partials.merge_items(parts, plan.item_request, requests, heads)
    result = partials.finish(merged)
    if every:
        out.copy_(result)
    else:
        out.index_copy_(0, rows, result.to(out.dtype))
    if lse is not None:
        lse.index_copy_(0, rows, partials.log_sum_exp(merged))


@torch.inference_mode()
def run_extend(
    storage: GroupStorage,
    request: ExtendRequest,
    q: torch.Tensor,
    layer: int,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """One multi-query request: query tiles against KV tiles in turn, merged as they come."""
    h, d = storage.shape.num_kv_heads, storage.shape.head_dim
    by_head = (q[request.start : request.end].to(torch.float32) * scale).view(request.end - request.start, h, -1, d)
    by_head_low = storage.coding.queries(by_head, layer)
    by_head_center = storage.coding.center_queries(by_head, layer)
    own, own_low = (x.permute(1, 2, 0, 3) for x in (by_head, by_head_low))  # [H, M, Lq, D]
    own_center = None if by_head_center is None else by_head_center.permute(1, 2, 0, 3)
    m, total = own.shape[1], own.shape[2]
    longest = max(t.pages_per_item for t in request.tiles) * storage.shape.page_size
    step = max(1, SCORE_ELEMENTS // (h * m * longest * storage.shape.groups_per_head))
    for start in range(0, total, step):
        end = min(start + step, total)
        n = end - start
        tile_q = own[:, :, start:end].reshape(h, m * n, d)
        tile_low = tile_q if by_head_low is by_head else own_low[:, :, start:end].reshape(h, m * n, d)
        center = None if own_center is None else own_center[:, :, start:end].flatten(1, 2)
        queries = partials.Queries(tile_q, tile_low, center)
        first = request.prefix_len + start
        position = torch.arange(first, first + n, dtype=torch.int32, device=q.device).repeat(m).unsqueeze(1)
        merged: partials.Partial | None = None
        for tile in request.tiles:
            if tile.first >= first + n:
                continue  # all of it is in the future of this query tile
            seen = tile.last <= first and tile.absent is None
            mask = None if seen else position
            part = partials.attend_tile(storage, layer, tile, queries, logit_cap, mask)
            merged = part if merged is None else partials.merge_two(merged, part)
        assert merged is not None, "a query sees at least itself"
        rows = slice(request.start + start, request.start + end)
        out[rows] = partials.finish(merged).view(h, m, n, d).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        if lse is not None:
            lse[rows] = partials.log_sum_exp(merged).view(h, m, n).permute(2, 0, 1).flatten(1, 2)


class _Planned:
    """Attention over a ``HostPlan``."""

    _stock_call = staticmethod(stock.decode)

    def __init__(self, use_stock: bool = True) -> None:
        self._use_stock = use_stock
        self._plan: HostPlan | None = None
        self._inputs: tuple[GroupStorage, PageLists, np.ndarray, np.ndarray] | None = None
        self._batched_plan: HostPlan | None = None

    def _set_plan(self, storage: GroupStorage, lists: PageLists, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._inputs = (storage, lists, starts, lengths)
        self._batched_plan = None
        self._plan = HostPlan.build(*self._inputs, use_stock=self._use_stock)

    def _all_batched(self) -> HostPlan:
        """The plan without stock's call, for what stock cannot do: logit caps and LSE."""
        assert self._inputs is not None
        if self._batched_plan is None:
            self._batched_plan = HostPlan.build(*self._inputs, use_stock=False)
        return self._batched_plan

    def _planned(self) -> tuple[GroupStorage, int] | None:
        return None if self._plan is None else (self._plan.storage, self._plan.num_queries)

    def _attend(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._plan is not None
        plan = self._all_batched() if logit_cap > 0.0 else self._plan
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32) if return_lse else None
        _run_coded(plan, q, layer, scale, logit_cap, out, lse)
        if plan.stock_requests:
            if lse is not None:
                # SDPA returns no LSE, so it is computed apart; the output stays stock's.
                _run_coded(self._all_batched(), q, layer, scale, logit_cap, torch.empty_like(out), lse)
            self._stock_call(plan.storage, layer, plan.stock_requests, q, out, scale)
        return out, lse


def _run_coded(
    plan: HostPlan,
    q: torch.Tensor,
    layer: int,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Every request of a plan that stock's call does not serve."""
    run_batched(plan, q, layer, scale, logit_cap, out, lse)
    for request in plan.extends:
        run_extend(plan.storage, request, q, layer, scale, logit_cap, out, lse)


class HostDecode(_Planned, DecodeAttention):
    """Decode in torch."""

    def plan_source(
        self, storage: GroupStorage, source: PageSource, kv_lens: Lengths, max_pages: int | None = None
    ) -> None:
        lens = host_lengths(kv_lens)
        req_pages = source.page_ids(int(-(-lens.max(initial=0) // storage.shape.page_size)))
        if self._grow(storage, req_pages, lens):
            return
        lists = read_page_lists(storage, req_pages, lens)
        write_columns(storage, req_pages, np.maximum(lens - 1, 0), lens)
        self._set_plan(storage, lists, np.arange(lens.size), np.ones(lens.size, dtype=np.int64))

    def _grow(self, storage: GroupStorage, req_pages: torch.Tensor, lens: np.ndarray) -> bool:
        """Makes the last plan that of the next step, where stock's call serves all and only lengths changed.

        With nothing shrunk these are P - 1 of P steps, and at small batches planning is what they would notice.
        """
        if self._plan is None or self._inputs is None or not self._plan.all_stock:
            return False
        planned, lists, starts, lengths = self._inputs
        grown = lists.grown(storage, req_pages, lens) if planned is storage else None
        if grown is None:
            return False
        self._inputs = (storage, grown, starts, lengths)
        self._batched_plan = None
        self._plan = self._plan.grown()
        return True


class HostExtend(_Planned, ExtendAttention):
    """Extend in torch."""

    _stock_call = staticmethod(stock.extend)

    def _plan_lengths(self, storage: GroupStorage, source: PageSource, prefix: np.ndarray, lens: np.ndarray) -> None:
        req_pages = source.page_ids(int(-(-lens.max(initial=0) // storage.shape.page_size)))
        lists = read_page_lists(storage, req_pages, lens)
        write_columns(storage, req_pages, prefix, lens)
        lengths = lens - prefix
        self._set_plan(storage, lists, np.cumsum(lengths) - lengths, lengths)
