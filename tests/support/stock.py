"""Ours against stock SGLang while nothing shrinks: the same tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness.servers import Server, generate_many, greedy, serve

BIG_POOL = "1GiB"
COMMON = ("--chunked-prefill-size", "2048", "--max-running-requests", "16", "--random-seed", "0")


def answers(server: Server, ids: Sequence[list[int]], tokens: int, concurrency: int) -> list[list[int]]:
    """Greedy output ids of each prompt."""
    server.flush()
    return [a["output_ids"] for a in generate_many(server, [greedy(p, tokens) for p in ids], concurrency)]


def differing(a: Sequence[list[int]], b: Sequence[list[int]]) -> int:
    """Answers that are not the same."""
    return sum(x != y for x, y in zip(a, b, strict=True))


def compare(
    model: Path, ids: Sequence[list[int]], tokens: int, alone: bool, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Serve the prompts with ours and with stock (twice if not alone) and count differing answers.

    Alone, the radix tree is off and both servers run equal batch shapes: every answer must be identical. Together,
    batch shapes differ from run to run: ours may differ from stock in no more answers than stock from itself. On the
    CPU, where ours makes stock's own calls; on a GPU the two have different kernels.
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
        "answers": len(ids),
        "tokens": sum(map(len, ours)),
        "shrinks": shrinks,
        "ours_against_stock": differing(ours, stock),
        "stock_against_stock": differing(stock, again),
    }
