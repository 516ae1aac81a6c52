"""A server's memory: how wide a fresh request is on a warm one, and what a pool that is driven full costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.methods import model_facts
from benchmarks.harness.servers import STRICT, Body, Server, generate_many, greedy, scheduler_pid, serve
from benchmarks.harness.tasks import random_prompts

POOL = "8MiB"
FRESH_TOKENS = 2000
FILL_TOKENS = 500

BUDGET = 256 << 20
RUNNING = 8
PROMPT, NEW = 1008, 16
# Heads so wide that KV, not weights, is what there is to see: 32 KiB per token at 16 bits.
SHAPE = {"head_dim": 256, "heads": 8, "kv_heads": 8, "layers": 4}
TOKEN_BYTES = 2 * 2 * 256 * 8 * 4


def body(prompt: Sequence[int], new: int) -> Body:
    """A request of exactly ``new`` output tokens that says at how many bits its KV ended."""
    return greedy(prompt, new, bits=True, ignore_eos=True)


def measure(server: Server, vocab: int) -> dict[str, Any]:
    """Fill, ask the fresh request, ask the old prompts again."""
    server.flush()
    tokens = server.pool()["logical_tokens"]
    prompts = random_prompts(0, 3 * tokens // FILL_TOKENS, FILL_TOKENS - 1, vocab)
    generate_many(server, [body(p, 1) for p in prompts], 4)
    before = server.pool()
    (fresh,) = generate_many(server, [body(random_prompts(1, 1, FRESH_TOKENS - 64, vocab)[0], 64)], 1)
    again = generate_many(server, [body(p, 1) for p in reversed(prompts)], 1)
    cached = sum(a["meta_info"]["cached_tokens"] for a in again)
    return {
        "logical_tokens": tokens,
        "filled_tokens": len(prompts) * FILL_TOKENS,
        "mapped_share_before": before["mapped_pages"] * before["page_size"] / tokens,
        "fresh_lowest_bits": fresh["meta_info"]["pmkvq_kv_bits"][0]["lowest"],
        "fresh_mean_bits": fresh["meta_info"]["pmkvq_kv_bits"][0]["mean"],
        "fresh_cached_tokens": fresh["meta_info"]["cached_tokens"],
        "hit_rate": cached / (len(prompts) * (FILL_TOKENS - 1)),
        "evict_requests": server.pool()["evict_requests"],
        "retractions": server.retracted(),
    }


def run(model: Path, min_active_bits: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """One server."""
    args = ["--pmkvq-pool-bytes", POOL, "--pmkvq-min-active-bits", str(min_active_bits)]
    args += ["--max-running-requests", "8", "--chunked-prefill-size", "256", *extra]
    with serve(model, args) as server:
        return measure(server, model_facts(model)["vocab_size"])


def resident_memory(model: Path) -> dict[str, Any]:
    """Peak growth of the scheduler, in bytes, while the pool of ``BUDGET`` bytes is driven full three times over."""
    args = [
        "--pmkvq-pool-bytes", str(BUDGET), "--skip-tokenizer-init", "--context-length", "4096",
        "--max-running-requests", str(RUNNING), "--chunked-prefill-size", "512",
    ]  # fmt: skip
    with serve(model, args, env=STRICT) as server:
        process = psutil.Process(scheduler_pid(server))
        generate_many(server, [body(p, 4) for p in random_prompts(0, RUNNING, 512, 512)], RUNNING)
        server.flush()
        empty = process.memory_info().rss
        # 5 resets the peak to what is resident now.
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        pool = server.pool()
        count = 3 * pool["logical_tokens"] // (PROMPT + NEW)
        generate_many(server, [body(p, NEW) for p in random_prompts(1, count, PROMPT, 512)], RUNNING)
        full = server.pool()
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        assert found
        peak = int(found[1]) << 10
    return {
        "budget_bytes": BUDGET,
        "storage_bytes": pool["storage_bytes"],
        "requests": count,
        "tokens_through": count * (PROMPT + NEW),
        "used_share_at_end": full["used_bytes"] / full["storage_bytes"],
        "running_set_at_16_bits": RUNNING * (PROMPT + NEW) * TOKEN_BYTES,
        "empty_rss": empty,
        "peak_rss": peak,
        "growth": peak - empty,
    }
