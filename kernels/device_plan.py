"""Index lists and split schedule of a forward, built on the device at fixed addresses.

A step's cost is known from its tiers, so the splits of decode are balanced by bytes, not by pages.
Everything is per layer group; see ``kernels/triton/plan.py`` for what the kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_pmkvq.kernels.launch import Launch, next_power_of_two
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.triton import plan as kernels

CHUNK_PAGES = 256
# A page costs its bits per K and V element plus what its (zero, range) and index loads cost.
COST_OVERHEAD = 4
# Programs that decode aims at, per multiprocessor: enough to hide latency, few enough to merge.
PROGRAMS_PER_SM = 4
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


def target_items(storage: GroupStorage) -> int:
    """Splits per KV head that fill the device, over all requests."""
    sms = DEFAULT_SMS
    if storage.device.type == "cuda":
        sms = torch.cuda.get_device_properties(storage.device).multi_processor_count
    return max(1, -(-sms * PROGRAMS_PER_SM // storage.shape.num_kv_heads))


@dataclass(frozen=True)
class PageSource:
    """Where the logical pages of requests stand.

    Attributes:
        values: integer ``[rows, n]``; ``values[row, column * column_stride] // divisor`` is the page.
        rows: integer ``[R]`` row of each request, or None: request r has row r.
        column_stride, divisor: 1 and 1 for page ids; P and P for SGLang's token slots per position.
    """

    values: torch.Tensor
    rows: torch.Tensor | None = None
    column_stride: int = 1
    divisor: int = 1

    @property
    def max_pages(self) -> int:
        return -(-self.values.shape[1] // self.column_stride)


@dataclass(frozen=True)
class PlanBuffers:
    """Device buffers of a plan; int32. They are never reallocated, so a CUDA graph may hold them.

    Attributes:
        max_requests, max_pages: what they were sized for.
        counts: scratch of the count pass.
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
        unmapped: ``[1]``, pages without a block met since the start; they read block 0. Looking at it
            waits for the device.
    """

    storage: GroupStorage
    max_requests: int
    max_pages: int
    target: int
    counts: torch.Tensor
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
    unmapped: torch.Tensor

    @classmethod
    def allocate(
        cls, storage: GroupStorage, max_requests: int, max_pages: int, columns: bool, target: int | None = None
    ) -> PlanBuffers:
        """Buffers for up to ``max_requests`` requests of ``max_pages`` pages each."""
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
            unmapped=empty(1),
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
        own = [self.counts, self.pages, self.k_units, self.tier_indptr, self.tier_tokens, self.split_indptr]
        own += [self.item_request, self.item_first, self.item_tokens]
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
        "source": source.values,
        "rows": None if source.rows is None else source.rows.contiguous(),
        "source_stride": source.values.stride(0),
        "column_stride": source.column_stride * source.values.stride(1),
        "kv_lens": kv_lens,
        "table": storage.table,
        "num_pages": storage.num_pages,
        "chunks": chunks,
        "counts": buffers.counts,
        "P": storage.shape.page_size,
        "STEPS": steps,
        "CHUNK": CHUNK_PAGES,
        "DIVISOR": source.divisor,
    }
    count = Launch(kernels.count_kernel, (requests, chunks), {**shared, "unmapped": buffers.unmapped}, num_warps=2)
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
            "list_stride": buffers.max_pages,
            "tier_indptr": buffers.tier_indptr,
            "tier_tokens": buffers.tier_tokens,
            "CHUNKS": next_power_of_two(buffers.counts.shape[1]),
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
            "R": next_power_of_two(buffers.max_requests),
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
