"""The ledger over long times: the same events give the same commands, counters have room, nothing piles up."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.horizon import Traffic, measure
from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.ledger import PolicyConfig
from tests.ledger_driver import OPS, WEIGHTS, World

ROOT = Path(__file__).resolve().parent.parent
FULL = pytest.param(1_000_000, marks=pytest.mark.full)

# Ticks of ten years at 100,000 forwards per second, and of stamps at 16 waves in each of them.
TEN_YEARS = 10 * 366 * 86400 * 100_000
WAVES = 16


class Digest(Traffic):
    """Keeps the SHA-256 of every answer and command."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.hash = hashlib.sha256()

    def _note(self, new: np.ndarray, batch: CommandBatch | None = None) -> None:
        self.hash.update(new.tobytes())
        for number, wave in enumerate(batch.waves if batch else ()):
            for c in wave:
                self.hash.update(bytes([number & 255, c.group, c.arena]))
                for part in (c.page, c.src_unit, c.dst_unit, c.src_tier, c.dst_tier):
                    self.hash.update(part.tobytes())
        for t in batch.table if batch else ():
            self.hash.update(bytes([t.group, t.arena]) + t.page.tobytes() + t.entry.tobytes())


def digest(events: int, seed: int) -> str:
    """That of a run; the books are checked at its end."""
    traffic = Digest(seed)
    traffic.run(events)
    traffic.ledger.check_integrity()
    return traffic.hash.hexdigest()


@pytest.mark.parametrize("events", [4_000, FULL])
def test_same_events_same_commands(events: int) -> None:
    """Two processes that share no hash seed stand for two ranks."""
    digests = []
    for seed in ("1", "2"):
        line = [sys.executable, "-c", f"from {__name__} import digest; print(digest({events}, 7))"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        digests.append(done.stdout.strip())
    assert len(digests[0]) == 64
    assert digests[0] == digests[1]


def test_other_events_other_commands() -> None:
    """The digest can tell: a digest of nothing would also repeat itself."""
    assert digest(1_000, 1) != digest(1_000, 2)


def test_clocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that jumps to and fro by years, in this process, changes no command."""
    expected = digest(2_000, 3)
    rng = np.random.default_rng(0)
    calls = []

    def anything() -> float:
        calls.append(1)
        return float(rng.uniform(-1e9, 1e10))

    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        monkeypatch.setattr(time, name, anything)
    assert digest(2_000, 3) == expected
    assert time.monotonic() != time.monotonic()


def make_old(world: World) -> None:
    """Every counter as after ten years of 100,000 forwards per second."""
    ledger = world.ledger
    ledger.tick = TEN_YEARS
    ledger.log.base = ledger.log.top = TEN_YEARS * WAVES
    ledger.book.gen_np += TEN_YEARS
    ledger.requests.tick += TEN_YEARS
    ledger.meter._bytes_sum = TEN_YEARS << 40
    ledger.meter._pages_sum = TEN_YEARS << 20
    for arena in ledger.arenas:
        arena.moves = arena.moved_units = TEN_YEARS << 4
    for group in ledger.groups:
        for counts in group.shrinks:
            counts[:] = [TEN_YEARS << 10] * len(counts)


def same_batch(a: CommandBatch, b: CommandBatch) -> bool:
    def parts(batch: CommandBatch) -> list[list[object]]:
        rows = [part for wave in batch.waves for part in wave] + list(batch.table)
        return [[x.tolist() if isinstance(x, np.ndarray) else x for x in vars(row).values()] for row in rows]

    return [len(w) for w in a.waves] == [len(w) for w in b.waves] and parts(a) == parts(b)


@pytest.mark.parametrize("groups", ["8+k4v2", "2"])
@pytest.mark.parametrize("policy", ["age", "uniform", "static"])
def test_counters_do_not_overflow_in_ten_years(groups: str, policy: str) -> None:
    """A ledger that old passes every check after every event, and commands what a new one does."""
    config = PolicyConfig(policy=policy, window_tokens=16)  # type: ignore[arg-type]
    young, old = (World(groups, config, num_pages=36, max_requests=4) for _ in range(2))
    for world in (young, old):
        world.keep_batches = True
    make_old(old)
    rng = np.random.default_rng(11)
    ops = rng.choice(len(OPS), 500, p=np.array(WEIGHTS) / sum(WEIGHTS)).tolist()
    for op, numbers in zip(ops, rng.integers(0, 1 << 16, (500, 3)).tolist(), strict=True):
        for world in (young, old):
            world.step(OPS[op], *numbers)
        assert len(young.batches) == len(old.batches)
        assert not young.batches or same_batch(young.batches[-1], old.batches[-1])
    assert sum(young.ledger.stats().shrinks.values()) > 0
    stats = old.ledger.stats()
    assert stats.tick > TEN_YEARS
    assert stats.effective_bits == young.ledger.stats().effective_bits
    # What came on top of the large numbers was counted exactly.
    assert stats.moves - young.ledger.stats().moves == len(old.ledger.arenas) * (TEN_YEARS << 4)


@pytest.mark.parametrize("events", [8_000, FULL])
def test_fragmentation_and_moves_stay_small(events: int) -> None:
    result = measure(events, blocks=20)
    assert result["fragmentation_end"] < 0.05
    assert result["moved_per_born"] <= 1
    assert result["shrinks"] > events / 4
    if events >= 1_000_000:
        assert result["us_last_tenth"] < 1.25 * result["us_first_tenth"]
        assert result["blocks"][-1]["rss_mib"] < result["blocks"][2]["rss_mib"] + 16
