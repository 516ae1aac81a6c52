"""Index tensors of one forward and layer group, shared by all its layers.

Attention does not depend on the order of KV, so the pages of the requests are sorted by step:
within a step both tiers are known and the code that reads it is straight. The pages of a request at
one step are cut into *items* of up to ``C`` pages. Items of one step are unpacked together in
*strips*, and items of any steps share all the rest in *tiles*. Every item gives a split-KV partial
(max, sum, output), and the partials of a request are merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from sglang_pmkvq.formats import MIN_TIER, K, V
from sglang_pmkvq.kernels.page_lists import PageLists, upload
from sglang_pmkvq.kernels.storage import GroupStorage

# Pages per item are chosen per plan: long items have less overhead, short ones less padding. An
# item's own cost (partials, merge) is about that of this many tokens; measured, and flat around it.
ITEM_OVERHEAD_TOKENS = 8
# The same where an item is a tile of its own.
TILE_OVERHEAD_TOKENS = 64
MAX_ITEM_TOKENS = 1024
# fp32 elements of one side that are unpacked at once: with what they are unpacked from they stay in a core's L2
# (0.9 MiB), and calling torch some eight times per strip is little beside them.
STRIP_ELEMENTS = 1 << 17
# Elements of one side of a tile: bounds what a tile computes once for all its strips (scores, zeros, scales), some
# hundredths of it.
TILE_ELEMENTS = 1 << 21
# Tokens of a plan up to which rows of the rotary table are kept for the next layer: 64 bytes each and block.
KEPT_TOKENS = 1 << 16
NO_POSITION = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Strip:
    """A part of a run that is unpacked at once: n items of C pages.

    Attributes:
        start, stop: its rows (item, head) in the tile, B of them.
        rows: per side, int64 ``[B*C]`` rows (block · H + head) of the codes, ordered item, head,
            page; for a 16-bit side ``[n*C]`` superblocks. Padding reads block 0.
        absent_rows: int64, flat positions ``[B, C*P]`` of absent tokens where V has 16 bits; None without any.
    """

    start: int
    stop: int
    rows: tuple[torch.Tensor, torch.Tensor]
    absent_rows: torch.Tensor | None


@dataclass(frozen=True)
class Run:
    """The items of one step in a tile.

    Attributes:
        tiers: (K tier, V tier).
        start, stop: its rows (item, head) in the tile.
        strips: the same, in order.
        strip_rows: rows of each strip but the last, which may have fewer.
    """

    tiers: tuple[int, int]
    start: int
    stop: int
    strips: tuple[Strip, ...]
    strip_rows: int


@dataclass(frozen=True)
class Tile:
    """A run of items that share all but the unpacking: n items of C pages, B = n·H rows, ordered item, head.

    Items come step by step, and tiers only fall with the step, so the rows whose K (or V) has codes are the last.

    Attributes:
        items: n.
        pages_per_item: C.
        request: int64 ``[n]``, row of each item's request among the planned ones.
        runs: the items again, in order.
        whole: per side, rows before the first with codes.
        meta_rows: per side, int64 ``[(B - whole)*C]``, rows (page · H + head) of the side arrays. Padding reads page 0.
        levels: per side, fp32 ``[B - whole, 1, 1, 1]``, 2^b - 1.
        columns: int64 ``[(B - whole of K)/H, C]``, where the pages of items whose K has codes stand in their sequence.
            Padding has 0.
        absent: bool ``[B, 1, C*P]``, True for padding and tokens past the end; None without any.
        position: int32 ``[1, 1, C*P]``, position of each token in its sequence, ``NO_POSITION`` where
            absent; only in tiles of one item, for the causal mask.
        first, last: smallest and largest present position; only in tiles of one item.
        table_rows: what ``partials`` read of the rotary table, fp32 ``[n, 16, C*P]`` by place of the block: the same in
            all layers. Filled as they come; None where they would be too many to keep.
    """

    items: int
    pages_per_item: int
    request: torch.Tensor
    runs: tuple[Run, ...]
    whole: tuple[int, int]
    meta_rows: tuple[torch.Tensor, torch.Tensor]
    levels: tuple[torch.Tensor, torch.Tensor]
    columns: torch.Tensor
    absent: torch.Tensor | None
    position: torch.Tensor | None
    first: int
    last: int
    table_rows: dict[int, torch.Tensor] | None


def build_tiles(storage: GroupStorage, lists: PageLists, one_item_tiles: bool = False) -> tuple[Tile, ...]:
    """Tiles over all pages of the given requests, step by step.

    Args:
        one_item_tiles: one item per tile, with positions, as the causal mask of extend needs it.
    """
    if not one_item_tiles:
        return _tiles(storage, lists, lists.owned, False)
    # Nothing is shared between their tiles, so every step has items of its own size.
    steps = range(len(storage.group.steps))
    return tuple(t for step in steps for t in _tiles(storage, lists, lists.owned & (lists.step == step), True))


@dataclass(frozen=True)
class _Items:
    """Chosen pages cut into I items of C cells each; a cell holds one page, or none at the end of a request's step.

    Attributes:
        pages_per_item: C.
        step, request: int64 ``[I]``, of each item; items come step by step.
        page_request, page_column: int64 ``[n]``, of each chosen page, as the lists index it.
        cell: int64 ``[n]``, where that page is among the ``I*C`` cells.
        missing: bool ``[I, C*P]``, no token: an empty cell, or past the end of the sequence.
        position: int32 ``[I, C*P]``, position of each token, ``NO_POSITION`` where missing; None if not asked for.
    """

    pages_per_item: int
    step: np.ndarray
    request: np.ndarray
    page_request: np.ndarray
    page_column: np.ndarray
    cell: np.ndarray
    missing: np.ndarray
    position: np.ndarray | None

    @property
    def count(self) -> int:
        return self.step.size

    def spread(self, of_pages: np.ndarray) -> np.ndarray:
        """Values of the lists ``[R, n]`` in the items' cells: int64 ``[I, C]``, 0 in empty ones."""
        out = np.zeros(self.count * self.pages_per_item, dtype=np.int64)
        out[self.cell] = of_pages[self.page_request, self.page_column]
        return out.reshape(self.count, self.pages_per_item)


