"""Runs command batches on symbolic arenas and refuses what a device could get wrong.

Every unit of every arena holds a token (page, life of the page, tier, offset in the block). Copies
of a wave read the state before the wave and write after it; in a wave no unit may be both read and
written, nor written twice. After the table updates, every mapped page must be found where the table
says, at the tier its step says, with its own content: a born page's block is what the coming
forward fills, and it must not be in use by anyone else.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sglang_pmkvq.commands import ArenaCopies, CommandBatch
from sglang_pmkvq.formats import MIN_TIER, STEP_BITS, STEP_MASK, UNMAPPED, PoolGeometry, tier_units
from sglang_pmkvq.ledger.errors import ReplayError

_EMPTY = -1
# Tier of a born page's tokens; a page's life number tells a re-born page from its former self.
_FIELDS = 4


class Replay:
    """A symbolic device: page tables and arena contents, driven by command batches only.

    Attributes:
        tables: ``tables[group][arena]``, int32 [N + 1].
        waves, copies: totals executed. longest: most waves in one batch.
    """

    def __init__(self, geometry: PoolGeometry) -> None:
        self.geometry = geometry
        size = geometry.num_pages + 1
        self.tables = [[np.full(size, UNMAPPED, np.int32) for _ in counts] for counts in geometry.superblocks]
        self._arenas = [
            [np.full((count * 8, _FIELDS), _EMPTY, np.int64) for count in counts] for counts in geometry.superblocks
        ]
        self._life = np.zeros(size, np.int64)
        self.waves = self.copies = self.longest = 0

    def run(self, batch: CommandBatch, born: Iterable[int] = ()) -> None:
        """Execute a batch, then the forward's writes to the pages ``born`` since the last one.

        Raises:
            ReplayError: a hazard, a source without the page's content, a table that lies.
        """
        self.longest = max(self.longest, len(batch.waves))
        for number, wave in enumerate(batch.waves):
            self._wave(number, wave)
        for update in batch.table:
            page = update.page
            if len(np.unique(page)) != len(page):
                raise ReplayError(f"group {update.group} arena {update.arena}: a page is updated twice")
            self.tables[update.group][update.arena][page] = update.entry
        self._write(sorted(set(born)))

    def _wave(self, number: int, wave: tuple[ArenaCopies, ...]) -> None:
        self.waves += 1
        if len({(c.group, c.arena) for c in wave}) != len(wave):
            raise ReplayError(f"wave {number}: an arena comes twice")
        for copies in wave:
            content = self._arenas[copies.group][copies.arena]
            where = f"wave {number} group {copies.group} arena {copies.arena}"
            touched = np.zeros(len(content), np.int8)  # 1 read, 2 written
            writes: list[tuple[int, np.ndarray]] = []
            rows = zip(
                copies.page.tolist(),
                copies.src_unit.tolist(),
                copies.dst_unit.tolist(),
                copies.src_tier.tolist(),
                copies.dst_tier.tolist(),
                strict=True,
            )
            for page, src, dst, src_tier, dst_tier in rows:
                self.copies += 1
                if dst_tier > src_tier or (src_tier == dst_tier == 16):
                    raise ReplayError(f"{where}: page {page} goes from {src_tier} to {dst_tier} bits")
                src_end, dst_end = src + tier_units(src_tier), dst + tier_units(dst_tier)
                if max(src_end, dst_end) > len(content) or min(src, dst) < 0:
                    raise ReplayError(f"{where}: page {page} copies {src}..{src_end} to {dst}..{dst_end}")
                if (touched[src:src_end] == 2).any() or touched[dst:dst_end].any():
                    raise ReplayError(f"{where}: page {page}, {src} to {dst}: bytes are in use in this wave")
                touched[src:src_end] = 1
                touched[dst:dst_end] = 2
                expected = self._tokens(page, src_tier)
                if not np.array_equal(content[src:src_end], expected):
                    raise ReplayError(
                        f"{where}: page {page} at {src_tier} bits expected in unit {src}, found "
                        f"{content[src:src_end].tolist()}"
                    )
                writes.append((dst, self._tokens(page, dst_tier)))
            for dst, tokens in writes:
                content[dst : dst + len(tokens)] = tokens

    def _tokens(self, page: int, tier: int) -> np.ndarray:
        units = tier_units(tier)
        tokens = np.empty((units, _FIELDS), np.int64)
        tokens[:, 0], tokens[:, 1], tokens[:, 2] = page, self._life[page], tier
        tokens[:, 3] = np.arange(units)
        return tokens

    def _write(self, born: list[int]) -> None:
        """The forward fills the born pages that are still mapped, at 16 bits."""
        for page in born:
            self._life[page] += 1
            for group, arenas in enumerate(self._arenas):
                for arena, content in enumerate(arenas):
                    entry = int(self.tables[group][arena][page])
                    if entry == UNMAPPED:
                        continue
                    if entry & STEP_MASK:
                        raise ReplayError(f"group {group}: born page {page} is at step {entry & STEP_MASK}")
                    unit = entry >> STEP_BITS
                    content[unit : unit + 8] = self._tokens(page, 16)

    def check(self, mapped: np.ndarray) -> None:
        """Every page of bool [N + 1] ``mapped`` is found with its content, once; no other is mapped.

        Page 0 must be mapped; its content is nobody's concern.

        Raises:
            ReplayError: it is not so.
        """
        for group, spec in enumerate(self.geometry.groups):
            for arena, content in enumerate(self._arenas[group]):
                table = self.tables[group][arena]
                where = f"group {group} arena {arena}"
                if not np.array_equal(table != UNMAPPED, mapped):
                    bad = np.flatnonzero((table != UNMAPPED) != mapped)
                    raise ReplayError(f"{where}: pages {bad[:8].tolist()} are mapped or free against the books")
                pages = np.flatnonzero(mapped)
                first, step = table[pages] >> STEP_BITS, table[pages] & STEP_MASK
                other = self.tables[group][0][pages] & STEP_MASK
                if not np.array_equal(step, other):
                    raise ReplayError(
                        f"{where}: pages {pages[step != other][:8].tolist()} have another step in arena 0"
                    )
                tiers = np.array([spec.arena_tier(arena, s) for s in range(spec.final_step + 1)])[step]
                sizes = tiers // MIN_TIER
                # One row per unit of every block: whose it is, and its place in the block.
                row = np.repeat(np.arange(len(pages)), sizes)
                place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
                unit = first[row] + place
                if len(np.unique(unit)) != len(unit):
                    raise ReplayError(f"{where}: pages share units")
                expected = np.stack([pages[row], self._life[pages[row]], tiers[row], place], axis=1)
                wrong = (content[unit] != expected).any(axis=1) & (pages[row] > 0)
                if wrong.any():
                    at = int(np.flatnonzero(wrong)[0])
                    raise ReplayError(
                        f"{where}: page {pages[row[at]]} at {tiers[row[at]]} bits expected in unit {unit[at]}, "
                        f"found {content[unit[at]].tolist()}, expected {expected[at].tolist()}"
                    )
