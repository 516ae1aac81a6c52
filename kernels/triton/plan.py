"""Index lists of a forward: pages of each request bucketed by step, and the splits of decode.

Two passes over (request, chunk of page columns), count and scatter, so the work is parallel over
pages; a scan of at most a few hundred counts joins them. The order of positions is kept within a
step, so a partial last page is the last entry of its step, and a step's tokens are a prefix of its
pages' slots. Nothing here waits for the host and every output has a fixed address.

Where the pages of a request stand is read once, by the count pass: SGLang may rewrite a request's row
on another stream while the plan is made, and two passes that disagree would leave lists with holes.

Integers that change from step to step are not specialized on, nor is the alignment of what SGLang
hands over: one compiled kernel per configuration serves every batch.
"""

import triton
import triton.language as tl
from sglang_pmkvq.kernels.triton.entries import step_of, unit_of


@triton.jit
def request_pages(kv_lens, request, list_stride, P: tl.constexpr):
    """(tokens, pages) of a request, never more than its row of the lists holds."""
    length = tl.minimum(tl.load(kv_lens + request).to(tl.int32), list_stride * P)
    return length, tl.cdiv(length, P)


@triton.jit(
    do_not_specialize=["source_stride", "num_pages", "chunks"],
    do_not_specialize_on_alignment=["source", "rows", "kv_lens", "table"],
)
def count_kernel(
    source, rows, source_stride, column_stride, kv_lens, table, num_pages, chunks,
    page_ids, list_stride, counts, unmapped, page_columns,
    P: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """counts [R, chunks, STEPS]: pages per step in each chunk. Pages without a block are counted apart.

    page_ids [R, list_stride]: logical page of each column, -1 where there is none.
    page_columns [N + 1] or None: column of each page, the same in all requests that share it.
    """
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    _, owned = request_pages(kv_lens, request, list_stride, P)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = columns < owned
    row = request if rows is None else tl.load(rows + request)
    at = row.to(tl.int64) * source_stride + columns.to(tl.int64) * column_stride
    page = (tl.load(source + at, mask=mine, other=0) // DIVISOR).to(tl.int32)
    known = mine & (page >= 0) & (page <= num_pages)
    page = tl.where(known, page, -1)
    tl.store(page_ids + request.to(tl.int64) * list_stride + columns, page, mask=mine)
    if page_columns is not None:
        tl.store(page_columns + page, columns, mask=known)
    entry = tl.load(table + page, mask=known, other=-1)
    bad = tl.sum((mine & (entry < 0)).to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(unmapped, bad.to(tl.int64))
    step = step_of(entry)
    for s in tl.static_range(STEPS):
        n = tl.sum((mine & (step == s)).to(tl.int32), axis=0)
        tl.store(counts + (request * chunks + chunk) * STEPS + s, n)


@triton.jit(
    do_not_specialize=["table_stride", "chunks"],
    do_not_specialize_on_alignment=["kv_lens", "table"],
)
def scatter_kernel(
    page_ids, list_stride, kv_lens, table, table_stride, chunks,
    counts, pages, k_units, v_units, cols, tier_indptr, tier_tokens,
    P: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ARENAS: tl.constexpr,
):  # fmt: skip
    """Pages, units and columns to their place; the first chunk also writes a request's bounds."""
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    length, owned = request_pages(kv_lens, request, list_stride, P)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = columns < owned
    page_ids += request.to(tl.int64) * list_stride
    page = tl.load(page_ids + columns, mask=mine, other=-1)
    entry = tl.load(table + page, mask=page >= 0, other=-1)
    mapped = entry >= 0
    step = step_of(entry)

    tail_page = tl.load(page_ids + owned - 1, mask=owned > 0, other=-1)
    tail_entry = tl.load(table + tail_page, mask=tail_page >= 0, other=-1)
    tail_step = step_of(tail_entry)

    to = tl.zeros((CHUNK,), dtype=tl.int32)
    start = tl.zeros((), dtype=tl.int32)
    for s in tl.static_range(STEPS):
        all_pages = tl.zeros((), dtype=tl.int32)
        here = tl.zeros((), dtype=tl.int32)
        for c0 in range(0, chunks, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            n = tl.load(counts + (request * chunks + c) * STEPS + s, mask=c < chunks, other=0)
            all_pages += tl.sum(n, axis=0)
            here += tl.sum(tl.where(c < chunk, n, 0), axis=0)
        own = mine & (step == s)
        rank = tl.cumsum(own.to(tl.int32), axis=0) - 1
        to = tl.where(own, start + here + rank, to)
        if chunk == 0:
            tl.store(tier_indptr + request * (STEPS + 1) + s, start)
            missing = tl.where(tail_step == s, owned * P - length, 0)
            tl.store(tier_tokens + request * STEPS + s, all_pages * P - missing)
        start += all_pages
    if chunk == 0:
        tl.store(tier_indptr + request * (STEPS + 1) + STEPS, start)

    at = request.to(tl.int64) * list_stride + to
    tl.store(pages + at, tl.maximum(page, 0), mask=mine)
    tl.store(k_units + at, unit_of(entry), mask=mine)
    if ARENAS == 2:
        other = tl.load(table + table_stride + page, mask=mine & mapped, other=0)
        tl.store(v_units + at, unit_of(other), mask=mine)
    if cols is not None:
        tl.store(cols + at, columns, mask=mine)


@triton.jit
def work_of(tier_indptr, q_len, r, ok, COSTS: tl.constexpr, STEPS: tl.constexpr):
    """(cost of the pages of requests r, whether they get items); int64, bool."""
    work = tl.zeros(r.shape, dtype=tl.int64)
    for s in tl.static_range(STEPS):
        begin = tl.load(tier_indptr + r * (STEPS + 1) + s, mask=ok, other=0)
        end = tl.load(tier_indptr + r * (STEPS + 1) + s + 1, mask=ok, other=0)
        work += (end - begin).to(tl.int64) * COSTS[s]
    active = ok
    if q_len is not None:
        active = ok & (tl.load(q_len + r, mask=ok, other=0) == 1)
    return tl.where(active, work, 0), active


@triton.jit(do_not_specialize=["num_requests", "target_items"])
def schedule_kernel(
    tier_indptr, q_len, num_requests, target_items, min_work,
    split_indptr, item_request,
    COSTS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Splits per request in proportion to its work, and the request of each item. One program.

    With W = Σ work, a split takes max(⌈W/target⌉, min_work), so there are at most R + target items.
    Requests of other than one query (extend) get none; ``q_len`` None: all have one. BLOCK requests
    at a time, so that the number of requests is no part of what is compiled.
    """
    total = tl.zeros((), dtype=tl.int64)
    for r0 in range(0, num_requests, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        work, _ = work_of(tier_indptr, q_len, r, r < num_requests, COSTS, STEPS)
        total += tl.sum(work, axis=0)
    per_split = tl.maximum(tl.cdiv(total, target_items), min_work)
    items = tl.zeros((), dtype=tl.int32)
    for r0 in range(0, num_requests, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        ok = r < num_requests
        work, active = work_of(tier_indptr, q_len, r, ok, COSTS, STEPS)
        splits = tl.where(active, tl.maximum(tl.cdiv(work, per_split), 1), 0).to(tl.int32)
        begin = items + tl.cumsum(splits, axis=0) - splits
        tl.store(split_indptr + r, begin, mask=ok)
        for i in range(tl.max(splits, axis=0)):
            tl.store(item_request + begin + i, r, mask=i < splits)
        items += tl.sum(splits, axis=0)
    tl.store(split_indptr + num_requests, items)


@triton.jit
def share(x, before, cost: tl.constexpr, count, ALIGN: tl.constexpr):
    """Pages of a step (of ``count``, ``cost`` each) that lie before position x of a request's work.

    Neighbouring splits ask with the same x, so their ranges meet. Multiples of ALIGN pages, so that
    only the last tile of a step is partial.
    """
    return tl.minimum(tl.cdiv(tl.maximum(x - before, 0), cost * ALIGN) * ALIGN, count)


@triton.jit(do_not_specialize=["num_requests"])
def ranges_kernel(
    tier_indptr, tier_tokens, split_indptr, item_request, num_requests, item_first, item_tokens,
    COSTS: tl.constexpr, STEPS: tl.constexpr, ALIGN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """First list entry and tokens of each item in each step; one program per item.

    Here and not in decode, which would do it again per layer and head and keep it in registers.
    """
    item = tl.program_id(0)
    if item >= tl.load(split_indptr + num_requests):
        return
    request = tl.load(item_request + item)
    first_item = tl.load(split_indptr + request)
    splits = tl.load(split_indptr + request + 1) - first_item
    indptr = tier_indptr + request * (STEPS + 1)
    work = tl.load(indptr) * 0
    for step in tl.static_range(STEPS):
        work += (tl.load(indptr + step + 1) - tl.load(indptr + step)) * COSTS[step]
    per_split = tl.cdiv(work, splits)
    low = (item - first_item) * per_split
    high = low + per_split
    before = work * 0
    for step in tl.static_range(STEPS):
        start = tl.load(indptr + step)
        count = tl.load(indptr + step + 1) - start
        first = share(low, before, COSTS[step], count, ALIGN)
        last = share(high, before, COSTS[step], count, ALIGN)
        before += count * COSTS[step]
        tokens = tl.minimum(last * P, tl.load(tier_tokens + request * STEPS + step)) - first * P
        tl.store(item_first + item * STEPS + step, start + first)
        tl.store(item_tokens + item * STEPS + step, tokens)
