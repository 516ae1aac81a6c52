"""A warm server stays wide for fresh requests; the pool's bytes are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.servers import REASONER
from tests.support.memory import SHAPE, resident_memory, run
from tests.support.models import make_model

pytestmark = pytest.mark.server

# fp32 workspace of a chunk's scores and of one wave of shrinks, allocator slack, Python objects of the ledger. From
# 30 MiB below the budget to 7 MiB above it were measured.
WORKSPACE = 64 << 20


def test_fresh_request_on_a_warm_server_keeps_min_active_bits() -> None:
    eight, two = run(REASONER, 8), run(REASONER, 2)
    assert eight["fresh_lowest_bits"] >= 8
    assert two["fresh_lowest_bits"] < 8
    assert eight["evict_requests"] > 0
    assert eight["retractions"] == two["retractions"] == 0
    assert two["hit_rate"] >= eight["hit_rate"]


def test_resident_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """Driven full three times over, the scheduler's peak grows by at most the budget and the stated workspace."""
    got = resident_memory(make_model(tmp_path / "wide", **SHAPE))
    assert got["storage_bytes"] <= got["budget_bytes"]
    assert got["used_share_at_end"] > 0.9
    # A 16-bit copy of what runs, even of two of its four layers, would not fit into the allowance.
    assert got["running_set_at_16_bits"] // 2 > WORKSPACE
    assert got["growth"] <= got["budget_bytes"] + WORKSPACE, f"{got['growth'] / 2**20:.0f} MiB grown"
    # And the pages are really there: most of the arena was touched.
    assert got["growth"] >= got["budget_bytes"] // 3
