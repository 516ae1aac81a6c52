"""What a pool holds and what it costs: logical tokens against stock, and resident memory of a pool driven full.

    python -m benchmarks.capacity --out benchmarks/results/capacity.json

Logical tokens are those of a real server with the default limits on requests and chunks; stock's are what SGLang
would have had in the same bytes. Resident memory is that of the scheduler: its peak (``VmHWM``) while three times
what the pool holds runs through it, against the same process with an empty pool.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.result import versions, write
from benchmarks.serving import REASONER, STRICT, generate_many, scheduler_pid, serve
from benchmarks.steady import body, random_prompts

BUDGET = 256 << 20
RUNNING = 8
PROMPT, NEW = 1008, 16
# Heads so wide that KV, not weights, is what there is to see: 32 KiB per token at 16 bits.
SHAPE = {"head_dim": 256, "heads": 8, "kv_heads": 8, "layers": 4}
TOKEN_BYTES = 2 * 2 * 256 * 8 * 4


def logical_tokens(final: str, pool: str = "1GiB") -> dict[str, Any]:
    """The bundled model in a pool of ``pool``; group size 128, so b bits cost b + 32/128 with scales."""
    with serve(REASONER, ["--pmkvq-pool-bytes", pool, "--pmkvq-final-bits", final]) as server:
        got = server.pool()
    ratio = got["logical_tokens"] / got["stock_tokens"]
    bound = 16 / (int(final) + 32 / got["group_size"])
    return {
        "part": "logical tokens",
        "final": final,
        "pool": pool,
        "logical_tokens": got["logical_tokens"],
        "stock_tokens": got["stock_tokens"],
        "max_running_requests": got["max_running_requests"],
        "chunked_prefill_size": got["chunked_prefill_size"],
        "ratio": ratio,
        "of_the_bound": ratio / bound,
    }


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
        peak = _peak_bytes(process.pid)
    return {
        "part": "resident memory",
        "budget": BUDGET,
        "storage_bytes": pool["storage_bytes"],
        "requests": count,
        "tokens_through": count * (PROMPT + NEW),
        "used_share_at_end": full["used_bytes"] / full["storage_bytes"],
        "running_set_at_16_bits": RUNNING * (PROMPT + NEW) * TOKEN_BYTES,
        "empty_rss": empty,
        "peak_rss": peak,
        "growth": peak - empty,
    }


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def main(argv: Sequence[str] | None = None) -> int:
    from tests.support.models import make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.capacity", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            lambda: logical_tokens("8"),
            lambda: logical_tokens("4"),
            lambda: logical_tokens("2"),
            lambda: resident_memory(make_model(Path(folder) / "wide", **SHAPE)),  # type: ignore[arg-type]
        )
        for measure in rows:
            result["rows"].append(measure())
            print(json.dumps(result["rows"][-1]), flush=True)
    write(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
