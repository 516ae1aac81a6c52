"""Accuracy, time, retractions and precision of the bundled model under memory pressure, against stock.

Every row is one real server. Problems, order and seeds are the same in every row; a row's bytes are a share of
what the problems need at 16 bits when their chains end, and stock gets the same bytes. Run:

    python -m benchmarks.pressure --suite pressure --out benchmarks/results/pressure.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.methods import PAGE, bytes_per_token
from benchmarks.reasoner.task import Problem, check, eval_problem, messages
from benchmarks.result import versions, wilson, write
from benchmarks.serving import REASONER, ROOT, Server, generate_many, serve


@dataclass(frozen=True)
class Row:
    """One server configuration.

    Attributes:
        name: how the row is called in the table.
        share: pool bytes as a share of the problems' 16-bit bytes at their ends; None for a pool that holds all.
        quant: our pool, else stock ``torch_native``.
        args: further flags.
    """

    name: str
    share: float | None
    quant: bool
    args: tuple[str, ...] = field(default=())


def ours(name: str, share: float | None, final: str, *args: str) -> Row:
    return Row(name, share, True, ("--pmkvq-final-bits", final, *args))


# SGLang holds requests back while it expects them not to fit; at a tenth of its caution it must retract instead.
BOLD = ("--schedule-conservativeness", "0.1")
WHOLE = ("--pmkvq-window", "0", "--pmkvq-sink-tokens", "0")
STATIC = ("--pmkvq-policy", "static", "--pmkvq-protect", "hard")

SUITES: dict[str, tuple[Row, ...]] = {
    "pressure": (
        Row("stock, all in memory", None, False),
        ours("final 4, 35 %", 0.35, "4"),
        Row("stock, 35 %", 0.35, False),
        ours("final 2, 22 %", 0.22, "2"),
        Row("stock, 22 %", 0.22, False),
        ours("final 4, 15 %", 0.15, "4"),
        Row("stock, 15 %", 0.15, False),
        ours("final 4, 15 %, bold admission", 0.15, "4", *BOLD),
        Row("stock, 15 %, bold admission", 0.15, False, BOLD),
    ),
    "accuracy": (
        Row("16 bits (stock)", None, False),
        ours("final 8, 55 %", 0.55, "8"),
        ours("final 4, 35 %", 0.35, "4"),
        ours("final 2, 22 %", 0.22, "2"),
    ),
    "static": (
        ours("static 8", None, "8", *STATIC),
        ours("static 4", None, "4", *STATIC),
        ours("static 2", None, "2", *STATIC),
        Row("16 bits (stock)", None, False),
        ours("static 8, whole cache", None, "8", *STATIC, *WHOLE),
        ours("static 4, whole cache", None, "4", *STATIC, *WHOLE),
        ours("static 2, whole cache", None, "2", *STATIC, *WHOLE),
    ),
}


def problem_set(count: int, low: int, high: int, first: int = 0) -> list[Problem]:
    return [eval_problem(first + i, low, high) for i in range(count)]


def prompt_ids(model: Path, problems: Sequence[Problem]) -> tuple[list[list[int]], int]:
    """Token ids of each chat prompt, and the end-of-answer token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer.apply_chat_template(messages(p), add_generation_prompt=True, return_dict=False) for p in problems]
    return ids, tokenizer.eos_token_id


def end_tokens(problems: Sequence[Problem], ids: Sequence[Sequence[int]]) -> int:
    """Tokens that the problems hold when their gold chains end, in whole pages."""
    return sum(math.ceil((len(p) + q.chain_tokens) / PAGE) * PAGE for p, q in zip(ids, problems, strict=True))


