"""Attention of query rows over a run of pages of one step: the loop that decode and extend share.

With q̃ = the query as it reads codes (``coding.queries``), rounded to the dot dtype, and per group γ of G channels:

    S[t] = Σ_γ (scale[t,γ] · (q̃_γ · codes_γ[t]) + zero[t,γ] · Σ_{d∈γ} q̃_d)
    O_γ  = Σ_t (p[t] · scale[t,γ]) · codes_γ[t] + Σ_t p[t] · zero[t,γ]

Where keys are centred q·R_m c is added to S, a dot product with the rotary table (``center_queries``). Where values
are rotated so are O and what was summed before; the caller turns it back.

The sum of q̃ uses the same rounded values, else the zero term does not cancel. scale = range/(2^b−1);
constants are kept out of the rounded operands: p·range is rounded, not p·scale, so that small weights
stay clear of fp16's subnormals, and the codes are centred (c − c0, with c0·scale moved to the zero
term) so that this rounding acts on ±range/2. Where 2-bit keys are clipped, range and zero are first
narrowed to the share of the range that codes span. Softmax runs in base 2; sums are fp32.

Loads are never masked by column, and by row only where stale bytes could be read as floats: block 0
and page 0 stand in for absent rows.
"""

import triton
import triton.language as tl
from sglang_pmkvq.kernels.triton.codes import code_bias, code_step, widen, zero_and_range
from sglang_pmkvq.kernels.triton.rotation import ROTARY_COLUMNS, ROTARY_PAIRS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def chunk_width(bits, head_dim, group):
    """Bytes of a row that one dot takes: a plane is head_dim·bits/8 wide, cut where a group ends."""
    return min(head_dim * bits // 8, group)


@triton.jit
def cat2(a, b):
    """Columns of a, then of b."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def concat(parts, N: tl.constexpr, FIRST: tl.constexpr = 0):
    """One tensor from N = 2^i column blocks, counted from FIRST."""
    if N == 1:
        return parts[FIRST]
    else:
        return cat2(concat(parts, N // 2, FIRST), concat(parts, N // 2, FIRST + N // 2))


@triton.jit
def halves(x):
    """The first and the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def column_blocks(x, N: tl.constexpr):
    """Inverse of ``concat``."""
    if N == 1:
        return (x,)
    elif N == 2:
        a, b = halves(x)
        return (a, b)
    else:
        a, b = halves(x)
        return column_blocks(a, N // 2) + column_blocks(b, N // 2)


@triton.jit
def fold(x, DEFER: tl.constexpr):
    """A row sum now, or (DEFER) the summands, to be added up elementwise and summed after the loop.

    Decode spreads the warps over the tokens, so a row sum per iteration would go through shared
    memory; extend spreads them over the rows.
    """
    if DEFER:
        return x
    else:
        return tl.sum(x, axis=1)


@triton.jit
def rescale(x, alpha, DEFER: tl.constexpr):
    if DEFER:
        return x * alpha[:, None]
    else:
        return x * alpha


@triton.jit
def load_query(q, q_offset, row_ok, first, N: tl.constexpr, DOT: tl.constexpr):
    """Columns ``first .. first + N`` of the query rows in DOT."""
    column = first + tl.arange(0, N)
    return tl.load(q + (q_offset[:, None] + column[None, :]), mask=row_ok[:, None], other=0.0).to(DOT)


@triton.jit
def load_pairs(meta, page, head, t, H: tl.constexpr, NG: tl.constexpr, P: tl.constexpr, g: tl.constexpr, valid, clip):
    """(zero, range) of group g of tokens; 0 for tokens that are not there, whose bytes are stale.

    ``clip`` is None or the clip factor: the middle share of the range that the codes span (2 bits).
    """
    at = (page.to(tl.int64) * H + head) * (NG * P) + g * P + t
    zero, span = zero_and_range(tl.load(meta + at, mask=valid, other=0))
    if clip is not None:
        zero += span * (0.5 - 0.5 * clip)
        span *= clip
    return zero, span


@triton.constexpr_function
def center_step(mantissa):
    """What q·c is divided by to become a dot operand: sums of some thousand must stay below fp16's 65504."""
    return 1.0 if mantissa == 7 else 64.0


@triton.jit
def center_queries(
    q, q_offset, row_ok, head, center, plane_stride, place, channels,
    D: tl.constexpr, DOT: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    """What the table's rows of a block are multiplied by: q₁c₁ + q₂c₂ of 8 pairs, q₂c₁ − q₁c₂ of 8; high, low part.

    Products of 16-bit queries and centres are exact in fp32, so each sum rounds once. It may be of several thousand
    while softmax looks at differences of less than one. With a pair of |c| = 350 and queries of 8 per channel, D = 128,
    one rounding to bf16 moves logits by up to 2.8, to fp16 by 0.18, all tokens of a slow pair alike, so that codes are
    off against 16-bit pages, which have no such term. High and low part leave 0.003 and 2e-5, for one more dot of depth
    16 (``tests/test_kernels_rounding.py``).
    """
    column = tl.arange(0, ROTARY_COLUMNS)
    at = channels + place * ROTARY_COLUMNS + column % ROTARY_PAIRS
    factors = center + (column // ROTARY_PAIRS) * plane_stride + head * D
    x = tl.zeros((q_offset.shape[0], ROTARY_COLUMNS), dtype=tl.float32)
    for i in tl.static_range(2):
        channel = tl.load(at + i * ROTARY_PAIRS)
        part = tl.load(q + (q_offset[:, None] + channel[None, :]), mask=row_ok[:, None], other=0.0).to(tl.float32)
        x += part * tl.load(factors + channel)[None, :]
    x *= 1.0 / center_step(MANTISSA)
    high = x.to(DOT)
    return high, (x - high.to(tl.float32)).to(DOT)


@triton.jit
def attend_step(
    state,  # maximum [M], sum [M] or [M, N] (DEFER), acc [M, D]
    q, q_low,  # bases; the second of queries as they read quantized keys, None if they are the same
    q_offset, row_ok, q_pos,  # elements [M] in both, bool [M], positions [M] (CAUSAL)
    key_clip,  # fp32 [H] of this layer, or None
    center, center_stride, center_places, rotary, rotary_stride, rotary_channels, page_columns,  # if CENTER_BLOCKS
    k16, v16, k_codes, v_codes, k_meta, v_meta,  # bases of the layer
    pages, k_units, v_units, cols,  # bases of the request's lists
    first, n_valid,  # first list entry, tokens from there on
    head, sm_scale, logit_cap,
    KT: tl.constexpr, VT: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, MANTISSA: tl.constexpr,
    ASM: tl.constexpr, CENTER_BLOCKS: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    """State after ``n_valid`` tokens of one step. Unit = page codes at 2 bits = P·H·D/4 bytes."""
    NG: tl.constexpr = D // G
    KC: tl.constexpr = D if KT == 16 else chunk_width(KT, D, G)
    VC: tl.constexpr = D if VT == 16 else chunk_width(VT, D, G)
    KW: tl.constexpr = D * KT // 8
    VW: tl.constexpr = D * VT // 8
    UNIT: tl.constexpr = P * H * D // 4
    m, total, acc = state
    clip = None
    if key_clip is not None and KT == 2:
        clip = tl.load(key_clip + head)

    q_center = ()
    center_rows = ()
    if KT < 16:
        for b in tl.static_range(CENTER_BLOCKS):
            place = tl.load(center_places + b)
            q_center = q_center + center_queries(
                q, q_offset, row_ok, head, center, center_stride, place, rotary_channels, D, DOT, MANTISSA
            )
            center_rows = center_rows + (rotary + place * rotary_stride,)
    if q_low is not None and KT < 16:
        q = q_low
    q_parts = ()
    q_sums = ()
    for i in tl.static_range(D // KC):
        q_parts = q_parts + (load_query(q, q_offset, row_ok, i * KC, KC, DOT),)
    if KT < 16:
        for g in tl.static_range(NG):
            q_sum = tl.zeros((M,), dtype=tl.float32)
            for i in tl.static_range(G // KC):
                q_sum += tl.sum(q_parts[g * (G // KC) + i].to(tl.float32), axis=1)
            q_sums = q_sums + (q_sum,)
    # What came before goes through this loop's accumulators, so that nothing else stays live.
    VALUE: tl.constexpr = 1.0 if VT == 16 else code_step(VT, MANTISSA) / ((1 << VT) - 1)
    outs = column_blocks(acc * (1.0 / VALUE), D // VC)
    zeros = ()
    if VT < 16:
        for _g in tl.static_range(NG):
            zeros = zeros + (fold(tl.zeros((M, N), dtype=tl.float32), DEFER),)

    for n0 in range(0, n_valid, N):
        n = n0 + tl.arange(0, N)
        valid = n < n_valid
        entry = first + n // P
        t = n % P
        k_unit = tl.load(k_units + entry, mask=valid, other=0).to(tl.int64)
        v_unit = tl.load(v_units + entry, mask=valid, other=0).to(tl.int64)
        page = tl.zeros((N,), dtype=tl.int32)
        if KT < 16 or VT < 16:
            page = tl.load(pages + entry, mask=valid, other=0)

        if KT == 16:
            at = k_unit * (UNIT // 2) + t * (H * D) + head * D
            k = tl.load(k16 + at[:, None] + tl.arange(0, D)[None, :]).to(DOT)
            s = tl.dot(q_parts[0], tl.trans(k))
        else:
            at = k_unit * UNIT + head * (P * KW) + t * KW
            s = tl.zeros((M, N), dtype=tl.float32)
            if CENTER_BLOCKS > 0:
                # What the plan wrote of a page is its column in any request that holds it.
                column = tl.load(cols + entry if CAUSAL else page_columns + page, mask=valid, other=0)
                row = (column * P + t) * ROTARY_COLUMNS
                for b in tl.static_range(CENTER_BLOCKS):
                    x = tl.load(center_rows[b] + row[:, None] + tl.arange(0, ROTARY_COLUMNS)[None, :]).to(DOT)
                    s = tl.dot(q_center[2 * b], tl.trans(x), s)
                    s = tl.dot(q_center[2 * b + 1], tl.trans(x), s)
                s *= center_step(MANTISSA)
            FACTOR: tl.constexpr = code_step(KT, MANTISSA) / ((1 << KT) - 1)
            for c in tl.static_range(KW // KC):
                raw = tl.load(k_codes + at[:, None] + (c * KC + tl.arange(0, KC))[None, :])
                if KW >= G:  # every plane of these bytes is in another group
                    for i in tl.static_range(8 // KT):
                        x = widen(raw, i, KT, MANTISSA, DOT, ASM)
                        dot = tl.dot(q_parts[i * (KW // KC) + c], tl.trans(x))
                        zero, span = load_pairs(k_meta, page, head, t, H, NG, P, (i * KW + c * KC) // G, valid, clip)
                        span *= FACTOR
                        zero -= span * code_bias(KT, MANTISSA)
                        s += dot * span[None, :] + q_sums[(i * KW + c * KC) // G][:, None] * zero[None, :]
                else:  # G // KW planes side by side in each group
                    for g in tl.static_range(NG):
                        dot = tl.zeros((M, N), dtype=tl.float32)
                        for i in tl.static_range(G // KW):
                            x = widen(raw, g * (G // KW) + i, KT, MANTISSA, DOT, ASM)
                            dot = tl.dot(q_parts[g * (G // KW) + i], tl.trans(x), dot)
                        zero, span = load_pairs(k_meta, page, head, t, H, NG, P, g, valid, clip)
                        span *= FACTOR
                        zero -= span * code_bias(KT, MANTISSA)
                        s += dot * span[None, :] + q_sums[g][:, None] * zero[None, :]


        if CAP:
            # tanh(x) = 2·sigmoid(2x) − 1
            s = logit_cap * (2.0 * tl.sigmoid(2.0 * (s * (sm_scale / logit_cap))) - 1.0) * LOG2E
        else:
            s = s * (sm_scale * LOG2E)
        if CAUSAL:
            position = tl.load(cols + entry, mask=valid, other=0) * P + t
            s = tl.where(valid[None, :] & (position[None, :] <= q_pos[:, None]), s, float("-inf"))
        else:
            s = tl.where(valid[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has seen nothing yet has maximum −inf; subtracting 0 keeps its weights at 0.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - base)
        p = tl.exp2(s - base[:, None])
        total = rescale(total, alpha, DEFER) + fold(p, DEFER)
        m = m_new

        new = ()
        if VT == 16:
            # 0 · NaN is not 0, and stale 16-bit rows may be NaN: the only masked load of bytes.
            at = v_unit * (UNIT // 2) + t * (H * D) + head * D
            v = tl.load(v16 + at[:, None] + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0).to(DOT)
            new = new + (tl.dot(p.to(DOT), v, outs[0] * alpha[:, None]),)
        else:
            at = v_unit * UNIT + head * (P * VW) + t * VW
            weights = ()
            new_zeros = ()
            STEP: tl.constexpr = 1.0 / ((1 << VT) - 1)
            MIDDLE: tl.constexpr = (code_bias(VT, MANTISSA) * code_step(VT, MANTISSA) + ((1 << VT) - 1) / 2) * STEP
            for g in tl.static_range(NG):
                zero, span = load_pairs(v_meta, page, head, t, H, NG, P, g, valid, None)
                weight = (p * span[None, :]).to(DOT)
                weights = weights + (weight,)
                centre = p * (zero + span * 0.5)[None, :] - weight.to(tl.float32) * MIDDLE
                new_zeros = new_zeros + (rescale(zeros[g], alpha, DEFER) + fold(centre, DEFER),)
            zeros = new_zeros
            raws = ()
            for c in tl.static_range(VW // VC):
                raws = raws + (tl.load(v_codes + at[:, None] + (c * VC + tl.arange(0, VC))[None, :]),)
            for i in tl.static_range(D // VC):  # in order of channels: plane by plane, chunk by chunk
                x = widen(raws[i % (VW // VC)], i // (VW // VC), VT, MANTISSA, DOT, ASM)
                new = new + (tl.dot(weights[i * VC // G], x, outs[i] * alpha[:, None]),)
        outs = new

    if VT == 16:
        return m, total, outs[0]
    else:
        done = ()
        for k in tl.static_range(D // VC):
            zero_term = tl.sum(zeros[k * VC // G], axis=1) if DEFER else zeros[k * VC // G]
            done = done + (outs[k] * VALUE + zero_term[:, None],)
        return m, total, concat(done, D // VC)
