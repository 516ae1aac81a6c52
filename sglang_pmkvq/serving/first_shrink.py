"""What happens once, before the first keys of a pool become codes: their centres are measured, and what coding costs.

Until then every page is at 16 bits, so the pool itself is the data. Centres that were to come (``Center.to_come``) are
the mean of R_m⁻¹ k_m over the tokens of whole pages, and stay for the life of the process: codes cannot change theirs.
If too few tokens are there, the first codes have no centre, and it is tried again when none of those codes is left.
Of each layer group, keys of the first pages that shrink are kept until queries pass by, and the error that their
codes make in attention logits is measured with them. Then nothing of this is left on any path.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNITS_PER_SUPERBLOCK, K
from sglang_pmkvq.kernels.reference.scores import key_error
from sglang_pmkvq.kernels.rotary import CENTER_TOLERANCE, MEASURED_BLOCKS, MIN_CENTER_TOKENS, chosen_blocks
from sglang_pmkvq.kernels.storage import GroupStorage

if TYPE_CHECKING:
    from sglang_pmkvq.ledger import Ledger

logger = logging.getLogger(__name__)

# Centres are means over at most so many tokens, evenly spread.
MAX_CENTER_TOKENS = 8192
# Tokens that are turned back at once: bounds the fp32 workspace.
ROUND_TOKENS = 1024
# Keys and rows of queries that the error of logits is measured with.
SAMPLED_KEYS = 64
SAMPLED_QUERIES = 32
# Relative error of attention logits above which answers suffer.
KEY_ERROR_HARMS = 0.75


@dataclass(frozen=True)
class MeasuredCenters:
    """What became of centres that were to be measured.

    Attributes:
        tokens: that they are means of; fewer than ``MIN_CENTER_TOKENS`` and there are none yet.
        layers: that have one, of how many.
        seconds: it took.
    """

    tokens: int
    layers: int
    of_layers: int
    seconds: float


@dataclass(frozen=True)
class WorstLayer:
    """Of a layer group: the relative error of its attention logits (``key_error``), and its number in the model."""

    key_error: float
    layer: int


class _Sample:
    """Keys of a layer group that wait for queries.

    Attributes:
        keys: ``[L, H, T, D]``, 16 bits, at ``positions [T]``.
        errors: per layer, once measured.
    """

    def __init__(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        self.keys = keys
        self.positions = positions
        self.errors: dict[int, float] = {}


class FirstShrink:
    """Of the layer groups of a pool. Who executes commands calls ``before``, and attention ``queries``.

    Args:
        storages: of all layer groups.
        ledger: that the commands are from.

    Attributes:
        measured: what was found where centres were to come, at the last try; None before.
        errors: per layer group, once measured.
        waiting: there are sampled keys that want queries.
    """

    def __init__(self, storages: Sequence[GroupStorage], ledger: Ledger) -> None:
        self._storages = storages
        self._ledger = ledger
        self._to_come = [g for g, storage in enumerate(storages) if _is_to_come(storage)]
        self._unsampled = {g for g, storage in enumerate(storages) if storage.group.k_final < 16}
        self._samples: dict[int, _Sample] = {}
        self.measured: MeasuredCenters | None = None
        self.errors: dict[int, WorstLayer] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._samples)

    @property
    def watching(self) -> bool:
        """Whether ``before`` has anything left to do."""
        return bool(self._to_come or self._unsampled)

    def before(self, batch: CommandBatch) -> None:
        """Look at commands that are about to be executed; the pages are still as the forward before left them."""
        coded = {g: pages for g, s in enumerate(self._storages) if len(pages := _first_coded(batch, g, s))}
        if any(g in coded for g in self._to_come) and not self._codes_live(coded):
            self._measure_centers()
        for group in sorted(self._unsampled & coded.keys()):
            storage = self._storages[group]
            self._unsampled.discard(group)
            self._samples[group] = _sample(storage, coded[group])

    def _codes_live(self, coded: dict[int, np.ndarray]) -> bool:
        """Whether keys of groups whose centres are to come have codes already, other than those about to be made."""
        none = np.empty(0, np.int64)
        for group in self._to_come:
            whole = sum(tiers[K] == 16 for tiers in self._storages[group].group.steps)
            being_made = self._ledger.page_steps(coded.get(group, none))[group] >= whole
            if sum(self._ledger.groups[group].step_pages[whole:]) > being_made.sum():
                return True
        return False

    # -- centres ---------------------------------------------------------------------------------------------

    def _measure_centers(self) -> None:
        start = perf_counter()
        written = self._ledger.written_pages()
        pages = {g: _not_first(self._storages[g], _whole_pages(self._storages[g], written)) for g in self._to_come}
        size = self._storages[0].shape.page_size
        held = min(map(len, pages.values())) * size
        of_layers = sum(self._storages[g].num_layers for g in self._to_come)
        if held < MIN_CENTER_TOKENS:
            if self.measured is None:
                logger.info(
                    "pmkvq: keys have no centres yet: pages shrink while only %d tokens are there, and means need %d; "
                    "measured once so many are there and no page is coded, as after a flush",
                    held,
                    MIN_CENTER_TOKENS,
                )
            self.measured = MeasuredCenters(held, 0, of_layers, perf_counter() - start)
            return
        most = MAX_CENTER_TOKENS // size
        layers = sum(_fill(self._storages[g], _spread_evenly(found, most)) for g, found in pages.items())
        self.measured = MeasuredCenters(min(held, MAX_CENTER_TOKENS), layers, of_layers, perf_counter() - start)
        logger.info(
            "pmkvq: centres of keys measured over %d tokens, %d of %d layers have one, %.2f s",
            self.measured.tokens,
            layers,
            of_layers,
            self.measured.seconds,
        )
        # What was found of codes without a centre holds no more.
        self._unsampled |= set(self._to_come)
        self._to_come = []

    # -- errors ----------------------------------------------------------------------------------------------

    def queries(self, group: int, layer: int, q: torch.Tensor) -> None:
        """Queries ``[n, Hq, D]`` of layer ``layer`` of a group pass by, after their rotary embedding."""
        sample, storage = self._samples.get(group), self._storages[group]
        if sample is None or layer in sample.errors or not len(q):
            return
        chosen = torch.linspace(0, len(q) - 1, min(len(q), SAMPLED_QUERIES)).round().long().unique().to(q.device)
        coding, shape = storage.coding.pick(layer), storage.shape
        sample.errors[layer] = key_error(
            q[chosen], sample.keys[layer], coding, storage.group.k_final, shape.group_size, sample.positions
        )
        if len(sample.errors) == storage.num_layers:
            del self._samples[group]
            self._judge(group, sample.errors)

    def _judge(self, group: int, errors: dict[int, float]) -> None:
        spec = self._storages[group].group
        # What is not a number is worst.
        worst = max(errors, key=lambda layer: (errors[layer] != errors[layer], errors[layer]))
        found = self.errors[group] = WorstLayer(errors[worst], spec.layers[worst])
        if not found.key_error <= KEY_ERROR_HARMS:
            logger.warning(
                "pmkvq: %d-bit keys of layer group %s change attention logits by %.2f of what they vary (worst: layer "
                "%d), which harms answers; `pmkvq check MODEL` shows what to serve it with",
                spec.k_final,
                spec.name(),
                found.key_error,
                found.layer,
            )


def _is_to_come(storage: GroupStorage) -> bool:
    return storage.coding.center is not None and storage.coding.center.whole


def _first_coded(batch: CommandBatch, group: int, storage: GroupStorage) -> np.ndarray:
    """Pages of a group whose keys a batch takes from 16 bits to codes, in its order, each once."""
    found = [
        copies.page[(copies.src_tier == 16) & (copies.dst_tier < 16)]
        for wave in batch.waves
        for copies in wave
        if copies.group == group and K in storage.group.arena_sides[copies.arena]
    ]
    pages = np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)
    return pages[np.sort(np.unique(pages, return_index=True)[1])]


def _superblocks(storage: GroupStorage, pages: np.ndarray) -> np.ndarray:
    """Superblock of the keys of each page as the device's table has it now; −1 where they are not at 16 bits."""
    at = torch.from_numpy(pages).to(storage.device)
    entry = storage.table[storage.arena_of(K)].index_select(0, at).cpu().numpy().astype(np.int64)
    tiers = np.array([step[K] for step in storage.group.steps])
    step = np.where(entry < 0, 0, entry & STEP_MASK)
    return np.where((entry >= 0) & (tiers[step] == 16), (entry >> STEP_BITS) // UNITS_PER_SUPERBLOCK, -1)


def _whole_pages(storage: GroupStorage, written: np.ndarray) -> np.ndarray:
    """Those of ``written`` whose keys are at 16 bits."""
    return written[_superblocks(storage, written) >= 0]


def _spread_evenly(pages: np.ndarray, most: int) -> np.ndarray:
    return pages if len(pages) <= most else pages[np.linspace(0, len(pages) - 1, most).round().astype(np.int64)]


def _keys(storage: GroupStorage, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    """16-bit keys of a layer ``[H, n · P, D]``."""
    return storage.pages16(K, layer).index_select(0, blocks).permute(2, 0, 1, 3).flatten(1, 2)


def _not_first(storage: GroupStorage, pages: np.ndarray) -> np.ndarray:
    """Those of ``pages`` that begin no sequence: the key of a first token lies far from all others."""
    assert storage.page_columns is not None, "keys with a centre have a place"
    columns = storage.page_columns.index_select(0, torch.from_numpy(pages).to(storage.device))
    return pages[columns.cpu().numpy() > 0]


def _positions(storage: GroupStorage, pages: np.ndarray) -> torch.Tensor:
    """Of the tokens of pages, int64 ``[n · P]``; 0, 1, 2, … where no keys have a centre and nobody noted them."""
    size = storage.shape.page_size
    if storage.page_columns is None:
        return torch.arange(len(pages) * size, device=storage.device)
    columns = storage.page_columns.index_select(0, torch.from_numpy(pages).to(storage.device)).long()
    return (columns[:, None] * size + torch.arange(size, device=storage.device)).flatten()


def _sample(storage: GroupStorage, pages: np.ndarray) -> _Sample:
    """Of the oldest of ``pages`` that stand for others: none that begins a sequence, where means leave those out."""
    pages = _whole_pages(storage, pages)
    if storage.page_columns is not None:
        later = _not_first(storage, pages)
        pages = later if len(later) else pages
    pages = pages[: max(1, SAMPLED_KEYS // storage.shape.page_size)]
    blocks = torch.from_numpy(_superblocks(storage, pages)).to(storage.device)
    keys = torch.stack([_keys(storage, layer, blocks) for layer in range(storage.num_layers)])
    return _Sample(keys, _positions(storage, pages))


def _fill(storage: GroupStorage, pages: np.ndarray) -> int:
    """Measures the centres of a layer group over pages and takes them; how many layers have one."""
    center = storage.coding.center
    assert center is not None
    blocks = torch.from_numpy(_superblocks(storage, pages)).to(storage.device)
    positions = _positions(storage, pages)
    step = max(1, ROUND_TOKENS // storage.shape.page_size)
    means, spreads = [], []
    for layer in range(storage.num_layers):
        total, squares = torch.zeros(()).double(), torch.zeros(()).double()
        for at in range(0, len(pages), step):
            keys = _keys(storage, layer, blocks[at : at + step])
            part = slice(at * storage.shape.page_size, at * storage.shape.page_size + keys.shape[1])
            before = center.rotary.unturned(keys, positions[part]).double()
            total = total.to(before.device) + before.sum(1)
            squares = squares.to(before.device) + before.square().sum((1, 2))
        mean = total / positions.numel()
        if not bool(torch.isfinite(mean).all()):
            mean = torch.zeros_like(mean)
        means.append(mean.float())
        spreads.append((squares / positions.numel() - mean.square().sum(-1)).clamp_min(0))
    vector = torch.stack(means)
    tolerance = CENTER_TOLERANCE[storage.group.k_final]
    chosen = chosen_blocks(vector.cpu(), torch.stack(spreads).cpu(), center.rotary, tolerance, most=MEASURED_BLOCKS)
    center.fill(vector, chosen)
    return sum(bool(layer) for layer in chosen)
