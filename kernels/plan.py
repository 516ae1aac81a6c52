"""Index tensors of one forward and layer group, shared by all its layers.

Attention does not depend on the order of KV, so the pages of the requests are sorted by step:
within a step both tiers are known and the code that reads it is straight. The pages of a request at
one step are cut into *items* of up to ``C`` pages. Items of one step are unpacked together in
*blocks*, and items of any steps share all the rest in *tiles*. Every item gives a split-KV partial
(max, sum, output), and the partials of a request are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from sglang_pmkvq.formats import MIN_TIER, SIDES, STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, K, V
from sglang_pmkvq.kernels.storage import GroupStorage

# Pages per item are chosen per plan: long items have less overhead, short ones less padding. An
# item's own cost (partials, merge) is about that of this many tokens; measured, and flat around it.
ITEM_OVERHEAD_TOKENS = 8
# The same where an item is a tile of its own.
TILE_OVERHEAD_TOKENS = 64
MAX_ITEM_TOKENS = 1024
# fp32 elements of one side that are unpacked at once: with what they are unpacked from they stay in a core's L2
# (0.9 MiB), and calling torch some eight times per block is little beside them.
BLOCK_ELEMENTS = 1 << 17
# Elements of one side of a tile: bounds what a tile computes once for all its blocks (scores, zeros, scales), some
# hundredths of it.
TILE_ELEMENTS = 1 << 21
NO_POSITION = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Block:
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
        blocks: the same, in order.
        block_rows: rows of each block but the last, which may have fewer.
    """

    tiers: tuple[int, int]
    start: int
    stop: int
    blocks: tuple[Block, ...]
    block_rows: int


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
        absent: bool ``[B, 1, C*P]``, True for padding and tokens past the end; None without any.
        position: int32 ``[1, 1, C*P]``, position of each token in its sequence, ``NO_POSITION`` where
            absent; only in tiles of one item, for the causal mask.
        first, last: smallest and largest present position; only in tiles of one item.
    """

    items: int
    pages_per_item: int
    request: torch.Tensor
    runs: tuple[Run, ...]
    whole: tuple[int, int]
    meta_rows: tuple[torch.Tensor, torch.Tensor]
    levels: tuple[torch.Tensor, torch.Tensor]
    absent: torch.Tensor | None
    position: torch.Tensor | None
    first: int
    last: int


@dataclass(frozen=True)
class PageLists:
    """What the page tables say about R requests, on the host.

    Attributes:
        pages: int64 ``[R, n]`` logical pages, 0 beyond a request's own.
        step: int64 ``[R, n]``, 0 beyond a request's own.
        unit: int64 ``[num_arenas, R, n]``, 0 beyond a request's own.
        owned: bool ``[R, n]``, True for a request's own pages.
        kv_lens: int64 ``[R]``.
        entry: int32 ``[num_arenas, R, n]``, the table's entries of ``pages``.
    """

    pages: np.ndarray
    step: np.ndarray
    unit: np.ndarray
    owned: np.ndarray
    kv_lens: np.ndarray
    entry: np.ndarray

    @property
    def all16(self) -> np.ndarray:
        """bool ``[R]``: no page of the request has shrunk in this group."""
        return np.logical_not(self.step.any(axis=1))

    def superblocks(self, storage: GroupStorage, side: int) -> np.ndarray:
        """int64 ``[R, n]``, superblock of each page of a side; meaningful for 16-bit pages."""
        return self.unit[storage.arena_of(side)] // UNITS_PER_SUPERBLOCK

    def select(self, requests: np.ndarray) -> PageLists:
        """The same for some of the requests."""
        return PageLists(
            self.pages[requests],
            self.step[requests],
            self.unit[:, requests],
            self.owned[requests],
            self.kv_lens[requests],
            self.entry[:, requests],
        )

    def grown(self, storage: GroupStorage, req_pages: torch.Tensor, kv_lens: np.ndarray) -> PageLists | None:
        """The lists one decode step later, if nothing but the lengths has changed; else None.

        So it is when every request has one token more, in a page that it had already, and neither the request rows
        nor the table's entries of their pages are others than before. On the CPU only.
        """
        if storage.device.type != "cpu" or kv_lens.size != self.kv_lens.size or not kv_lens.size:
            return None
        if (kv_lens - self.kv_lens != 1).any() or not (self.kv_lens % storage.shape.page_size).all():
            return None
        n = self.pages.shape[1]
        if req_pages.shape[1] < n or (req_pages.numpy()[:, :n] != self.pages).any(where=self.owned):
            return None
        if (storage.table.numpy()[:, self.pages] != self.entry).any():
            return None
        return replace(self, kv_lens=kv_lens)


def host_lengths(lens: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """Lengths as int64 on the host; a device tensor is waited for."""
    if isinstance(lens, torch.Tensor):
        lens = lens.cpu().numpy()
    return np.asarray(lens, dtype=np.int64).reshape(-1)


def read_page_lists(storage: GroupStorage, req_pages: torch.Tensor, kv_lens: np.ndarray) -> PageLists:
    """Reads the page table for requests; one transfer to the host on other devices.

    Args:
        req_pages: integer ``[R, max_pages]`` logical pages; anything beyond a request's own pages.
        kv_lens: int64 ``[R]`` tokens.

    Raises:
        ValueError: shapes or lengths that do not fit, a page id out of range, or an unmapped page.
    """
    p = storage.shape.page_size
    if req_pages.dim() != 2 or req_pages.shape[0] != kv_lens.size:
        raise ValueError(f"req_pages must be [{kv_lens.size}, max_pages], got {tuple(req_pages.shape)}")
    counts = -(-kv_lens // p)
    most = int(counts.max(initial=0))
    if kv_lens.min(initial=0) < 0 or most > req_pages.shape[1]:
        raise ValueError(f"lengths must be in [0, {req_pages.shape[1] * p}], got {kv_lens.min()}..{kv_lens.max()}")
    owned = np.arange(most) < counts[:, None]
    pages = np.where(owned, req_pages[:, :most].cpu().numpy(), 0).astype(np.int64)
    if pages.size and (pages.min() < 0 or pages.max() > storage.num_pages):
        raise ValueError(f"logical pages must be in [0, {storage.num_pages}], got {pages.min()}..{pages.max()}")
    if storage.device.type == "cpu":
        raw = storage.table.numpy()[:, pages]
    else:
        wanted = torch.from_numpy(pages).to(storage.device)
        raw = storage.table[:, wanted].cpu().numpy()
    entry = raw.astype(np.int64)
    if (entry < 0).any(where=owned):
        bad = np.unique(pages[(entry < 0).any(axis=0) & owned]).tolist()
        raise ValueError(f"attention needs mapped pages, got unmapped pages {bad[:8]}")
    step = np.where(owned, entry[0] & STEP_MASK, 0)
    assert all((np.where(owned, e & STEP_MASK, 0) == step).all() for e in entry[1:]), "arenas disagree on a step"
    return PageLists(pages, step, np.where(owned, entry >> STEP_BITS, 0), owned, kv_lens, raw)


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


def _tiles(storage: GroupStorage, lists: PageLists, chosen: np.ndarray, one_item_tiles: bool) -> tuple[Tile, ...]:
    """Tiles over the pages where ``chosen``, bool ``[R, n]``."""
    shape, steps = storage.shape, storage.group.steps
    p, h = shape.page_size, shape.num_kv_heads
    page_elements = h * p * shape.head_dim
    requests = lists.kv_lens.size
    request, column = np.nonzero(chosen)
    if not request.size:
        return ()
    # A run: the pages of one request at one step. Stable, so columns ascend inside a run.
    run = lists.step[request, column] * requests + request
    order = np.argsort(run, kind="stable")
    run, request, column = run[order], request[order], column[order]
    per_run = np.bincount(run, minlength=len(steps) * requests)
    overhead = TILE_OVERHEAD_TOKENS if one_item_tiles else ITEM_OVERHEAD_TOKENS
    c = _pages_per_item(per_run, p, BLOCK_ELEMENTS // page_elements, overhead)
    items_of = -(-per_run // c)
    rank = np.arange(run.size) - (np.cumsum(per_run) - per_run)[run]
    item = (np.cumsum(items_of) - items_of)[run] + rank // c
    items, cell = int(items_of.sum()), item * c + rank % c
    item_run = np.repeat(np.arange(per_run.size), items_of)
    item_step, item_request = np.divmod(item_run, requests)

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros(items * c, dtype=np.int64)
        out[cell] = values
        return out.reshape(items, c)

    def head_rows(block: np.ndarray) -> np.ndarray:
        return (block[:, None, :] * h + np.arange(h)[:, None]).reshape(-1)

    token = column[:, None] * p + np.arange(p)
    missing = np.ones((items * c, p), dtype=bool)
    missing[cell] = token >= lists.kv_lens[request][:, None]
    missing = missing.reshape(items, c * p)
    position = None
    if one_item_tiles:
        position = np.full((items * c, p), NO_POSITION, dtype=np.int32)
        position[cell] = token
        position = position.reshape(items, c * p)
        position[missing] = NO_POSITION

    tier = np.array(steps)[item_step]  # [I, 2]
    pages = head_rows(spread(lists.pages[request, column]))
    unit = [spread(u[request, column]) for u in lists.unit]
    first_coded, rows16, rows, meta_rows, levels = [], [], [], [], []
    for side in SIDES:
        n = int((tier[:, side] == 16).sum())
        block = unit[storage.arena_of(side)] // (tier[:, side, None] // MIN_TIER)
        first_coded.append(n)
        rows16.append(upload(storage, block[:n].reshape(-1)))
        rows.append(upload(storage, head_rows(block[n:])))
        meta_rows.append(upload(storage, pages[n * h * c :]))
        level = (1 << np.repeat(tier[n:, side], h)) - 1
        levels.append(torch.from_numpy(level.astype(np.float32)).to(storage.device).view(-1, 1, 1, 1))

    def side_rows(side: int, a: int, b: int) -> torch.Tensor:
        n = first_coded[side]
        return rows16[side][a * c : b * c] if a < n else rows[side][(a - n) * h * c : (b - n) * h * c]

    def block_of(start: int, a: int, b: int) -> Block:
        stale = None
        if a < first_coded[V] and missing[a:b].any():
            stale = upload(storage, np.flatnonzero(np.repeat(missing[a:b, None], h, axis=1)))
        return Block((a - start) * h, (b - start) * h, (side_rows(K, a, b), side_rows(V, a, b)), stale)

    request_t = upload(storage, item_request)
    tile_items = 1 if one_item_tiles else max(1, TILE_ELEMENTS // (page_elements * c))
    block_items = max(1, BLOCK_ELEMENTS // (page_elements * c))
    step_starts = np.searchsorted(item_step, np.arange(len(steps) + 1)).tolist()
    tiles = []
    for a in range(0, items, tile_items):
        b = min(a + tile_items, items)
        runs = []
        for tiers, (low, high) in zip(steps, pairwise(step_starts), strict=True):
            low, high = max(low, a), min(high, b)
            if low < high:
                blocks = [block_of(a, x, min(x + block_items, high)) for x in range(low, high, block_items)]
                runs.append(Run(tiers, (low - a) * h, (high - a) * h, tuple(blocks), block_items * h))
        coded = [slice(max(a - n, 0) * h, max(b - n, 0) * h) for n in first_coded]
        hidden = None
        if missing[a:b].any():
            hidden = torch.from_numpy(np.repeat(missing[a:b, None], h, axis=0)).to(storage.device)
        seen = None if position is None else position[a:b][~missing[a:b]]
        whole_k, whole_v = ((min(max(n, a), b) - a) * h for n in first_coded)
        meta_k, meta_v = (r[x.start * c : x.stop * c] for r, x in zip(meta_rows, coded, strict=True))
        levels_k, levels_v = (x[part] for x, part in zip(levels, coded, strict=True))
        tiles.append(
            Tile(
                items=b - a,
                pages_per_item=c,
                request=request_t[a:b],
                runs=tuple(runs),
                whole=(whole_k, whole_v),
                meta_rows=(meta_k, meta_v),
                levels=(levels_k, levels_v),
                absent=hidden,
                position=None if position is None else torch.from_numpy(position[a:b, None]).to(storage.device),
                first=0 if seen is None else int(seen.min()),
                last=0 if seen is None else int(seen.max()),
            )
        )
    return tuple(tiles)


def _pages_per_item(per_run: np.ndarray, page_size: int, most: int, overhead: int) -> int:
    """Pages per item, at most ``most``, that cost least: padded tokens plus ``overhead`` tokens per item."""
    best, best_cost, c = 1, float("inf"), 1
    while c == 1 or (c <= most and c * page_size <= MAX_ITEM_TOKENS):
        cost = int((-(-per_run // c)).sum()) * (c * page_size + overhead)
        if cost < best_cost:
            best, best_cost = c, cost
        c *= 2
    return best


def upload(storage: GroupStorage, values: np.ndarray) -> torch.Tensor:
    """Host integers as an int64 tensor on the storage's device."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(storage.device)