def row_args(row: Row, pool_bytes: int, running: int, chunk: int, token_bytes: int) -> list[str]:
    args = ["--max-running-requests", str(running), "--chunked-prefill-size", str(chunk), "--decode-log-interval", "8"]
    if row.quant:
        args += ["--pmkvq-pool-bytes", str(pool_bytes), "--page-size", str(PAGE)]
    else:
        args += ["--max-total-tokens", str(pool_bytes // token_bytes)]
    return [*args, *row.args]


def run_row(
    row: Row,
    model: Path,
    problems: Sequence[Problem],
    ids: Sequence[list[int]],
    concurrency: int,
    chunk: int,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """Serve one row and measure it."""
    token_bytes = bytes_per_token(model)
    # The share is of what runs at the same time: the first `concurrency` problems.
    held = end_tokens(problems[:concurrency], ids[:concurrency]) * token_bytes
    pool = int(held * (row.share if row.share is not None else 1.5)) + (64 << 20 if row.share is None else 0)
    args = [*row_args(row, pool, concurrency, chunk, token_bytes), *extra]
    with serve(model, args, quant=row.quant) as server:
        return measure(server, row, problems, ids, concurrency, pool)


def measure(
    server: Server,
    row: Row,
    problems: Sequence[Problem],
    ids: Sequence[list[int]],
    concurrency: int,
    pool: int,
) -> dict[str, Any]:
    """Answer the problems on a running server; correctness, time and what the pool did."""
    longest = max(p.chain_tokens for p in problems)
    bodies = [
        {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": longest + 64,
                "custom_params": {"pmkvq_kv_bits": True},
            },
        }
        for prompt in ids
    ]
    server.flush()
    server.mark()
    start = time.perf_counter()
    answers = generate_many(server, bodies, concurrency)
    wall = time.perf_counter() - start
    right = [check(p, a["text"]) for p, a in zip(problems, answers, strict=True)]
    out: dict[str, Any] = {
        "row": asdict(row),
        "pool_bytes": pool,
        "problems": len(problems),
        "right": sum(right),
        "accuracy": sum(right) / len(right),
        "wrong": [i for i, ok in enumerate(right) if not ok],
        "confidence95": wilson(sum(right), len(right)),
        "finished": sum(a["meta_info"]["finish_reason"] is not None for a in answers),
        "output_tokens": sum(a["meta_info"]["completion_tokens"] for a in answers),
        "wall_s": round(wall, 2),
        "retractions": server.retracted(),
        "peak_running": server.peak_running(),
        "output_ids": [a["output_ids"] for a in answers],
    }
    if row.quant:
        out["pool"] = server.pool()
        bits = [a["meta_info"]["pmkvq_kv_bits"][0] for a in answers]
        out["answer_lowest_bits"] = min(b["lowest"] for b in bits)
        out["answer_mean_bits"] = sum(b["mean"] for b in bits) / len(bits)
    return out


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| row | pool MiB | right | 95 % | wall s | tok/s | retractions | peak running | eff. bits avg / peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        pool = r.get("pool")
        bits = f"{pool['effective_bits_avg']:.2f} / {pool['effective_bits_peak']:.2f}" if pool else "16 / 16"
        low, high = r["confidence95"]
        lines.append(
            f"| {r['row']['name']} | {r['pool_bytes'] / 2**20:.1f} | {r['right']}/{r['problems']} "
            f"| {100 * low:.0f}-{100 * high:.0f} % | {r['wall_s']:.1f} | {r['output_tokens'] / r['wall_s']:.0f} "
            f"| {r['retractions']} | {r['peak_running']} | {bits} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--model", type=Path, default=REASONER)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--lines", default="64-128", help="program lines, low-high")
    parser.add_argument("--chunk", type=int, default=512, help="--chunked-prefill-size of every row")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="result file; the same command goes on with the rows that it lacks")
    options = parser.parse_args(argv)
    low, _, high = options.lines.partition("-")
    problems = problem_set(options.problems, int(low), int(high or low))
    ids, _ = prompt_ids(options.model, problems)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.pressure", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "options": {k: str(v).removeprefix(f"{ROOT}/") for k, v in vars(options).items()},
        "rows": [],
    }
    if options.out and options.out.is_file():
        earlier = json.loads(options.out.read_text())
        if earlier["command"] == result["command"]:
            result = earlier
    done = {r["row"]["name"] for r in result["rows"]}
    for row in SUITES[options.suite]:
        if row.name in done or (options.only and options.only not in row.name):
            continue
        row_result = run_row(row, options.model, problems, ids, options.concurrency, options.chunk)
        # Rows may be added later, by another version than the first ones.
        result["rows"].append({**row_result, "commit": versions()["commit"]})
        print(table(result["rows"][-1:]).splitlines()[-1], flush=True)
        slim = [{k: v for k, v in r.items() if k != "output_ids"} for r in result["rows"]]
        write({**result, "rows": slim}, options.out)
    print(table(result["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
