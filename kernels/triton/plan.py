"""Index lists of a forward: pages of each request bucketed by step, and the splits of decode.

Two passes over (request, chunk of page columns), count and scatter, so the work is parallel over
pages; a scan of at most a few hundred counts joins them. The order of positions is kept within a
step, so a partial last page is the last entry of its step, and a step's tokens are a prefix of its
pages' slots. Nothing here waits for the host and every output has a fixed address.
"""

import triton
import triton.language as tl


@triton.jit
def read_entries(
    source, rows, source_stride, column_stride, request, table, columns, mine, num_pages, DIVISOR: tl.constexpr
):  # fmt: skip
    """Logical pages of a request at columns, and their table entries of arena 0 (−1: none)."""
    row = request if rows is None else tl.load(rows + request)
    at = row.to(tl.int64) * source_stride + columns.to(tl.int64) * column_stride
    page = (tl.load(source + at, mask=mine, other=0) // DIVISOR).to(tl.int32)
    known = mine & (page >= 0) & (page <= num_pages)
    page = tl.where(known, page, 0)
    entry = tl.load(table + page, mask=known, other=-1)
    return page, entry


@triton.jit
def count_kernel(
    source, rows, source_stride, column_stride, kv_lens, table, num_pages, chunks,
    counts, unmapped,
    P: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """counts [R, chunks, STEPS]: pages per step in each chunk. Unmapped pages are counted apart."""
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    length = tl.load(kv_lens + request).to(tl.int32)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = columns < tl.cdiv(length, P)
    page, entry = read_entries(
        source, rows, source_stride, column_stride, request, table, columns, mine, num_pages, DIVISOR
    )  # fmt: skip
    bad = tl.sum((mine & (entry < 0)).to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(unmapped, bad)
    step = tl.where(entry < 0, 0, entry & 3)
    for s in tl.static_range(STEPS):
        n = tl.sum((mine & (step == s)).to(tl.int32), axis=0)
        tl.store(counts + (request * chunks + chunk) * STEPS + s, n)


@triton.jit
def scatter_kernel(
    source, rows, source_stride, column_stride, kv_lens, table, table_stride, num_pages, chunks,
    counts, pages, k_units, v_units, cols, list_stride, tier_indptr, tier_tokens,
    P: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ARENAS: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """Pages, units and columns to their place; the first chunk also writes a request's bounds."""
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    length = tl.load(kv_lens + request).to(tl.int32)
    owned = tl.cdiv(length, P)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = columns < owned
    page, entry = read_entries(
        source, rows, source_stride, column_stride, request, table, columns, mine, num_pages, DIVISOR
    )  # fmt: skip
    mapped = entry >= 0
    step = tl.where(mapped, entry & 3, 0)

    tail_column = tl.maximum(owned - 1, 0)
    _, tail_entry = read_entries(
        source, rows, source_stride, column_stride, request, table, tail_column, length > 0, num_pages, DIVISOR
    )  # fmt: skip
    tail_step = tl.where(tail_entry < 0, 0, tail_entry & 3)

    c = tl.arange(0, CHUNKS)
    to = tl.zeros((CHUNK,), dtype=tl.int32)
    start = tl.zeros((), dtype=tl.int32)
    for s in tl.static_range(STEPS):
        n = tl.load(counts + (request * chunks + c) * STEPS + s, mask=c < chunks, other=0)
        all_pages = tl.sum(n, axis=0)
        here = tl.sum(tl.where(c < chunk, n, 0), axis=0)
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
    tl.store(pages + at, page, mask=mine)
    tl.store(k_units + at, tl.where(mapped, entry >> 2, 0), mask=mine)
    if ARENAS == 2:
        other = tl.load(table + table_stride + page, mask=mine & mapped, other=0)
        tl.store(v_units + at, tl.where(other < 0, 0, other >> 2), mask=mine)
    if cols is not None:
        tl.store(cols + at, columns, mask=mine)


@triton.jit
def schedule_kernel(
    tier_indptr, q_len, num_requests, target_items, min_work,
    split_indptr, item_request,
    COSTS: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Splits per request in proportion to its work, and the request of each item. One program.

    With W = Σ work, a split takes max(⌈W/target⌉, min_work), so there are at most R + target items.
    Requests of other than one query (extend) get none; ``q_len`` None: all have one.
    """
    r = tl.arange(0, R)
    ok = r < num_requests
    work = tl.zeros((R,), dtype=tl.int64)
    for s in tl.static_range(STEPS):
        begin = tl.load(tier_indptr + r * (STEPS + 1) + s, mask=ok, other=0)
        end = tl.load(tier_indptr + r * (STEPS + 1) + s + 1, mask=ok, other=0)
        work += (end - begin).to(tl.int64) * COSTS[s]
    active = ok
    if q_len is not None:
        active = ok & (tl.load(q_len + r, mask=ok, other=0) == 1)
    work = tl.where(active, work, 0)
    per_split = tl.maximum(tl.cdiv(tl.sum(work, axis=0), target_items), min_work)
    splits = tl.where(active, tl.maximum(tl.cdiv(work, per_split), 1), 0).to(tl.int32)
    end = tl.cumsum(splits, axis=0)
    begin = end - splits
    tl.store(split_indptr + r, begin, mask=ok)
    tl.store(split_indptr + num_requests, tl.sum(splits, axis=0))
    most = tl.max(splits, axis=0)
    for i in range(most):
        tl.store(item_request + begin + i, r, mask=i < splits)


@triton.jit
def share(x, before, cost: tl.constexpr, count, ALIGN: tl.constexpr):
    """Pages of a step (of ``count``, ``cost`` each) that lie before position x of a request's work.

    Neighbouring splits ask with the same x, so their ranges meet. Multiples of ALIGN pages, so that
    only the last tile of a step is partial.
    """
    return tl.minimum(tl.cdiv(tl.maximum(x - before, 0), cost * ALIGN) * ALIGN, count)


@triton.jit
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
