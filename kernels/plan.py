"""Index tensors of one forward and layer group, shared by all its layers.

Attention does not depend on the order of KV, so the pages of the requests are bucketed by step:
within a bucket both tiers are known and the code that reads it is straight. A bucket is cut into
*items*, each up to ``C`` pages of one request, and consecutive items into *tiles*, which are read and
computed together. Every item gives a split-KV partial (max, sum, output), and the partials of a
request are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, tier_units
from sglang_pmkvq.kernels.storage import GroupStorage

# Pages per item are chosen per bucket: long items have less overhead, short ones less padding. An
# item's own cost (partials, merge) is about that of this many tokens; measured, and flat around it.
ITEM_OVERHEAD_TOKENS = 24
MAX_ITEM_TOKENS = 512
# fp32 elements of one unpacked side of a tile: small enough for the caches, large enough to hide
# the cost of calling torch some forty times per tile. Measured on two cores, flat within 2x.
TILE_ELEMENTS = 1 << 20
NO_POSITION = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Tile:
    """A run of items of one step that are read together: n items of C pages, B = n·H rows.

    Attributes:
        tiers: (K tier, V tier).
        items: n.
        pages_per_item: C.
        request: int64 ``[n]``, row of each item's request among the planned ones, ascending.
        rows: per side, int64 ``[B*C]`` rows (block · H + head) of the codes, ordered item, head,
            page; for a 16-bit side ``[n*C]`` superblocks. Padding reads block 0.
        meta_rows: int64 ``[B*C]``, rows (page · H + head) of the side arrays. Padding reads page 0.
        absent: bool ``[B, 1, C*P]``, True for padding and tokens past the end; None without any.
        absent_rows: int64, flat positions of the True ones; None without any.
        position: int32 ``[1, 1, C*P]``, position of each token in its sequence, ``NO_POSITION`` where
            absent; only in tiles of one item, for the causal mask.
        first, last: smallest and largest present position.
    """

    tiers: tuple[int, int]
    items: int
    pages_per_item: int
    request: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    meta_rows: torch.Tensor
    absent: torch.Tensor | None
    absent_rows: torch.Tensor | None
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
    tiles: list[Tile] = []
    for step, tiers in enumerate(storage.group.steps):
        request, column = np.nonzero((lists.step == step) & lists.owned)
        if request.size:
            tiles += _build_bucket(storage, lists, tiers, request, column, one_item_tiles)
    return tuple(tiles)


def _pages_per_item(per_request: np.ndarray, page_size: int) -> int:
    """Pages per item that cost least: padded tokens plus a fixed cost per item."""
    best, best_cost, c = 1, float("inf"), 1
    while c * page_size <= MAX_ITEM_TOKENS:
        items = int((-(-per_request // c)).sum())
        cost = items * (c * page_size + ITEM_OVERHEAD_TOKENS)
        if cost < best_cost:
            best, best_cost = c, cost
        c *= 2
    return best


def _build_bucket(
    storage: GroupStorage,
    lists: PageLists,
    tiers: tuple[int, int],
    request: np.ndarray,
    column: np.ndarray,
    one_item_tiles: bool,
) -> list[Tile]:
    """Tiles of one step from its (request, page column) pairs, sorted by request and then by column."""
    p, h, d = storage.shape.page_size, storage.shape.num_kv_heads, storage.shape.head_dim
    per_request = np.bincount(request, minlength=lists.kv_lens.size)
    c = _pages_per_item(per_request, p)
    items_of = -(-per_request // c)
    rank = np.arange(request.size) - (np.cumsum(per_request) - per_request)[request]
    item = (np.cumsum(items_of) - items_of)[request] + rank // c
    items, cell = int(items_of.sum()), item * c + rank % c

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros(items * c, dtype=np.int64)
        out[cell] = values
        return out

    def head_rows(block: np.ndarray) -> np.ndarray:
        return (block.reshape(items, 1, c) * h + np.arange(h)[:, None]).reshape(-1)

    def side_rows(side: int) -> torch.Tensor:
        unit = spread(lists.unit[storage.arena_of(side)][request, column])
        block = unit // tier_units(tiers[side])
        return upload(storage, block if tiers[side] == 16 else head_rows(block))

    position = np.full((items * c, p), NO_POSITION, dtype=np.int32)
    position[cell] = column[:, None] * p + np.arange(p, dtype=np.int32)
    position = position.reshape(items, c * p)
    item_request = np.repeat(np.arange(lists.kv_lens.size), items_of)
    absent = position >= lists.kv_lens[item_request][:, None]
    position[absent] = NO_POSITION
    first, last = position.min(axis=1), np.where(absent, -1, position).max(axis=1)

    rows = (side_rows(0), side_rows(1))
    per_item = tuple(c if tier == 16 else h * c for tier in tiers)
    meta_rows = upload(storage, head_rows(spread(lists.pages[request, column])))
    request_t = upload(storage, item_request)
    n = 1 if one_item_tiles else max(1, TILE_ELEMENTS // (h * c * p * d))
    tiles = []
    for a in range(0, items, n):
        b = min(a + n, items)
        hidden = hidden_rows = None
        if absent[a:b].any():
            by_head = np.repeat(absent[a:b, None], h, axis=0)
            hidden = torch.from_numpy(by_head).to(storage.device)
            hidden_rows = upload(storage, np.flatnonzero(by_head))
        tiles.append(
            Tile(
                tiers=tiers,
                items=b - a,
                pages_per_item=c,
                request=request_t[a:b],
                rows=(
                    rows[0][a * per_item[0] : b * per_item[0]],
                    rows[1][a * per_item[1] : b * per_item[1]],
                ),
                meta_rows=meta_rows[a * h * c : b * h * c],
                absent=hidden,
                absent_rows=hidden_rows,
                position=torch.from_numpy(position[a:b, None]).to(storage.device) if one_item_tiles else None,
                first=int(first[a:b].min()),
                last=int(last[a:b].max()),
            )
        )
    return tiles


def upload(storage: GroupStorage, values: np.ndarray) -> torch.Tensor:
    """Host integers as an int64 tensor on the storage's device."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(storage.device)
