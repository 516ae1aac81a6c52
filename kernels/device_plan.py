"""Index lists and split schedule of a forward, built on the device at fixed addresses.

A step's cost is known from its tiers, so the splits of decode are balanced by bytes, not by pages.
Everything is per layer group; see ``kernels/triton/plan.py`` for what the kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.launch import Launch
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.triton import plan as kernels

CHUNK_PAGES = 256
# A page costs its bits per K and V element plus what its (zero, range) and index loads cost.
COST_OVERHEAD = 4
# Requests and chunks that the plan's scans take at a time; constants, so that no batch compiles anew.
REQUEST_BLOCK = 256
CHUNK_BLOCK = 32
# Rows of the lists are multiples of this many entries, so that Triton always finds their stride divisible.
LIST_ALIGN = 16
# Multiprocessors assumed on the CPU, where kernels run in the interpreter.
DEFAULT_SMS = 8
# A split shorter than this many 16-bit tokens costs more to merge than it gains.
MIN_SPLIT_TOKENS = 128


def step_costs(storage: GroupStorage) -> tuple[int, ...]:
    """Cost of a page per step, in arbitrary units proportional to the time to read it."""
    return tuple((k + v + COST_OVERHEAD) * (storage.shape.page_size // 16) for k, v in storage.group.steps)


def token_tile(storage: GroupStorage) -> int:
    """Tokens that a program reads per iteration: what fits the registers without spilling in decode."""
    s = storage.shape
    return 64 if s.head_dim <= 128 and s.groups_per_head == 1 else 32


def programs_per_sm(steps: tuple[tuple[int, int], ...], head_dim: int) -> int:
    """Decode programs that a multiprocessor holds at once: what 65,536 registers are enough for.

    Loops over quantized pages take up to 255 registers in each of 128 threads, which leaves room for
    two; a group that never leaves 16 bits takes 120, at head_dim 256 up to 160. More splits than fit
    would run in a second wave and only add partials to merge.
    """
    if len(steps) > 1:
        return 2
    return 4 if head_dim <= 128 else 3


def target_items(storage: GroupStorage) -> int:
    """Splits per KV head that fill the device once, over all requests."""
    sms = DEFAULT_SMS
    if storage.device.type == "cuda":
        sms = torch.cuda.get_device_properties(storage.device).multi_processor_count
    return max(1, -(-sms * programs_per_sm(storage.group.steps, storage.shape.head_dim) // storage.shape.num_kv_heads))


@dataclass(frozen=True)
class PlanBuffers:
    """Device buffers of a plan; int32. They are never reallocated, so a CUDA graph may hold them.

    Attributes:
        max_requests, max_pages: what they were sized for; max_pages is a multiple of 16.
        counts: scratch of the count pass.
        page_ids: ``[max_requests, max_pages]``, logical page of each column as the count pass read it,
            −1 where there is none.
        pages, k_units, v_units: ``[max_requests, max_pages]``, a request's pages bucketed by step, in
            order of position within a step: logical page, first unit of its K and of its V block
            (``v_units`` is ``k_units`` where a group's sides share ids).
        cols: ``[max_requests, max_pages]`` page index within the sequence, or None (decode).
        tier_indptr: ``[max_requests, steps + 1]``, bounds of the steps in a request's lists.
        tier_tokens: ``[max_requests, steps]``, tokens per step, a partial last page counted as it is.
        split_indptr: ``[max_requests + 1]``, items of each request.
        item_request: ``[max_requests + target]``, request of each item.
        item_first, item_tokens: ``[max_requests + target, steps]``, where an item's share of a step
            starts in the lists, and how many tokens it is.
        target: items that the schedule aims at over all requests.
    """

    storage: GroupStorage
    max_requests: int
    max_pages: int
    target: int
    counts: torch.Tensor
    page_ids: torch.Tensor
    pages: torch.Tensor
    k_units: torch.Tensor
    v_units: torch.Tensor
    cols: torch.Tensor | None
    tier_indptr: torch.Tensor
    tier_tokens: torch.Tensor
    split_indptr: torch.Tensor
    item_request: torch.Tensor
    item_first: torch.Tensor
    item_tokens: torch.Tensor

    @classmethod
    def allocate(
        cls, storage: GroupStorage, max_requests: int, max_pages: int, columns: bool, target: int | None = None
    ) -> PlanBuffers:
        """Buffers for up to ``max_requests`` requests of ``max_pages`` pages each, or a few more."""
        max_pages = -(-max_pages // LIST_ALIGN) * LIST_ALIGN
        target = target_items(storage) if target is None else target
        steps = len(storage.group.steps)

        def empty(*dims: int) -> torch.Tensor:
            return torch.zeros(dims, dtype=torch.int32, device=storage.device)

        lists = (max_requests, max_pages)
        k_units = empty(*lists)
        return cls(
            storage=storage,
            max_requests=max_requests,
            max_pages=max_pages,
            target=target,
            counts=empty(max_requests, -(-max_pages // CHUNK_PAGES), steps),
            page_ids=empty(*lists),
            pages=empty(*lists),
            k_units=k_units,
            v_units=k_units if storage.group.shared else empty(*lists),
            cols=empty(*lists) if columns else None,
            tier_indptr=empty(max_requests, steps + 1),
            tier_tokens=empty(max_requests, steps),
            split_indptr=empty(max_requests + 1),
            item_request=empty(max_requests + target),
            item_first=empty(max_requests + target, steps),
            item_tokens=empty(max_requests + target, steps),
        )

    def fits(self, storage: GroupStorage, requests: int, pages: int, columns: bool) -> bool:
        return (
            storage is self.storage
            and requests <= self.max_requests
            and pages <= self.max_pages
            and (self.cols is not None or not columns)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of workspace; not part of the pool's budget."""
        own = [self.counts, self.page_ids, self.pages, self.k_units, self.tier_indptr, self.tier_tokens]
        own += [self.split_indptr, self.item_request, self.item_first, self.item_tokens]
        own += [t for t in (self.cols, None if self.v_units is self.k_units else self.v_units) if t is not None]
        return sum(t.nbytes for t in own)


def plan_launches(
    buffers: PlanBuffers,
    source: PageSource,
    kv_lens: torch.Tensor,
    q_len: torch.Tensor | None = None,
    max_pages: int | None = None,
) -> tuple[Launch, ...]:
    """Launches that fill the buffers for R requests.

    Args:
        kv_lens: integer ``[R]`` tokens, on the device.
        q_len: int32 ``[R]`` queries; only requests of one query get decode items. None: all do.
        max_pages: bound on the pages of any of these requests if the host knows one.
    """
    storage = buffers.storage
    kv_lens = kv_lens.contiguous()
    requests = kv_lens.numel()
    steps, costs = len(storage.group.steps), step_costs(storage)
    pages = min(source.max_pages, buffers.max_pages if max_pages is None else max_pages)
    chunks = max(1, -(-pages // CHUNK_PAGES))
    shared = {
        "page_ids": buffers.page_ids,
        "list_stride": buffers.max_pages,
        "kv_lens": kv_lens,
        "table": storage.table,
        "chunks": chunks,
        "counts": buffers.counts,
        "P": storage.shape.page_size,
        "STEPS": steps,
        "CHUNK": CHUNK_PAGES,
    }
    count = Launch(
        kernels.count_kernel,
        (requests, chunks),
        {
            **shared,
            "source": source.values,
            "rows": None if source.rows is None else source.rows.contiguous(),
            "source_stride": source.values.stride(0),
            "column_stride": source.column_stride * source.values.stride(1),
            "num_pages": storage.num_pages,
            "unmapped": storage.unmapped_reads,
            "page_columns": storage.page_columns,
            "DIVISOR": source.divisor,
        },
        num_warps=2,
    )
    scatter = Launch(
        kernels.scatter_kernel,
        (requests, chunks),
        {
            **shared,
            "table_stride": storage.table.stride(0),
            "pages": buffers.pages,
            "k_units": buffers.k_units,
            "v_units": buffers.v_units,
            "cols": buffers.cols,
            "tier_indptr": buffers.tier_indptr,
            "tier_tokens": buffers.tier_tokens,
            "BLOCK": CHUNK_BLOCK,
            "ARENAS": len(storage.group.arena_sides),
        },
        num_warps=2,
    )
    schedule = Launch(
        kernels.schedule_kernel,
        (1,),
        {
            "tier_indptr": buffers.tier_indptr,
            "q_len": q_len,
            "num_requests": requests,
            "target_items": buffers.target,
            "min_work": MIN_SPLIT_TOKENS // 16 * (32 + COST_OVERHEAD),
            "split_indptr": buffers.split_indptr,
            "item_request": buffers.item_request,
            "COSTS": costs,
            "STEPS": steps,
            "BLOCK": REQUEST_BLOCK,
        },
    )
    tile_pages = max(1, token_tile(storage) // storage.shape.page_size)
    ranges = Launch(
        kernels.ranges_kernel,
        (requests + buffers.target,),
        {
            "tier_indptr": buffers.tier_indptr,
            "tier_tokens": buffers.tier_tokens,
            "split_indptr": buffers.split_indptr,
            "item_request": buffers.item_request,
            "num_requests": requests,
            "item_first": buffers.item_first,
            "item_tokens": buffers.item_tokens,
            "COSTS": costs,
            "STEPS": steps,
            "ALIGN": tile_pages,
            "P": storage.shape.page_size,
        },
        num_warps=1,
    )
    return count, scatter, schedule, ranges
