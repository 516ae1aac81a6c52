"""Greedy answers with a pool that never shrinks, against stock SGLang: the token ids must be the same.

Two parts, both stated:

* alone: radix tree off, one request at a time, so that both servers run equal batch shapes: every answer must be
  identical, with 0 shrinks;
* together: radix tree on, several at a time; batch shapes then differ from run to run, so stock is run twice, and
  ours may differ from stock in no more answers than stock from itself.

    python -m benchmarks.equality --problems 200 --out benchmarks/results/equality.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.pressure import problem_set, prompt_ids
from benchmarks.result import versions, write
from benchmarks.serving import REASONER, Server, generate_many, serve

BIG_POOL = "1GiB"
COMMON = ("--chunked-prefill-size", "2048", "--max-running-requests", "16", "--random-seed", "0")


def answers(server: Server, ids: Sequence[list[int]], tokens: int, concurrency: int) -> list[list[int]]:
    """Greedy output ids of each prompt."""
    server.flush()
    bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}} for p in ids]
    return [a["output_ids"] for a in generate_many(server, bodies, concurrency)]


def differing(a: Sequence[list[int]], b: Sequence[list[int]]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def compare(
    model: Path, ids: Sequence[list[int]], tokens: int, alone: bool, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Serve the prompts with ours and with stock (twice if not alone) and count differing answers.

    On the CPU, where ours makes stock's own calls; on a GPU the two have different kernels.
    """
    concurrency = 1 if alone else 8
    args = [*COMMON, *(["--disable-radix-cache"] if alone else []), *extra]
    with (
        serve(model, [*args, "--pmkvq-pool-bytes", BIG_POOL], device="cpu") as ours_server,
        serve(model, [*args, "--max-total-tokens", "300000"], quant=False, device="cpu") as stock_server,
        ThreadPoolExecutor(2) as pool,
    ):
        # Side by side: no time is measured here, and a request alone has a server of its own.
        first = pool.submit(answers, ours_server, ids, tokens, concurrency)
        stock = answers(stock_server, ids, tokens, concurrency)
        ours = first.result()
        again = stock if alone else answers(stock_server, ids, tokens, concurrency)
        shrinks = sum(ours_server.pool()["shrinks"].values())
    return {
        "alone": alone,
        "answers": len(ids),
        "tokens": sum(map(len, ours)),
        "shrinks": shrinks,
        "ours_against_stock": differing(ours, stock),
        "stock_against_stock": differing(stock, again),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REASONER)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--lines", default="64-128")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=["alone", "together", "both"], default="both")
    options = parser.parse_args(argv)
    low, _, high = options.lines.partition("-")
    problems = problem_set(options.problems, int(low), int(high or low))
    ids, _ = prompt_ids(options.model, problems)
    longest = max(p.chain_tokens for p in problems) + 64
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.equality", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "parts": [],
    }
    for alone in (True, False):
        if options.part in ("both", "alone" if alone else "together"):
            result["parts"].append(compare(options.model, ids, longest, alone))
            print(json.dumps(result["parts"][-1]), flush=True)
    write(result, options.out)
    wrong = [p for p in result["parts"] if p["ours_against_stock"] > p["stock_against_stock"] or p["shrinks"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
