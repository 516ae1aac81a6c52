"""What the page tables say about the requests of a forward in one layer group, on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK
from sglang_pmkvq.kernels.storage import GroupStorage


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


def write_columns(storage: GroupStorage, req_pages: torch.Tensor, prefix: np.ndarray, lens: np.ndarray) -> None:
    """Notes where in their sequence the pages of tokens ``prefix .. lens`` of each request stand, int64 ``[R]`` both.

    Nothing where no keys are centred. A page shared by requests stands at the same place in all of them.
    """
    if storage.page_columns is None:
        return
    p = storage.shape.page_size
    first, counts = prefix // p, -(-lens // p) - prefix // p
    request = np.repeat(np.arange(lens.size), counts)
    column = np.arange(request.size) - np.repeat(np.cumsum(counts) - counts, counts) + first[request]
    pages = req_pages[torch.from_numpy(request), torch.from_numpy(column)].long()
    storage.page_columns.index_copy_(
        0, pages.to(storage.device), torch.from_numpy(column).to(storage.device, torch.int32)
    )


def upload(storage: GroupStorage, values: np.ndarray) -> torch.Tensor:
    """Host integers as an int64 tensor on the storage's device."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(storage.device)
