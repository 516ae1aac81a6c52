"""Tiers, layer groups, page layouts and the one place that counts their bytes.

No torch and no SGLang here: the ledger, the kernels, the pool and calibration all import this
module, so it must stay importable anywhere.

Vocabulary. A *page* holds ``P`` tokens. A *tier* is the storage width of one side (K or V) of a
page, in bits: 16 is the model dtype untouched; 8, 4 and 2 are unsigned codes plus a (zero, range)
pair of fp16 per token, head and group of ``G`` channels. A *layer group* is the set of layers with
the same (K final, V final) pair; a page has one *step* per layer group, and the step says both
tiers. The smallest piece of an arena is a *unit*: the codes of one page at 2 bits. A block of tier
``b`` is ``b // 2`` consecutive, aligned units, so a 16-bit page is one *superblock* of 8 units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

# Powers of two, each half of the one before, and nothing else: a block splits into two of the next tier (buddy
# allocation), codes shrink by the equivalent right shift 2b -> b without their values, and a byte holds whole codes.
TIERS: tuple[int, ...] = (16, 8, 4, 2)
MIN_TIER = TIERS[-1]
UNITS_PER_SUPERBLOCK = TIERS[0] // MIN_TIER
PAGE_SIZES: tuple[int, ...] = (16, 32, 64)
GROUP_SIZES: tuple[int, ...] = (32, 64, 128)
HEAD_DIMS: tuple[int, ...] = (64, 128, 256)

# What may be done to keys before they become codes (``kernels/coding.py``), and what of it needs no calibration.
KEY_TRANSFORMS: tuple[str, ...] = ("none", "scale", "hadamard")
DATA_FREE_TRANSFORMS: tuple[str, ...] = ("none", "hadamard")
# Where the centre of quantized keys comes from (``kernels/rotary.py``).
KEY_CENTERS: tuple[str, ...] = ("none", "bias", "mean")
# What a user may ask for without a calibration; auto is what the final widths and the model suggest.
KEY_TRANSFORM_CHOICES: tuple[str, ...] = ("auto", *DATA_FREE_TRANSFORMS)
KEY_CENTER_CHOICES: tuple[str, ...] = ("auto", "bias", "none")
# Rotary pairs that are centred together, and columns of their table: a cosine and a sine of each. At 16 bits one
# position of a block is 32 bytes, the smallest piece that a GPU reads.
ROTARY_PAIRS = 8
ROTARY_COLUMNS = 2 * ROTARY_PAIRS

# A page-table entry is one int32: ``unit << STEP_BITS | step``; UNMAPPED, all bits set, where the page is free.
STEP_BITS = (len(TIERS) - 1).bit_length()
STEP_MASK = (1 << STEP_BITS) - 1
UNMAPPED = -1
MAX_UNITS = 1 << (31 - STEP_BITS)

K, V = 0, 1
SIDES: tuple[int, ...] = (K, V)

# Bytes of one (zero, range) pair: two fp16.
META_PAIR_BYTES = 4
ENTRY_BYTES = 4
# Bytes of the position of a page's first token, which centred keys need: one int32.
POSITION_BYTES = 4


def check_tiers(tiers: tuple[int, ...]) -> None:
    """Raise unless every tier but the first is half of the one before; the arithmetic here knows no others.

    Raises:
        ValueError: they are not; names them.
    """
    if tiers[0] != 16 or any(2 * low != high for high, low in pairwise(tiers)):
        raise ValueError(f"tiers must start at 16 and halve (blocks split in two, codes shift 2b -> b), got {tiers}")


check_tiers(TIERS)


def tier_units(tier: int) -> int:
    """Units that a block of ``tier`` bits covers: 8, 4, 2, 1 for 16, 8, 4, 2."""
    return tier // MIN_TIER


def block_order(tier: int) -> int:
    """Buddy order of a ``tier``-bit block: log2 of its units (3, 2, 1, 0 for 16, 8, 4, 2)."""
    return tier_units(tier).bit_length() - 1


def steps_of(k_final: int, v_final: int) -> tuple[tuple[int, int], ...]:
    """(K tier, V tier) of every step of a group, from the 16-bit birth to the final pair.

    Side tier at step s = min(16, final · 2^(n − s)), n = log2(16 / min(finals)), so both sides
    reach their final tier together at step n. Example: ``steps_of(4, 2)`` is
    ``((16, 16), (16, 8), (8, 4), (4, 2))``.

    Raises:
        ValueError: a final width is not one of 16, 8, 4, 2.
    """
    for name, final in (("K", k_final), ("V", v_final)):
        if final not in TIERS:
            raise ValueError(f"final {name} width must be one of {TIERS}, got {final!r}")
    n = int(math.log2(16 // min(k_final, v_final)))
    return tuple((min(16, k_final << (n - s)), min(16, v_final << (n - s))) for s in range(n + 1))


@dataclass(frozen=True)
class PageShape:
    """What decides the bytes of a page in one layer, on one rank.

    Attributes:
        page_size: tokens per page, P.
        num_kv_heads: KV heads on this rank, H.
        head_dim: channels per head, D.
        group_size: channels that share one (zero, range) pair, G; divides D.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    group_size: int

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {self.page_size}")
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {self.head_dim}")
        if self.group_size not in GROUP_SIZES or self.head_dim % self.group_size:
            raise ValueError(
                f"group_size must be one of {GROUP_SIZES} and divide head_dim {self.head_dim}, "
                f"got {self.group_size}"
            )
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be positive, got {self.num_kv_heads}")

    @property
    def groups_per_head(self) -> int:
        return self.head_dim // self.group_size

    def code_bytes(self, tier: int) -> int:
        """Bytes of the codes (or 16-bit values) of one side of one page in one layer."""
        return self.page_size * self.num_kv_heads * self.head_dim * tier // 8

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit of one side in one layer: the codes of a page at 2 bits."""
        return self.code_bytes(MIN_TIER)

    @property
    def meta_bytes(self) -> int:
        """Bytes of (zero, range) of one side of one page in one layer, whatever its tier."""
        return self.page_size * self.num_kv_heads * self.groups_per_head * META_PAIR_BYTES


@dataclass(frozen=True)
class LayerGroup:
    """Layers that shrink together: same final K and V tiers, one page table, arenas of their own.

    If the finals are equal, K and V of a page share one block id (one arena id space, two
    tensors); else K and V have an arena and an id of their own.
    """

    layers: tuple[int, ...]
    k_final: int
    v_final: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layer group needs at least one layer")
        steps_of(self.k_final, self.v_final)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(K tier, V tier) per step."""
        return steps_of(self.k_final, self.v_final)

    @property
    def final_step(self) -> int:
        return len(self.steps) - 1

    @property
    def shared(self) -> bool:
        """True if K and V share block ids."""
        return self.k_final == self.v_final

    @property
    def arena_sides(self) -> tuple[tuple[int, ...], ...]:
        """Sides that each arena of the group stores: ``((K, V),)`` or ``((K,), (V,))``."""
        return ((K, V),) if self.shared else ((K,), (V,))

    def arena_tier(self, arena: int, step: int) -> int:
        """Tier of the blocks of arena number ``arena`` for a page at ``step``."""
        return self.steps[step][self.arena_sides[arena][0]]

    def final_of(self, side: int) -> int:
        return (self.k_final, self.v_final)[side]

    def name(self) -> str:
        return f"k{self.k_final}v{self.v_final}"


