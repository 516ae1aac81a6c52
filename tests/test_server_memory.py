"""A warm server stays wide for fresh requests; the pool's bytes are what it says."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.serving import REASONER, STRICT, generate_many, scheduler_pid, serve
from benchmarks.steady import body, random_prompts, run
from tests.support.models import make_model

pytestmark = pytest.mark.server

# fp32 workspace of a chunk's scores and of one wave of shrinks, allocator slack, Python objects of the ledger.
WORKSPACE = 192 << 20


def test_fresh_request_on_a_warm_server_keeps_min_active_bits() -> None:
    eight, two = run(REASONER, 8), run(REASONER, 2)
    assert eight["fresh_lowest_bits"] >= 8
    assert two["fresh_lowest_bits"] < 8
    assert eight["evict_requests"] > 0
    assert eight["retractions"] == two["retractions"] == 0
    assert two["hit_rate"] >= eight["hit_rate"]


def test_resident_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """Driven full three times over, the scheduler grows by at most the budget and the stated workspace."""
    budget = 256 << 20
    model = make_model(tmp_path / "wide", head_dim=256, heads=8, kv_heads=8, layers=4)
    args = [
        "--pmkvq-pool-bytes", str(budget), "--skip-tokenizer-init", "--context-length", "4096",
        "--max-running-requests", "8", "--chunked-prefill-size", "512",
    ]  # fmt: skip
    with serve(model, args, env=STRICT) as server:
        process = psutil.Process(scheduler_pid(server))
        generate_many(server, [body(p, 4) for p in random_prompts(0, 4, 512, 512)], 4)
        server.flush()
        empty = process.memory_info().rss
        pool = server.pool()
        assert pool["storage_bytes"] <= budget
        count = 3 * pool["logical_tokens"] // 1024
        generate_many(server, [body(p, 1) for p in random_prompts(1, count, 1023, 512)], 4)
        pool = server.pool()
        assert pool["mapped_pages"] * pool["page_size"] > 0.9 * pool["logical_tokens"]
        full = process.memory_info().rss
        assert full <= empty + budget + WORKSPACE, f"{(full - empty) / 2**20:.0f} MiB grown"
        # And the pages are really there: most of the arena was touched.
        assert full >= empty + budget // 3
