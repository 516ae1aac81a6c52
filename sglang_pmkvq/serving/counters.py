"""What kernels counted on the device, read on the host now and then."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_pmkvq.kernels.storage import GroupStorage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceCounts:
    """What kernels counted since the start, over all layer groups.

    Attributes:
        overflow_groups: groups of channels with finite values beyond fp16, clamped at their first shrink.
        dropped_rows: new rows (one token in one layer) that were not stored, for their page was unmapped or shrunk.
        unmapped_reads: pages without a block that a plan of attention met.
    """

    overflow_groups: int
    dropped_rows: int
    unmapped_reads: int

    @property
    def lost(self) -> bool:
        """Whether a row or a page was lost, which ledger and kernels must never let happen."""
        return bool(self.dropped_rows or self.unmapped_reads)


class DeviceCounters:
    """The counters of all layer groups of a pool."""

    def __init__(self, storages: Sequence[GroupStorage]) -> None:
        self._storages = storages
        self._last = DeviceCounts(0, 0, 0)

    def read(self) -> DeviceCounts:
        """What the kernels counted since the start; waits for the device, once for all.

        Warns at the first value beyond fp16, and at CRITICAL at the first row that was not stored or page that was
        read without a block: then answers are wrong.
        """
        each = [(s.overflow_groups, s.dropped_rows, s.unmapped_reads) for s in self._storages]
        counts = DeviceCounts(*torch.stack([torch.stack(row) for row in each]).sum(dim=0).tolist())
        if counts.overflow_groups and not self._last.overflow_groups:
            logger.warning(
                "pmkvq: KV values beyond the fp16 range were clamped while shrinking; see %s",
                "sglang:pmkvq_overflow_groups_total",
            )
        if counts.lost and not self._last.lost:
            logger.critical(
                "pmkvq: %d new KV rows were not stored and %d pages without a block were read: answers are wrong, "
                "restart the server and report this; see %s",
                counts.dropped_rows,
                counts.unmapped_reads,
                "sglang:pmkvq_dropped_rows_total",
            )
        self._last = counts
        return counts