def _cut(storage: GroupStorage, lists: PageLists, chosen: np.ndarray, one_item_tiles: bool) -> _Items | None:
    """Items over the pages where ``chosen``, bool ``[R, n]``; None if there are none."""
    shape = storage.shape
    p, requests = shape.page_size, lists.kv_lens.size
    request, column = np.nonzero(chosen)
    if not request.size:
        return None
    # A run: the pages of one request at one step. Stable, so columns ascend inside a run.
    run = lists.step[request, column] * requests + request
    order = np.argsort(run, kind="stable")
    run, request, column = run[order], request[order], column[order]
    per_run = np.bincount(run, minlength=len(storage.group.steps) * requests)
    overhead = TILE_OVERHEAD_TOKENS if one_item_tiles else ITEM_OVERHEAD_TOKENS
    c = _pages_per_item(per_run, p, STRIP_ELEMENTS // _page_elements(storage), overhead)
    items_of = -(-per_run // c)
    rank = np.arange(run.size) - (np.cumsum(per_run) - per_run)[run]
    item = (np.cumsum(items_of) - items_of)[run] + rank // c
    items, cell = int(items_of.sum()), item * c + rank % c
    step, item_request = np.divmod(np.repeat(np.arange(per_run.size), items_of), requests)

    token = column[:, None] * p + np.arange(p)
    missing = np.ones((items * c, p), dtype=bool)
    missing[cell] = token >= lists.kv_lens[request][:, None]
    position = None
    if one_item_tiles:
        position = np.full((items * c, p), NO_POSITION, dtype=np.int32)
        position[cell] = token
        position[missing] = NO_POSITION
        position = position.reshape(items, c * p)
    return _Items(c, step, item_request, request, column, cell, missing.reshape(items, c * p), position)


@dataclass(frozen=True)
class _SideRows:
    """Rows of one side of all items, on the device; tiers only fall with the step, so coded items are the last.

    Attributes:
        whole: items before the first with codes, W.
        rows16: int64 ``[W*C]`` superblocks.
        rows: int64 ``[(I - W)*H*C]`` rows (block · H + head) of the codes.
        meta_rows: int64, the same rows (page · H + head) of the side array.
        levels: fp32 ``[(I - W)*H, 1, 1, 1]``, 2^b - 1.
        cells, heads: C and H.
    """

    whole: int
    rows16: torch.Tensor
    rows: torch.Tensor
    meta_rows: torch.Tensor
    levels: torch.Tensor
    cells: int
    heads: int

    def of(self, a: int, b: int) -> torch.Tensor:
        """Rows of items a .. b of one tier: superblocks ``[(b - a)*C]``, or rows of codes ``[(b - a)*H*C]``."""
        if a < self.whole:
            return self.rows16[a * self.cells : b * self.cells]
        width = self.heads * self.cells
        return self.rows[(a - self.whole) * width : (b - self.whole) * width]

    def coded(self, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``Tile.meta_rows`` and ``Tile.levels`` of items a .. b."""
        first, last = (max(x - self.whole, 0) * self.heads for x in (a, b))
        return self.meta_rows[first * self.cells : last * self.cells], self.levels[first:last]


def _side_rows(storage: GroupStorage, lists: PageLists, items: _Items, side: int) -> _SideRows:
    h, c = storage.shape.num_kv_heads, items.pages_per_item

    def head_rows(block: np.ndarray) -> np.ndarray:
        """int64 ``[n, C]`` as rows (block · H + head), ordered item, head, cell."""
        return (block[:, None, :] * h + np.arange(h)[:, None]).reshape(-1)

    tier = np.array(storage.group.steps)[items.step, side]
    block = items.spread(lists.unit[storage.arena_of(side)]) // (tier[:, None] // MIN_TIER)
    whole = int((tier == 16).sum())
    levels = (1 << np.repeat(tier[whole:], h)) - 1
    return _SideRows(
        whole=whole,
        rows16=upload(storage, block[:whole].reshape(-1)),
        rows=upload(storage, head_rows(block[whole:])),
        meta_rows=upload(storage, head_rows(items.spread(lists.pages)[whole:])),
        levels=torch.from_numpy(levels.astype(np.float32)).to(storage.device).view(-1, 1, 1, 1),
        cells=c,
        heads=h,
    )


def _runs(storage: GroupStorage, items: _Items, sides: tuple[_SideRows, _SideRows], a: int, b: int) -> tuple[Run, ...]:
    """Items a .. b, which share a tile, step by step and in strips."""
    h = storage.shape.num_kv_heads
    strip_items = max(1, STRIP_ELEMENTS // (_page_elements(storage) * items.pages_per_item))

    def strip(first: int, x: int, y: int) -> Strip:
        absent_rows = None
        if x < sides[V].whole and items.missing[x:y].any():
            absent_rows = upload(storage, np.flatnonzero(np.repeat(items.missing[x:y, None], h, axis=1)))
        return Strip((x - first) * h, (y - first) * h, (sides[K].of(x, y), sides[V].of(x, y)), absent_rows)

    steps = storage.group.steps
    starts = np.searchsorted(items.step, np.arange(len(steps) + 1)).tolist()
    runs = []
    for tiers, (low, high) in zip(steps, pairwise(starts), strict=True):
        low, high = max(low, a), min(high, b)
        if low < high:
            strips = tuple(strip(a, x, min(x + strip_items, high)) for x in range(low, high, strip_items))
            runs.append(Run(tiers, (low - a) * h, (high - a) * h, strips, strip_items * h))
    return tuple(runs)


def _tiles(storage: GroupStorage, lists: PageLists, chosen: np.ndarray, one_item_tiles: bool) -> tuple[Tile, ...]:
    """Tiles over the pages where ``chosen``, bool ``[R, n]``."""
    items = _cut(storage, lists, chosen, one_item_tiles)
    if items is None:
        return ()
    h, c = storage.shape.num_kv_heads, items.pages_per_item
    sides = (_side_rows(storage, lists, items, K), _side_rows(storage, lists, items, V))
    request = upload(storage, items.request)
    columns = np.zeros(items.count * c, dtype=np.int64)
    if storage.page_columns is not None:
        columns[items.cell] = items.page_column
    coded_columns = upload(storage, columns.reshape(-1, c)[sides[K].whole :])
    tile_items = 1 if one_item_tiles else max(1, TILE_ELEMENTS // (_page_elements(storage) * c))
    tiles = []
    for a in range(0, items.count, tile_items):
        b = min(a + tile_items, items.count)
        missing, position, first, last = items.missing[a:b], None, 0, 0
        absent = None
        if missing.any():
            absent = torch.from_numpy(np.repeat(missing[:, None], h, axis=0)).to(storage.device)
        if items.position is not None:
            position = torch.from_numpy(items.position[a:b, None]).to(storage.device)
            seen = items.position[a:b][~missing]
            first, last = int(seen.min()), int(seen.max())
        (meta_k, levels_k), (meta_v, levels_v) = (side.coded(a, b) for side in sides)
        whole_k, whole_v = ((min(max(side.whole, a), b) - a) * h for side in sides)
        tiles.append(
            Tile(
                items=b - a,
                pages_per_item=c,
                request=request[a:b],
                runs=_runs(storage, items, sides, a, b),
                whole=(whole_k, whole_v),
                meta_rows=(meta_k, meta_v),
                levels=(levels_k, levels_v),
                columns=coded_columns[max(a - sides[K].whole, 0) : max(b - sides[K].whole, 0)],
                absent=absent,
                position=position,
                first=first,
                last=last,
                table_rows={} if items.count * c * storage.shape.page_size <= KEPT_TOKENS else None,
            )
        )
    return tuple(tiles)


def _page_elements(storage: GroupStorage) -> int:
    """Elements of one side of a page in a layer."""
    s = storage.shape
    return s.page_size * s.num_kv_heads * s.head_dim


def _pages_per_item(per_run: np.ndarray, page_size: int, most: int, overhead: int) -> int:
    """Pages per item, at most ``most``, that cost least: padded tokens plus ``overhead`` tokens per item."""
    best, best_cost, c = 1, float("inf"), 1
    while c == 1 or (c <= most and c * page_size <= MAX_ITEM_TOKENS):
        cost = int((-(-per_run // c)).sum()) * (c * page_size + overhead)
        if cost < best_cost:
            best, best_cost = c, cost
        c *= 2
    return best
