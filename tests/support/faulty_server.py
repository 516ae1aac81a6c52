"""``sglang.launch_server`` with one fault planted in the scheduler process, chosen by ``PMKVQ_FAULT``.

Spawned schedulers import the main module again, so what is patched here is patched there too. Faults:

* ``shrink``: the 30th batch of commands that copies something fails on the device;
* ``workspace``: an allocation inside the kernels of that batch fails;
* ``ledger``: the ledger finds no bytes for the 30th forward that needs at most four pages, as decode steps do;
* ``pool``: the pool's tensors cannot be allocated at start;
* ``clock``: ``time`` jumps by years, to and fro, for our own modules;
* ``poison``: before every forward all bytes that no page owns, and the blocks of pages born for it, become NaN.
"""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

import numpy as np

FAULT = os.environ.get("PMKVQ_FAULT", "")
AT = 30


def countdown(error: Exception) -> Any:
    left = [AT]

    def tick() -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    return tick


def plant_shrink() -> None:
    from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool as Pool

    real, tick = Pool.execute, countdown(RuntimeError("injected: a shrink failed on the device"))

    def execute(self: Any, batch: Any) -> None:
        if batch.waves:
            tick()
        real(self, batch)

    Pool.execute = execute  # type: ignore[method-assign]


def plant_workspace() -> None:
    from sglang_pmkvq.kernels.cpu import codes

    real, tick = codes.quantize, countdown(MemoryError("injected: no memory for the kernels"))

    def quantize(*args: Any, **kwargs: Any) -> Any:
        tick()
        return real(*args, **kwargs)

    codes.quantize = quantize


def plant_ledger() -> None:
    from sglang_pmkvq.ledger import LedgerError
    from sglang_pmkvq.ledger.policy import Shrinker

    real, tick = Shrinker.make_room, countdown(LedgerError("injected: no bytes can be made free"))

    def make_room(self: Any, n: int) -> None:
        if n <= 4:
            tick()
        real(self, n)

    Shrinker.make_room = make_room  # type: ignore[method-assign]


def plant_pool() -> None:
    from sglang_pmkvq.serving import pool

    def allocate_pool(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("injected: the arenas cannot be allocated")

    pool.allocate_pool = allocate_pool


class WildTime:
    """The ``time`` module with clocks that jump by up to ten years."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(time, name)
        if name not in ("time", "monotonic", "perf_counter"):
            return real
        return lambda: real() + random.uniform(-3e8, 3e8)


def plant_clock() -> None:
    from sglang_pmkvq import timeline

    timeline.time = WildTime()  # type: ignore[assignment]
    # The default argument was bound when the class was made.
    writer = timeline.TimelineWriter.__init__
    writer.__defaults__ = (*(writer.__defaults__ or ())[:-1], WildTime().monotonic)


def plant_poison() -> None:
    from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNMAPPED
    from sglang_pmkvq.ledger.arena import BLOCK_USED
    from sglang_pmkvq.serving import runtime
    from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool as Pool

    real = Pool.execute
    # Which life of each page was mapped when the last forward was made; -1 where none.
    lives: list[np.ndarray] = []
    told: list[int] = []

    def execute(self: Any, batch: Any) -> None:
        real(self, batch)
        current = runtime.current()
        if current is None or current.allocator is None:
            return
        ledger = current.allocator.ledger
        gens = ledger.book.gen_np
        before = lives[0] if lives else np.full(len(gens), -1)
        poisoned = 0
        for storage, group in zip(self.storages, ledger.groups, strict=True):
            for index, arena in enumerate(group.arenas):
                units = np.ones(arena.units, bool)
                table = arena.entry_np
                for page in np.flatnonzero(table != UNMAPPED).tolist():
                    unit = int(table[page]) >> STEP_BITS
                    size = 1 << (arena.head[unit] - BLOCK_USED)
                    units[unit : unit + size] = page != 0 and not table[page] & STEP_MASK and before[page] != gens[page]
                poisoned += int(units.sum())
                for side in group.spec.arena_sides[index]:
                    data = storage.arenas[side]
                    # 0xFF bytes are NaN in bf16 and in fp16.
                    data.view(len(data), arena.units, -1)[:, np.flatnonzero(units)] = 0xFF
                    whole = [step for step, tiers in enumerate(group.spec.steps) if tiers[side] == 16]
                    if storage.meta[side] is not None:
                        bare = np.isin(group.step_np, [-1, *whole])
                        storage.meta[side][:, np.flatnonzero(bare)] = float("nan")
        lives[:] = [np.where(ledger.groups[0].step_np >= 0, gens, -1)]
        if not told:
            print(f"poisoned {poisoned} units", flush=True)
            told.append(poisoned)

    Pool.execute = execute  # type: ignore[method-assign]


# Only in the processes that the server spawns: the first one has no pool.
if FAULT and __name__ == "__mp_main__":
    globals()[f"plant_{FAULT}"]()

if __name__ == "__main__":
    import runpy

    sys.argv[0] = "sglang.launch_server"
    runpy.run_module("sglang.launch_server", run_name="__main__")