def groups_from_finals(finals: list[tuple[int, int]]) -> tuple[LayerGroup, ...]:
    """Layer groups from one (K final, V final) pair per layer, in order of first appearance."""
    layers: dict[tuple[int, int], list[int]] = {}
    for layer, pair in enumerate(finals):
        layers.setdefault(pair, []).append(layer)
    return tuple(LayerGroup(tuple(ls), k, v) for (k, v), ls in layers.items())


def arena_block_bytes(shape: PageShape, group: LayerGroup, arena: int, tier: int) -> int:
    """Bytes of one ``tier``-bit block of an arena, over the group's layers and the arena's sides."""
    return len(group.layers) * len(group.arena_sides[arena]) * shape.code_bytes(tier)


def page_code_bytes(shape: PageShape, group: LayerGroup, step: int) -> int:
    """Bytes of a page's blocks in one group at ``step``: all layers of the group, K and V."""
    return sum(
        arena_block_bytes(shape, group, a, group.arena_tier(a, step))
        for a in range(len(group.arena_sides))
    )


def page_side_bytes(shape: PageShape, group: LayerGroup, step: int) -> int:
    """Bytes of (zero, range) that a page at ``step`` really uses in one group (0 for 16-bit sides)."""
    below = sum(tier < 16 for tier in group.steps[step])
    return len(group.layers) * below * shape.meta_bytes


def page_bytes(shape: PageShape, group: LayerGroup, step: int) -> int:
    """Bytes that a page stands for in one group at ``step``: blocks, and (zero, range) below 16 bits."""
    return page_code_bytes(shape, group, step) + page_side_bytes(shape, group, step)


