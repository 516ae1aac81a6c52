"""A warm server: after 3 · N tokens of finished requests, how wide is a fresh request's own KV, and what hits?

Without early eviction the radix tree would hold the pool for ever and every request would live at its final tier.
Two servers, ``--pmkvq-min-active-bits`` 8 and 2; then the finished prompts are asked again for the hit rate.

    python -m benchmarks.steady --out benchmarks/results/steady.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import model_facts
from benchmarks.result import versions, write
from benchmarks.serving import REASONER, Server, generate_many, serve

POOL = "8MiB"
FRESH_TOKENS = 2000
FILL_TOKENS = 500


def random_prompts(seed: int, count: int, tokens: int, vocab: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, vocab) for _ in range(tokens)] for _ in range(count)]


def body(prompt: Sequence[int], new: int) -> dict[str, Any]:
    return {
        "input_ids": list(prompt),
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": new,
            "ignore_eos": True,
            "custom_params": {"pmkvq_kv_bits": True},
        },
    }


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
    args = ["--pmkvq-pool-bytes", POOL, "--pmkvq-min-active-bits", str(min_active_bits)]
    args += ["--max-running-requests", "8", "--chunked-prefill-size", "256", *extra]
    with serve(model, args) as server:
        return {"min_active_bits": min_active_bits, **measure(server, model_facts(model)["vocab_size"])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REASONER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result = {
        "command": " ".join(["python -m benchmarks.steady", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "rows": [run(options.model, 8), run(options.model, 2)],
    }
    print(json.dumps(result["rows"], indent=1))
    write(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
