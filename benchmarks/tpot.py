"""Time per output token with no page shrunk, against stock ``torch_native``, in one run.

Both servers are up at the same time and are measured in alternation, so that a busy machine hits both. The answers
must be the same before a time is printed.

    python -m benchmarks.tpot --out benchmarks/results/tpot.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import model_facts
from benchmarks.result import versions, write
from benchmarks.serving import REASONER, Server, generate_many, serve
from benchmarks.steady import random_prompts

PROMPT = 256
NEW = 128


def tpot(server: Server, prompts: Sequence[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """Milliseconds per decode step, and the answers: the difference of ``new`` and of 1 output tokens."""

    def timed(tokens: int) -> tuple[float, list[list[int]]]:
        server.flush()
        bodies = [
            {"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}}
            for p in prompts
        ]
        start = time.perf_counter()
        out = generate_many(server, bodies, len(bodies))
        return time.perf_counter() - start, [a["output_ids"] for a in out]

    first, _ = timed(1)
    whole, answers = timed(new)
    return 1e3 * (whole - first) / (new - 1), answers


def compare(
    ours: Server,
    stock: Server,
    vocab: int,
    batch: int,
    repeats: int,
    new: int = NEW,
    prompt: int = PROMPT,
    exact: bool = True,
) -> dict[str, Any]:
    """Median of per-repeat ratios, alternating which goes first.

    Args:
        prompt, new: tokens in and out.
        exact: a request alone must have the same answer from both; else only as many tokens.

    Raises:
        RuntimeError: it has not.
    """
    prompts = random_prompts(batch, batch, prompt, vocab)
    rows: list[tuple[float, float]] = []
    tpot(ours, prompts, 8)
    tpot(stock, prompts, 8)
    for repeat in range(repeats):
        order = (ours, stock) if repeat % 2 == 0 else (stock, ours)
        got = {id(s): tpot(s, prompts, new) for s in order}
        a, b = got[id(ours)], got[id(stock)]
        if exact and batch == 1 and a[1] != b[1]:
            raise RuntimeError("answers differ; no time is worth printing")
        if any(len(ids) != new for ids in (*a[1], *b[1])):
            raise RuntimeError(f"an answer has not {new} tokens; no time is worth printing")
        rows.append((a[0], b[0]))
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "ours_ms": statistics.median(r[0] for r in rows),
        "stock_ms": statistics.median(r[1] for r in rows),
        "ratio": statistics.median(r[0] / r[1] for r in rows),
        "ratios": [round(r[0] / r[1], 4) for r in rows],
        "shrinks": sum(ours.pool()["shrinks"].values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REASONER)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    args = ["--max-running-requests", "32", "--chunked-prefill-size", "8192"]
    vocab = model_facts(options.model)["vocab_size"]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.tpot", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "rows": [],
    }
    with (
        serve(options.model, [*args, "--pmkvq-pool-bytes", "512MiB"]) as ours,
        serve(options.model, [*args, "--max-total-tokens", "100000"], quant=False) as stock,
    ):
        for batch in map(int, options.batches.split(",")):
            result["rows"].append(compare(ours, stock, vocab, batch, options.repeats))
            print(json.dumps(result["rows"][-1]), flush=True)
    write(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