def page_overhead_bytes(shape: PageShape, groups: tuple[LayerGroup, ...]) -> int:
    """Bytes reserved per logical page whatever its tier: side arrays of all layers, table entries.

    A side that never leaves 16 bits has no side array.
    """
    total = 0
    for group in groups:
        quantized = sum(group.final_of(side) < 16 for side in SIDES)
        total += len(group.layers) * quantized * shape.meta_bytes
        total += ENTRY_BYTES * len(group.arena_sides)
    return total


def page_elements(shape: PageShape, layers: int) -> int:
    """KV elements of a full page over ``layers`` layers, K and V."""
    return 2 * layers * shape.page_size * shape.num_kv_heads * shape.head_dim


@dataclass(frozen=True)
class PoolGeometry:
    """Sizes of a pool: everything that ledger and device pool must agree on.

    Attributes:
        shape: bytes of a page.
        groups: the layer groups.
        num_pages: N, logical pages that SGLang may allocate; ids 1..N. Page 0, the sink of padded
            tokens, exists on top and stays at 16 bits.
        hard_pages: R, the bound on simultaneously hard-protected pages (page 0 apart).
        superblocks: superblocks per arena, indexed ``[group][arena]``.
        center_bytes: rotary table and centres of quantized keys, whatever the number of pages. Where there are any,
            every page has its position too.
    """

    shape: PageShape
    groups: tuple[LayerGroup, ...]
    num_pages: int
    hard_pages: int
    superblocks: tuple[tuple[int, ...], ...]
    center_bytes: int = 0

    @property
    def arena_bytes(self) -> int:
        return sum(
            count * arena_block_bytes(self.shape, group, a, 16)
            for group, counts in zip(self.groups, self.superblocks, strict=True)
            for a, count in enumerate(counts)
        )

    @property
    def overhead_bytes(self) -> int:
        """Side arrays and tables, page 0 included; positions, rotary table and centres where keys are centred."""
        per_page = page_overhead_bytes(self.shape, self.groups) + (POSITION_BYTES if self.center_bytes else 0)
        return (self.num_pages + 1) * per_page + self.center_bytes

    @property
    def total_bytes(self) -> int:
        return self.arena_bytes + self.overhead_bytes


def arena_superblocks(group: LayerGroup, arena: int, num_pages: int, hard_pages: int) -> int:
    """Superblocks that let ``num_pages`` pages exist with ``hard_pages`` of them at 16 bits.

    ⌈(N·c_final + R·(c16 − c_final)) / c16⌉ + 2, in units: one superblock is page 0, one is spare so
    that moves can always make a whole superblock.
    """
    c16 = UNITS_PER_SUPERBLOCK
    c_final = tier_units(group.arena_tier(arena, group.final_step))
    hard = min(hard_pages, num_pages)
    return -(-(num_pages * c_final + hard * (c16 - c_final)) // c16) + 2


def geometry_for_pages(
    shape: PageShape, groups: tuple[LayerGroup, ...], num_pages: int, hard_pages: int, center_bytes: int = 0
) -> PoolGeometry:
    """The geometry that holds ``num_pages`` logical pages."""
    return PoolGeometry(
        shape,
        groups,
        num_pages,
        hard_pages,
        tuple(
            tuple(arena_superblocks(g, a, num_pages, hard_pages) for a in range(len(g.arena_sides)))
            for g in groups
        ),
        center_bytes,
    )


def geometry_for_budget(
    shape: PageShape,
    groups: tuple[LayerGroup, ...],
    budget_bytes: int,
    hard_pages: int,
    center_bytes: Callable[[int], int] = lambda tokens: 0,
) -> PoolGeometry | None:
    """The largest geometry whose ``total_bytes`` fit ``budget_bytes``; None if not even one page does.

    Args:
        center_bytes: rotary table and centres of a pool of so many tokens, which never falls.
    """

    def of(n: int) -> PoolGeometry:
        return geometry_for_pages(shape, groups, n, hard_pages, center_bytes(n * shape.page_size))

    def fits(n: int) -> bool:
        return of(n).total_bytes <= budget_bytes

    if not fits(1):
        return None
    low = 1
    high = 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if fits(mid) else (low, mid)
    return of(low)


def hard_reserve_bytes(shape: PageShape, groups: tuple[LayerGroup, ...], hard_pages: int) -> int:
    """R·(c16 − c_final) summed over groups: what the 16-bit reserve costs, in bytes."""
    return hard_pages * sum(
        page_code_bytes(shape, g, 0) - page_code_bytes(shape, g, g.final_step) for g in groups
    )
