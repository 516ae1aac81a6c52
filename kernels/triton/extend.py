"""Causal attention of chunks of queries over tiered pages, prefix and chunk alike, in one launch."""

import triton
import triton.language as tl
from sglang_pmkvq.kernels.triton.attend import LN2, attend_step
from sglang_pmkvq.kernels.triton.rotation import first_coded, rotated, rotation_factor


@triton.jit
def visible_pages(cols, count, last_page, BLOCK: tl.constexpr):
    """Entries of an ascending list of page columns that are at most ``last_page``."""
    seen = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        col = tl.load(cols + at, mask=at < count, other=2147483647)
        seen += (col <= last_page).to(tl.int32)
    return tl.sum(seen, axis=0)


@triton.jit(do_not_specialize_on_alignment=["key_clip"])
def extend_kernel(
    q, q_stride_t, q_stride_h, q_low,  # q_low: queries that read codes, laid out as q, or None
    out, out_stride_t, out_stride_h, lse,
    k16, v16, k_codes, v_codes, k_meta, v_meta, key_clip,
    center, center_stride, center_places, rotary, rotary_stride, rotary_channels, page_columns,
    pages, k_units, v_units, cols, list_stride,
    tier_indptr, tier_tokens, tile_request, tile_first, q_row, q_len, kv_lens,
    sm_scale, logit_cap,
    K_TIERS: tl.constexpr, V_TIERS: tl.constexpr, STEPS: tl.constexpr,
    H: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROWS_PER_QUERY: tl.constexpr,
    DOT: tl.constexpr, MANTISSA: tl.constexpr, ASM: tl.constexpr,
    CENTER_BLOCKS: tl.constexpr, TURN_VALUES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One program per KV head and query tile: M // ROWS_PER_QUERY queries of one request."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    request = tl.load(tile_request + tile)
    first_query = tl.load(tile_first + tile)
    queries = tl.load(q_len + request)
    prefix = tl.load(kv_lens + request).to(tl.int32) - queries

    row = tl.arange(0, M)
    query = first_query + row // ROWS_PER_QUERY
    member = row % ROWS_PER_QUERY
    row_ok = (query < queries) & (member < GQA)
    q_pos = prefix + query
    first_token = (tl.load(q_row + request) + first_query).to(tl.int64)
    first_row = first_token * q_stride_t + head * GQA * q_stride_h
    q += first_row
    if q_low is not None:
        q_low += first_row
    q_offset = row // ROWS_PER_QUERY * q_stride_t + member * q_stride_h
    last_position = prefix + tl.minimum(first_query + M // ROWS_PER_QUERY, queries) - 1

    indptr = tier_indptr + request * (STEPS + 1)
    list_base = request * list_stride
    peak = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    acc = tl.zeros((M, D), dtype=tl.float32)
    # Sums of codes of rotated values are rotated themselves; so is, from there on, what was summed before.
    FIRST: tl.constexpr = first_coded(V_TIERS)
    for step in tl.static_range(STEPS):
        start = tl.load(indptr + step)
        if TURN_VALUES and step == FIRST:
            coded = tl.load(indptr + STEPS) - start
            if coded > 0:
                acc = rotated(acc, M, D, rotation_factor(D, 0))
        count = tl.load(indptr + step + 1) - start
        # Within a step the list is in order of position, so what the tile can see is a first part.
        seen = visible_pages(cols + list_base + start, count, last_position // P, 256)
        n_valid = tl.minimum(seen * P, tl.load(tier_tokens + request * STEPS + step))
        if n_valid > 0:
            peak, total, acc = attend_step(
                (peak, total, acc), q, q_low, q_offset, row_ok, q_pos, key_clip,
                center, center_stride, center_places, rotary, rotary_stride, rotary_channels, page_columns,
                k16, v16, k_codes, v_codes, k_meta, v_meta,
                pages + list_base, k_units + list_base, v_units + list_base, cols + list_base,
                start, n_valid, head, sm_scale, logit_cap,
                K_TIERS[step], V_TIERS[step], H, D, G, P, M, N, DOT, MANTISSA, ASM, CENTER_BLOCKS, True, CAP, False,
            )  # fmt: skip

    if TURN_VALUES:  # noqa: SIM102 - the compiler decides this one, the program the next
        if coded > 0:
            acc = rotated(acc, M, D, rotation_factor(D, 1))
    result = acc / tl.where(peak == float("-inf"), 1.0, total)[:, None]
    out += first_token * out_stride_t + head * GQA * out_stride_h
    at = row // ROWS_PER_QUERY * out_stride_t + member * out_stride_h
    tl.store(
        out + at[:, None] + tl.arange(0, D)[None, :], result.to(out.dtype.element_ty), mask=row_ok[:, None]
    )
    if lse is not None:
        at = row // ROWS_PER_QUERY * (H * GQA) + member
        tl.store(lse + first_token * (H * GQA) + head * GQA + at, (peak + tl.log2(total)) * LN2, mask=row_ok)
