"""What the ledger tells the device to do: the only language between the two. numpy, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ArenaCopies:
    """Block copies of one wave in one arena of one layer group; all layers of the group at once.

    ``src_tier == dst_tier`` is a move (compaction); ``src_tier == 16 > dst_tier`` quantizes and
    writes the page's (zero, range); ``16 > src_tier > dst_tier`` is the equivalent right shift.

    Attributes:
        group, arena: indices of the layer group and of the arena in it.
        page: int32 [n], logical pages (they index the side arrays).
        src_unit, dst_unit: int32 [n], first unit of the source and destination blocks.
        src_tier, dst_tier: uint8 [n], bits.
    """

    group: int
    arena: int
    page: np.ndarray
    src_unit: np.ndarray
    dst_unit: np.ndarray
    src_tier: np.ndarray
    dst_tier: np.ndarray


@dataclass(frozen=True)
class TableUpdate:
    """New page-table entries of one arena of one group, each page at most once.

    Attributes:
        page: int32 [n], logical pages.
        entry: int32 [n], ``unit << STEP_BITS | step`` or ``UNMAPPED``.
    """

    group: int
    arena: int
    page: np.ndarray
    entry: np.ndarray


@dataclass(frozen=True)
class CommandBatch:
    """Everything to execute before the next forward: the waves in order, then the table updates.

    In a wave no byte is both read and written and none is written twice; wave w + 1 may write what
    wave w read and read what wave w wrote.
    """

    waves: tuple[tuple[ArenaCopies, ...], ...] = ()
    table: tuple[TableUpdate, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.waves or self.table)
