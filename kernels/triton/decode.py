"""Split-KV decode over all steps in one launch, and the merge of its partials."""

import triton
import triton.language as tl
from sglang_pmkvq.kernels.triton.attend import LN2, attend_step
from sglang_pmkvq.kernels.triton.rotation import first_coded, rotated, rotation_factor


@triton.jit
def tokens_of(item_tokens, FIRST: tl.constexpr, STEPS: tl.constexpr):
    """Tokens of an item in steps FIRST and after; an item may have a negative number in a step, which is none."""
    count = tl.zeros((), dtype=tl.int32)
    for step in tl.static_range(FIRST, STEPS):
        count += tl.maximum(tl.load(item_tokens + step), 0)
    return count


@triton.jit(do_not_specialize=["num_requests"], do_not_specialize_on_alignment=["key_clip"])
def decode_kernel(
    q, q_stride_t, q_stride_h, q_low,  # q_low: queries that read codes, laid out as q, or None
    part_out, part_lse,  # fp32 [items, Hq, D], [items, Hq] natural log
    k16, v16, k_codes, v_codes, k_meta, v_meta, key_clip,
    center, center_stride, center_places, rotary, rotary_stride, rotary_channels, page_columns,
    pages, k_units, v_units, list_stride,
    split_indptr, item_request, item_first, item_tokens, q_row,
    num_requests, sm_scale, logit_cap,
    K_TIERS: tl.constexpr, V_TIERS: tl.constexpr, STEPS: tl.constexpr,
    H: tl.constexpr, GQA: tl.constexpr, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, MANTISSA: tl.constexpr, ASM: tl.constexpr,
    CENTER_BLOCKS: tl.constexpr, TURN_VALUES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One program per KV head and item; an item is one split of one request. M ≥ GQA rows, padded."""
    head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(split_indptr + num_requests):
        return
    request = tl.load(item_request + item)
    list_base = request * list_stride
    row = tl.arange(0, M)
    row_ok = row < GQA
    first_row = tl.load(q_row + request).to(tl.int64) * q_stride_t + head * GQA * q_stride_h
    q += first_row
    if q_low is not None:
        q_low += first_row
    q_offset = row * q_stride_h
    peak = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M, N), dtype=tl.float32)
    acc = tl.zeros((M, D), dtype=tl.float32)
    # Sums of codes of rotated values are rotated themselves; so is, from there on, what was summed before.
    FIRST: tl.constexpr = first_coded(V_TIERS)
    for step in tl.static_range(STEPS):
        n_valid = tl.load(item_tokens + item * STEPS + step)
        if TURN_VALUES and step == FIRST:  # noqa: SIM102 - the compiler decides this one, the program the next
            if tokens_of(item_tokens + item * STEPS, FIRST, STEPS) > 0:
                acc = rotated(acc, M, D, rotation_factor(D, 0))
        if n_valid > 0:
            peak, total, acc = attend_step(
                (peak, total, acc), q, q_low, q_offset, row_ok, None, key_clip,
                center, center_stride, center_places, rotary, rotary_stride, rotary_channels, page_columns,
                k16, v16, k_codes, v_codes, k_meta, v_meta,
                pages + list_base, k_units + list_base, v_units + list_base, None,
                tl.load(item_first + item * STEPS + step), n_valid, head, sm_scale, logit_cap,
                K_TIERS[step], V_TIERS[step], H, D, G, P, M, N, DOT, MANTISSA, ASM, CENTER_BLOCKS, False, CAP, True,
            )  # fmt: skip

    if TURN_VALUES:  # noqa: SIM102
        # Asked again: nothing has to be kept in a register meanwhile.
        if tokens_of(item_tokens + item * STEPS, FIRST, STEPS) > 0:
            acc = rotated(acc, M, D, rotation_factor(D, 1))
    weight = tl.sum(total, axis=1)
    # Rows that saw nothing keep 0 and −inf.
    out = acc / tl.where(peak == float("-inf"), 1.0, weight)[:, None]
    lse = (peak + tl.log2(weight)) * LN2
    at = item.to(tl.int64) * (H * GQA) + head * GQA + row
    tl.store(part_out + at[:, None] * D + tl.arange(0, D)[None, :], out, mask=row_ok[:, None])
    tl.store(part_lse + at, lse, mask=row_ok)


@triton.jit
def merge_kernel(
    part_out, part_lse, split_indptr, q_row, out, lse,
    out_stride_t, out_stride_h,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partials of one request and query head by log-sum-exp. A request without items is left alone.

    BLOCK partials at a time: a single request may have as many as there are programs to fill the chip.
    """
    request = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(split_indptr + request)
    last = tl.load(split_indptr + request + 1)
    column = tl.arange(0, D)
    peak = tl.full((), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((), dtype=tl.float32)
    acc = tl.zeros((D,), dtype=tl.float32)
    for i in range(first, last, BLOCK):
        item = i + tl.arange(0, BLOCK)
        ok = item < last
        at = item * HQ + head
        part = tl.load(part_lse + at, mask=ok, other=float("-inf"))
        x = tl.load(part_out + at[:, None] * D + column[None, :], mask=ok[:, None], other=0.0)
        # A maximum must not lose a NaN: the sum of the scales carries it.
        new = tl.maximum(peak, tl.max(part, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)
        scale = tl.exp(part - base)
        old_scale = tl.exp(peak - base)
        acc = acc * old_scale + tl.sum(x * scale[:, None], axis=0)
        weight = weight * old_scale + tl.sum(scale, axis=0)
        peak = new
    if last > first:
        row = tl.load(q_row + request).to(tl.int64)
        result = acc / tl.where(peak == float("-inf"), 1.0, weight)
        tl.store(out + row * out_stride_t + head * out_stride_h + column, result.to(out.dtype.element_ty))
        if lse is not None:
            tl.store(lse + row * HQ + head, peak + tl.log(weight))
