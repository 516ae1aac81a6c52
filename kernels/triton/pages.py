"""Kernels that write KV: new rows, block copies (quantize, shift, move), page-table entries."""

import triton
import triton.language as tl
from sglang_pmkvq.kernels.triton.codes import shift_down
from sglang_pmkvq.kernels.triton.entries import STEP_MASK, SUPERBLOCK_SHIFT
from sglang_pmkvq.kernels.triton.rotation import ROTARY_COLUMNS, ROTARY_PAIRS, rotated

FP16_MAX = tl.constexpr(65504.0)
# 1.5·2^23: adding and subtracting it rounds a small fp32 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit(
    do_not_specialize=["table_stride", "num_pages"],
    do_not_specialize_on_alignment=["slots", "table"],
)
def store_kernel(
    slots, k, v, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    k16, v16, table, table_stride, num_pages, dropped,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, ARENAS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Row of token ``program`` into its 16-bit page. Slots of other pages are counted and not written."""
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    page = slot // P
    known = (slot >= 0) & (page <= num_pages)
    k_entry = tl.load(table + page, mask=known, other=-1)
    v_entry = k_entry
    if ARENAS == 2:
        v_entry = tl.load(table + table_stride + page, mask=known, other=-1)
    # The step sits in the low bits of an entry, and an unmapped entry has all bits set.
    writable = ((k_entry | v_entry) & STEP_MASK) == 0
    if not writable:
        tl.atomic_add(dropped, tl.full((), 1, dtype=tl.int64))
    h = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    ok = (h < H)[:, None] & writable
    inside = (slot % P) * (H * D) + h[:, None] * D + d[None, :]
    x = tl.load(k + token.to(tl.int64) * k_stride_t + h[:, None] * k_stride_h + d[None, :], mask=ok, other=0.0)
    tl.store(k16 + (k_entry >> SUPERBLOCK_SHIFT).to(tl.int64) * (P * H * D) + inside, x.to(DTYPE), mask=ok)
    x = tl.load(v + token.to(tl.int64) * v_stride_t + h[:, None] * v_stride_h + d[None, :], mask=ok, other=0.0)
    tl.store(v16 + (v_entry >> SUPERBLOCK_SHIFT).to(tl.int64) * (P * H * D) + inside, x.to(DTYPE), mask=ok)


@triton.jit
def store_packed(codes, dst, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """int32 codes [T, D] to planar bytes [T, D·BITS/8] at ``dst``, rows one after the other."""
    W: tl.constexpr = D * BITS // 8
    if BITS < 8:
        planes = tl.reshape(codes, (T, 8 // BITS, W))
        shift = tl.arange(0, 8 // BITS) * BITS
        codes = tl.sum(planes << shift[None, :, None], axis=1)  # the planes' bits do not overlap
    at = tl.arange(0, T)[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(dst + at, codes.to(tl.uint8))


@triton.jit
def quantize(
    x, meta, clipped, t0,
    D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """int32 8-bit codes [T, D] of fp32 x [T, D]; writes (zero, range) of tokens t0 .. of one head.

    As ``kernels/cpu/codes.py`` defines it, bit for bit: zero and range are rounded to fp16 first and
    the codes taken from the rounded values; a range of 0 gives codes 0; a group with a NaN or an
    infinity gets zero NaN and codes 0; finite values beyond fp16 are clamped and counted.
    Divisions are correctly rounded, and no product feeds a sum, so nothing is contracted.
    """
    NG: tl.constexpr = D // G
    groups = tl.reshape(x, (T, NG, G))
    broken = (groups != groups) | (tl.abs(groups) == float("inf"))
    finite = tl.max(broken.to(tl.int32), axis=2) == 0
    low = tl.where(finite, tl.min(tl.where(broken, float("inf"), groups), axis=2), 0.0)
    high = tl.where(finite, tl.max(tl.where(broken, float("-inf"), groups), axis=2), 0.0)
    wide = high - low
    lost = tl.sum(((tl.abs(low) > FP16_MAX) | (wide > FP16_MAX)).to(tl.int32))
    if lost > 0:
        tl.atomic_add(clipped, lost.to(tl.int64))
    zero = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX).to(tl.float16)
    span = tl.minimum(wide, FP16_MAX).to(tl.float16)

    g = tl.arange(0, NG)
    at = g[None, :] * P + t0 + tl.arange(0, T)[:, None]
    zero_bits = tl.where(finite, zero.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, 0x7E00)
    span_bits = span.to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(meta + at, zero_bits | (span_bits << 16))

    zero32 = tl.broadcast_to(zero.to(tl.float32)[:, :, None], (T, NG, G))
    span32 = tl.broadcast_to(span.to(tl.float32)[:, :, None], (T, NG, G))
    useful = (span32 > 0.0) & tl.broadcast_to(finite[:, :, None], (T, NG, G))
    y = tl.div_rn((groups - zero32) * 255.0, tl.where(useful, span32, 1.0))
    y = tl.minimum(tl.maximum(tl.where(useful, y, 0.0), 0.0), 255.0)
    return tl.reshape(((y + ROUNDER) - ROUNDER).to(tl.int32), (T, D))


@triton.jit
def narrow(src, dst, edge, SRC: tl.constexpr, DST: tl.constexpr, BYTES: tl.constexpr, ROW: tl.constexpr):
    """Codes of SRC bits to DST bits for ``BYTES`` destination bytes, rows of ``ROW`` destination bytes.

    A destination byte j of a row gathers planes of DST bits; plane i of it holds channel
    i·ROW + j, which is plane (i·ROW + j) // W of the source byte (i·ROW + j) % W, W = ROW·SRC/DST.
    """
    W: tl.constexpr = ROW * SRC // DST
    n = tl.arange(0, BYTES)
    row = n // ROW
    j = n % ROW
    out = tl.zeros((BYTES,), dtype=tl.int32)
    for i in tl.static_range(8 // DST):
        raw = tl.load(src + row * W + (i * ROW % W) + j).to(tl.int32)
        code = (raw >> (i * ROW // W * SRC)) & ((1 << SRC) - 1)
        out |= shift_down(code, SRC, DST, edge) << (i * DST)
    tl.store(dst + n, out.to(tl.uint8))


@triton.jit
def center_term(
    center, plane_stride, table, channel_at, at, position,
    side, D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """R_m c fp32 [T, D] of tokens at ``position [T]``; ``at``: elements before a head's channels in ``center``.

    Products are exact (``rotary.CENTER_BITS``), so their sum rounds once, contracted or not, as the torch path does.
    Side 1 has no centre. 0 is added so that where there is none the term is +0, which leaves a zero its sign.
    """
    d = tl.arange(0, D)
    mine = (d < D) & (side == 0)
    both = tl.broadcast_to(mine[None, :], (T, D))
    row = tl.load(channel_at + d)[None, :] + position[:, None] * ROTARY_COLUMNS
    cos = tl.load(table + row, mask=both, other=0.0).to(tl.float32)
    sin = tl.load(table + row + ROTARY_PAIRS, mask=both, other=0.0).to(tl.float32)
    by_cos = tl.load(center + at + d, mask=mine, other=0.0)
    by_sin = tl.load(center + plane_stride + at + d, mask=mine, other=0.0)
    return (by_cos[None, :] * cos + by_sin[None, :] * sin) + 0.0


@triton.jit(do_not_specialize=["count"])
def copy_kernel(
    commands, count,  # int32 [5, count]: page, source unit, destination unit, source tier, destination tier
    values0, bytes0, meta0, scale0, rotated0, edges0, values1, bytes1, meta1, rotated1, clipped,
    center0, center_stride, rotary, channel_at, page_columns,  # all None without a centre
    bytes_stride_l, meta_stride_l,
    MIN_TIER: tl.constexpr, ROTATE: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One command, layer, side and head per program; tiers are uniform in a program.

    ``…0`` and ``…1`` are the sides of the arena (the same twice if it has one); only side 0 can have a key scale,
    edges (int32 [L, H]) of clipped ranges, and a centre (fp32 [2, L, H, D] of cosines and sines, ``Center.factors``).
    Layers with a nonzero flag (int32 [L], None: none) are rotated and multiplied by ROTATE. In a wave nothing is read
    and written, so programs need no order.
    """
    command = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    side = tl.program_id(2) // H
    head = tl.program_id(2) % H
    UNIT: tl.constexpr = P * H * D // 4
    page = tl.load(commands + command).to(tl.int64)
    src_unit = tl.load(commands + count + command).to(tl.int64)
    dst_unit = tl.load(commands + 2 * count + command).to(tl.int64)
    src_tier = tl.load(commands + 3 * count + command)
    dst_tier = tl.load(commands + 4 * count + command)
    base = tl.where(side == 0, bytes0, bytes1) + layer * bytes_stride_l
    src = base + src_unit * UNIT
    dst = base + dst_unit * UNIT
    edge = None
    if edges0 is not None:
        # 3 is the edge of a whole range.
        edge = tl.load(edges0 + layer * H + head, mask=side == 0, other=3)
    if src_tier == dst_tier:
        # A head's share of the bytes, whatever they mean: P·D/4 per unit.
        SHARE: tl.constexpr = P * D // 4
        n = tl.arange(0, SHARE)
        for i in range(src_tier // 2):
            at = (i * H + head) * SHARE + n
            tl.store(dst + at, tl.load(src + at))
    elif src_tier == 16:
        if MIN_TIER < 16:
            values = tl.where(side == 0, values0, values1)
            values += layer * (bytes_stride_l // 2) + src_unit * (UNIT // 2)
            meta = tl.where(side == 0, meta0, meta1) + layer * meta_stride_l
            turn = tl.zeros((), dtype=tl.int32)
            if rotated0 is not None:
                turn += tl.load(rotated0 + layer, mask=side == 0, other=0)
            if rotated1 is not None:
                turn += tl.load(rotated1 + layer, mask=side == 1, other=0)
            start = tl.zeros((), dtype=tl.int32)
            if center0 is not None:
                start = tl.load(page_columns + page) * P
            for t0 in range(0, P, T):
                t = t0 + tl.arange(0, T)
                d = tl.arange(0, D)
                x = tl.load(values + t[:, None] * (H * D) + head * D + d[None, :]).to(tl.float32)
                if center0 is not None:
                    x -= center_term(
                        center0, center_stride, rotary, channel_at, (layer * H + head) * D, start + t,
                        side, D, T,
                    )  # fmt: skip
                if scale0 is not None:
                    s = tl.load(scale0 + (layer * H + head) * D + d, mask=(d < D) & (side == 0), other=1.0)
                    x = tl.div_rn(x, tl.broadcast_to(s[None, :], (T, D)))
                if ROTATE > 0.0:  # noqa: SIM102 - the compiler decides this one, the program the next
                    if turn != 0:
                        x = rotated(x, T, D, ROTATE)
                at = (page * H + head) * (D // G * P)
                codes = quantize(x, meta + at, clipped, t0, D, G, P, T)
                if dst_tier == 8:
                    store_packed(codes, dst + (head * P + t0) * D, 8, T, D)
                elif dst_tier == 4:
                    if MIN_TIER <= 4:
                        store_packed(shift_down(codes, 8, 4, None), dst + (head * P + t0) * (D // 2), 4, T, D)
                elif MIN_TIER <= 2:
                    store_packed(shift_down(codes, 8, 2, edge), dst + (head * P + t0) * (D // 4), 2, T, D)
    elif src_tier == 8:
        if dst_tier == 4:
            if MIN_TIER <= 4:
                narrow(src + head * (P * D), dst + head * (P * D // 2), None, 8, 4, P * D // 2, D // 2)
        elif MIN_TIER <= 2:
            narrow(src + head * (P * D), dst + head * (P * D // 4), edge, 8, 2, P * D // 4, D // 4)
    elif MIN_TIER <= 2:
        narrow(src + head * (P * D // 2), dst + head * (P * D // 4), edge, 4, 2, P * D // 4, D // 4)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table"])
def table_kernel(updates, count, table, BLOCK: tl.constexpr):
    """table[page] = entry for updates int32 [2, count]: pages, then entries; each page at most once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < count
    page = tl.load(updates + i, mask=ok, other=0)
    tl.store(table + page, tl.load(updates + count + i, mask=ok, other=0), mask=ok)
