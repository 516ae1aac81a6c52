"""Codes and 16-bit values as fp32, a strip at a time, in a workspace that stays in the core's L2.

Planes of codes below 8 bits are masked, not shifted, so plane i holds codes · 2^(b·i); whoever multiplies with them
multiplies the query, or the output, by the inverse (``plane_factor``), which is exact. Few queries read the planes
apart, as they are packed; for many it pays to put the channels in order first (``planes_apart``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from sglang_pmkvq.kernels import plan
from sglang_pmkvq.kernels.plan import Run, Tile
from sglang_pmkvq.kernels.storage import GroupStorage

# Forms of strips whose views a workspace keeps.
MAX_FORMS = 256
# Queries per row up to which planes are read apart: a product over the channels of a plane is slower than one over all
# of them, and putting them in order costs as much as some ten queries.
PLANAR_QUERIES = 16


class Unpacked(NamedTuple):
    """Views of a workspace for strips of one form, made once: anew they would cost half of a strip's time.

    Attributes:
        gathered: rows of the strip as they are stored: int64 words of codes, 16-bit values in their own dtype.
        words, masked: codes below 8 bits, int64 ``[B, 1, x]``, and their planes ``[B, n, x]``; else None.
        narrow, target: bytes or 16-bit values and where they are widened to, fp32, of equal shape.
        values: what comes of it, fp32 ``[B*n, T, w]``. transposed: the same, ``[B*n, w, T]``.
    """

    gathered: torch.Tensor
    words: torch.Tensor | None
    masked: torch.Tensor | None
    narrow: torch.Tensor
    target: torch.Tensor
    values: torch.Tensor
    transposed: torch.Tensor


class Workspace:
    """What one strip is unpacked in: 7 bytes per element, one per thread and device, used anew by every strip."""

    _own = threading.local()

    def __init__(self, elements: int, device: torch.device) -> None:
        self.elements = elements
        self._gathered = torch.empty(elements // 4, dtype=torch.int64, device=device)
        self._masked = torch.empty(elements // 8, dtype=torch.int64, device=device)
        self._wide = torch.empty(elements, dtype=torch.float32, device=device)
        self._forms: dict[tuple[object, ...], Unpacked] = {}

    @classmethod
    def of(cls, storage: GroupStorage) -> Workspace:
        """This thread's workspace: for ``STRIP_ELEMENTS``, or for one page of all heads if that is more."""
        s = storage.shape
        elements = max(plan.STRIP_ELEMENTS, s.page_size * s.num_kv_heads * s.head_dim)
        held: dict[torch.device, Workspace] = cls._own.__dict__.setdefault("held", {})
        found = held.get(storage.device)
        if found is None or found.elements < elements:
            found = held[storage.device] = cls(elements, storage.device)
        return found

    @property
    def nbytes(self) -> int:
        return self._gathered.nbytes + self._masked.nbytes + self._wide.nbytes

    def form(self, storage: GroupStorage, bits: int, b: int, pages: int, planar: bool) -> Unpacked:
        """Views for strips of ``b`` rows (item, head) of ``pages`` pages, see ``unpacked``."""
        key = (storage.shape, storage.dtype, bits, b, pages, planar)
        found = self._forms.get(key)
        if found is None:
            if len(self._forms) >= MAX_FORMS:
                self._forms.clear()
            found = self._forms[key] = self._make(storage, bits, b, pages, planar)
        return found

    def _make(self, storage: GroupStorage, bits: int, b: int, pages: int, planar: bool) -> Unpacked:
        s = storage.shape
        h, d, t = s.num_kv_heads, s.head_dim, pages * s.page_size
        count, n = b * t * d, max(1, 8 // bits)
        wide = self._wide[:count]
        gathered = self._gathered[: count * bits // 64]
        words = masked = None
        if bits == 16:
            values16 = gathered.view(storage.dtype)
            gathered = values16.view(b * pages // h, -1)
            narrow, target = values16.view(-1, t, h, d).transpose(1, 2), wide.view(-1, h, t, d)
        else:
            gathered = gathered.view(b * pages, -1)
            if n > 1:
                words = gathered.view(b, 1, -1)
                masked = self._masked[: count // 8].view(b, n, -1)
            narrow = (gathered if masked is None else masked).view(torch.uint8).view(b, n, t, d // n)
            target = wide.view(b, n, t, d // n) if planar else wide.view(b, t, n, d // n).transpose(1, 2)
        values = wide.view(-1, t, d // n) if planar else wide.view(b, t, d)
        return Unpacked(gathered, words, masked, narrow, target, values, values.transpose(1, 2))


def planes_apart(bits: int, queries: int) -> int:
    """Planes that products go over one by one."""
    return 8 // bits if queries <= PLANAR_QUERIES else 1


@lru_cache(maxsize=64)
def plane_factor(bits: int, n: int, w: int, device: torch.device) -> torch.Tensor:
    """What undoes the places of unshifted planes, fp32 ``[n, 1, w]``: 2^(−b·i) for the channels of plane i."""
    plane = torch.arange(n * w, device=device) // (n * w * bits // 8)
    return torch.exp2(-bits * plane.to(torch.float32)).view(n, 1, w)


@lru_cache(maxsize=8)
def _plane_masks(bits: int, device: torch.device) -> torch.Tensor:
    """The bits of each plane in every byte of a word, int64 ``[8/bits, 1]``."""
    byte = [((1 << bits) - 1) << (bits * i) for i in range(8 // bits)]
    words = torch.tensor(byte, dtype=torch.uint8).unsqueeze(1).repeat(1, 8).view(torch.int64)
    return words.to(device)


def unpacked(storage: GroupStorage, side: int, layer: int, tile: Tile, run: Run, queries: int) -> Iterator[Unpacked]:
    """The strips of a run as fp32 in the workspace, each until the next is asked for.

    16-bit values, or codes with plane i times 2^(bits·i); ``[B*n, T, w]`` with n planes of w = D/n channels where
    planes are read apart, else n = 1, w = D and the channels in order.
    """
    bits, workspace = run.tiers[side], Workspace.of(storage)
    rows = storage.page_rows16[side][layer] if bits == 16 else storage.code_words[bits][side][layer]
    view, size = None, 0
    for strip in run.strips:
        if view is None or strip.stop - strip.start != size:
            size = strip.stop - strip.start
            view = workspace.form(storage, bits, size, tile.pages_per_item, queries <= PLANAR_QUERIES)
        torch.index_select(rows, 0, strip.rows[side], out=view.gathered)
        if view.words is not None and view.masked is not None:
            torch.bitwise_and(view.words, _plane_masks(bits, rows.device), out=view.masked)
        view.target.copy_(view.narrow)
        yield view
