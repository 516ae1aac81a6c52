"""SGLang's paged allocator contract over the ledger: logical slots out, request events in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_pmkvq.ledger import IntegrityError, Ledger
from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.engine import BaseTokenToKVPoolAllocator

if TYPE_CHECKING:
    from sglang_pmkvq.serving.engine import Req, ScheduleBatch
    from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool


class PmkvqAllocator(BaseTokenToKVPoolAllocator):
    """Hands out logical slots (slot = page · P + offset) and tells the ledger who they belong to.

    SGLang's calls name neither requests nor prefixes, so hooks around ``alloc_for_extend`` and
    ``alloc_for_decode`` put the batch into ``batch_context`` first. Every decision is the ledger's;
    none depends on a clock or the device's free memory, so ranks that see the same events decide
    alike.

    Attributes:
        alloc_seconds: host time that the ledger took for allocations since the last forward; for the metrics, no
            decision depends on it.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: MixedPrecisionTokenPool,
        need_sort: bool,
        max_requests: int,
    ) -> None:
        self._page_tensor: torch.Tensor | None = None
        super().__init__(size, page_size, dtype, device, kvcache, need_sort)
        setup = kvcache.setup
        if size != setup.tokens:
            raise ValueError(f"SGLang asks for {size} tokens, the pool was sized for {setup.tokens}")
        self.ledger = Ledger(setup.geometry, setup.policy, max_requests, self._evict_pages)
        # Told of evictions and flushes: (name, **fields).
        self.on_event: Callable[..., None] | None = None
        self._batch: ScheduleBatch | None = None
        self._tree: Any = None
        self.alloc_seconds = 0.0
        self._in_row_rewrite = False
        self._rewritten = False
        self._group: list[np.ndarray] = []
        self.clear()

    # -- sizes -----------------------------------------------------------------------------------------------

    def available_size(self) -> int:
        """Free logical tokens. O(1), host only."""
        return self.ledger.free_page_count * self.page_size

    @property
    def free_pages(self) -> torch.Tensor | None:
        """Free logical page ids, int64; read by SGLang's optional invariant checks only."""
        if not hasattr(self, "ledger"):
            return None
        return torch.from_numpy(self.ledger.free_page_ids()).to(self.device)

    @free_pages.setter
    def free_pages(self, value: object) -> None:
        """SGLang's base class assigns it; the ledger alone keeps the free list."""

    # -- what the hooks tell us ------------------------------------------------------------------------------

    @contextmanager
    def batch_context(self, batch: ScheduleBatch) -> Iterator[None]:
        """The batch that the coming ``alloc_extend`` or ``alloc_decode`` is for."""
        self._batch, self._tree = batch, engine.tree_of(batch)
        try:
            yield
        finally:
            self._batch = None

    @contextmanager
    def row_rewrite(self, req: Req) -> Iterator[None]:
        """Around the radix tree's ``cache_unfinished_req``: it may replace pages of a running request.

        Only then is the request's page list read back, which on a GPU waits for a copy.
        """
        self._in_row_rewrite, self._rewritten = True, False
        try:
            yield
        finally:
            self._in_row_rewrite = False
        slot = engine.request_slot(req)
        if self._rewritten and slot is not None:
            self.ledger.rebind(slot, self._pages_of([engine.prefix_slots(req)])[0])

    def finish(self, slot: int) -> None:
        """The request in ``slot`` ended, was aborted or retracted."""
        self.ledger.finish(slot)

    # -- SGLang's contract -----------------------------------------------------------------------------------

    def alloc(self, need_size: int) -> torch.Tensor | None:
        pages = self.ledger.alloc(-(-need_size // self.page_size))
        if pages is None:
            return None
        slots = (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)[:need_size]
        return torch.from_numpy(slots).to(self.device)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of a prefill batch, int64 [extend_num_tokens]; None if logical pages are lacking."""
        reqs = self._batch_reqs("alloc_extend")
        page = self.page_size
        before, after = prefix_lens_cpu.numpy(), seq_lens_cpu.numpy()
        prefix_pages = self._pages_of([engine.prefix_slots(req) for req in reqs])
        start = perf_counter()
        new = self.ledger.extend(_slots(reqs), prefix_pages, before, after)
        self.alloc_seconds += perf_counter() - start
        if new is None:
            return None
        # Per request the pages that its new tokens touch: its partial last page, if any, then new ones.
        counts = -(-after // page) - -(-before // page)
        touched = np.split(new, np.cumsum(counts)[:-1])
        slots = np.empty(extend_num_tokens, np.int64)
        start = 0
        for i in range(len(reqs)):
            pages = touched[i]
            if before[i] % page:
                pages = np.concatenate((prefix_pages[i][-1:], pages))
            position = np.arange(before[i], after[i])
            end = start + len(position)
            slots[start:end] = pages[position // page - before[i] // page] * page + position % page
            start = end
        return torch.from_numpy(slots).to(self.device, non_blocking=True)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request, int64 [batch]; None if logical pages are lacking."""
        reqs = self._batch_reqs("alloc_decode")
        slots = np.array(_slots(reqs), np.int64)
        after = seq_lens_cpu.numpy()
        start = perf_counter()
        new = self.ledger.append(slots, after)
        self.alloc_seconds += perf_counter() - start
        if new is None:
            return None
        out = last_loc.to(torch.int64) + 1
        if len(new):
            starts = np.flatnonzero((after - 1) % self.page_size == 0)
            index = torch.from_numpy(starts).to(self.device, non_blocking=True)
            out[index] = torch.from_numpy(new * self.page_size).to(self.device, non_blocking=True)
        return out

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel() == 0:
            return
        if self._in_row_rewrite:
            self._rewritten = True
        pages = np.unique(free_index.cpu().numpy() // self.page_size)
        if self.is_not_in_free_group:
            self.ledger.free(pages)
        else:
            self._group.append(pages)

    def free_group_begin(self) -> None:
        self.is_not_in_free_group = False
        self._group = []

    def free_group_end(self) -> None:
        self.is_not_in_free_group = True
        if self._group:
            self.ledger.free(np.unique(np.concatenate(self._group)))
            self._group = []

    def clear(self) -> None:
        """Everything free again (``/flush_cache``); the device follows at the next forward."""
        self.ledger.clear()
        self._report("flush")
        self.is_not_in_free_group = True
        self._group = []
        self.release_pages = torch.empty((0,), dtype=torch.int64, device=self.device)

    def backup_state(self) -> None:
        raise NotImplementedError("--kv-quant pmkvq: speculative decoding is not supported")

    def restore_state(self, state: object) -> None:
        raise NotImplementedError("--kv-quant pmkvq: speculative decoding is not supported")

    def check(self) -> None:
        """The books of the ledger agree, and the device's page tables with them; O(pages), for debugging.

        Raises:
            IntegrityError: they do not.
        """
        self.ledger.check_integrity()
        if self.ledger.pending:
            return
        for group, storage in enumerate(self._kvcache.storages):
            for arena, table in enumerate(storage.table.cpu().numpy()):
                wrong = np.flatnonzero(table != self.ledger.entries(group, arena))
                if len(wrong):
                    raise IntegrityError(
                        f"group {group} arena {arena}: the device's page table differs for pages {wrong[:8].tolist()}"
                    )

    # -- inside ----------------------------------------------------------------------------------------------

    def _batch_reqs(self, what: str) -> list[Req]:
        if self._batch is None:
            raise RuntimeError(f"--kv-quant pmkvq: {what} was called outside SGLang's alloc_for_* functions")
        return self._batch.reqs

    def _pages_of(self, slot_lists: list[torch.Tensor]) -> list[np.ndarray]:
        """Logical pages of each list of slots in sequence order, in one copy to the host."""
        page = self.page_size
        firsts = [slots[::page] for slots in slot_lists]
        lengths = [len(first) for first in firsts]
        if not any(lengths):
            return [np.empty(0, np.int64) for _ in lengths]
        pages = (torch.cat(firsts).to(torch.int64) // page).cpu().numpy()
        return np.split(pages, np.cumsum(lengths)[:-1])

    def _evict_pages(self, pages: int) -> int:
        """Ask SGLang's tree to evict about ``pages`` cached pages (its own order); returns how many went."""
        before = self.ledger.free_page_count
        engine.evict(self._tree, pages * self.page_size)
        evicted = self.ledger.free_page_count - before
        if evicted:
            self._report("evict", pages=evicted)
        return evicted

    def _report(self, event: str, **fields: object) -> None:
        if self.on_event is not None:
            self.on_event(event, **fields)


def _slots(reqs: list[Req]) -> list[int]:
    """Rows of requests that are about to run."""
    slots = [engine.request_slot(req) for req in reqs]
    assert None not in slots
    return slots  # type: ignore[return-value]
