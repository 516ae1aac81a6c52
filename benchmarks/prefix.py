"""What the prefix cache keeps: many users come back to old contexts with a new question, methods at equal bytes.

    pmkvq bench prefix --pool-bytes 12MiB --contexts 16 --turns 96 --out benchmarks/results/prefix.json

A context is a program of the bundled reasoning task; each turn asks it for another of its last variables, so turns
of one context share the program and nothing else. Which context comes next is drawn by Zipf's law (``--order zipf``,
rank r has weight 1/r) or goes round (``--order round``, the worst case of an LRU cache). Finished chains stay in the
radix tree like everything else, and compete with the programs. Every answer is checked by the program.

Hit rate is cached over prompt tokens; *of returns* leaves out each context's first turn, which nothing can hit. A hit
is a prompt of which at least half was cached. It reads pages as they are: a *cold* hit is one of whose pages some were
below 16 bits when its answer ended, and its lowest and mean bits are the request's own (``pmkvq_kv_bits``).
``16bit`` has memory for everything. Each method and seed is a server of its own, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.methods import Method, arguments, config, extra_args, label, methods
from benchmarks.pressure import prompt_ids
from benchmarks.reasoner.task import EVAL_SEED_START, Problem, check, make_problem, render
from benchmarks.result import Results, wilson
from benchmarks.serving import Server, ServerFailed, serve, stream
from sglang_pmkvq.serving.config import parse_size

# The task asks for one of a program's last variables, and nothing else did the model learn.
QUESTIONS = 8
# Hit rates over the turns, in so many parts of equal length.
PARTS = 4


@dataclass(frozen=True)
class Turn:
    """One question of the trace.

    Attributes:
        context: number of the context.
        back: the context was asked before.
        problem: its program with this question.
    """

    context: int
    back: bool
    problem: Problem


def ask(problem: Problem, asked: int) -> Problem:
    """The same program with a question for line ``asked``."""
    prompt, chain = render(problem.program, asked, problem.start, problem.values)
    return Problem(
        problem.seed, problem.start, problem.program, asked, problem.values, prompt, chain, problem.values[asked]
    )


def trace(contexts: int, turns: int, lines: int, order: str, seed: int) -> list[Turn]:
    """The turns in order; a function of the arguments alone. ``lines`` are those of each program."""
    rng = random.Random(seed)
    programs = [make_problem(EVAL_SEED_START + seed * contexts + i, lines) for i in range(contexts)]
    weights = [1 / (rank + 1) for rank in range(contexts)]
    counts = [0] * contexts
    first = [rng.randrange(QUESTIONS) for _ in range(contexts)]
    out = []
    for number in range(turns):
        context = number % contexts if order == "round" else rng.choices(range(contexts), weights)[0]
        asked = lines - 1 - (first[context] + counts[context]) % QUESTIONS
        out.append(Turn(context, counts[context] > 0, ask(programs[context], asked)))
        counts[context] += 1
    return out


async def replay(
    server: Server, prompts: Sequence[list[int]], turns: Sequence[Turn], concurrency: int, bar: tqdm[Any]
) -> list[tuple[float, dict[str, Any]]]:
    """Seconds to the first token and the answer of every turn, ``concurrency`` at a time, in the order of the trace."""
    gate = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600)) as session:

        async def one(prompt: list[int], turn: Turn) -> tuple[float, dict[str, Any]]:
            body = {
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": turn.problem.chain_tokens + 32,
                    "custom_params": {"pmkvq_kv_bits": True},
                },
            }
            async with gate:
                got = await stream(session, server.url, body)
            bar.update()
            return got

        return list(await asyncio.gather(*map(one, prompts, turns)))


def figures(turns: Sequence[Turn], answers: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Hit rates, times to the first token, and right answers, of all turns and of cold hits.

    Raises:
        RuntimeError: an answer did not come to its own end.
    """
    rows = []
    for turn, (first_s, answer) in zip(turns, answers, strict=True):
        meta = answer["meta_info"]
        if meta["finish_reason"]["type"] not in ("stop", "length"):
            raise RuntimeError(f"a request ended with {meta['finish_reason']}")
        bits = (meta.get("pmkvq_kv_bits") or [{"lowest": 16, "mean": 16.0}])[0]
        rows.append(
            {
                "back": turn.back,
                "prompt": meta["prompt_tokens"],
                "cached": meta["cached_tokens"],
                "ttft_ms": 1e3 * first_s,
                "right": check(turn.problem, answer["text"]),
                **bits,
            }
        )
    back = [row for row in rows if row["back"]]
    # With pages of one token every prompt hits the opening token of another.
    hits = [row for row in back if 2 * row["cached"] >= row["prompt"]]
    cold = [row for row in hits if row["lowest"] < 16]
    size = -(-len(rows) // PARTS)
    return {
        "turns": len(rows),
        "prompt_tokens": sum(row["prompt"] for row in rows),
        "cached_tokens": sum(row["cached"] for row in rows),
        "hit_rate": hit_rate(rows),
        "hit_rate_of_returns": hit_rate(back),
        "hit_rate_by_part": [hit_rate(rows[i : i + size]) for i in range(0, len(rows), size)],
        "ttft_p50_ms": middle([row["ttft_ms"] for row in rows]),
        "ttft_hit_p50_ms": middle([row["ttft_ms"] for row in hits]),
        "ttft_miss_p50_ms": middle([row["ttft_ms"] for row in rows if 2 * row["cached"] < row["prompt"]]),
        **share("all", rows),
        **share("cold", cold),
        "cold_lowest_bits": min((row["lowest"] for row in cold), default=None),
        "cold_mean_bits": middle([row["mean"] for row in cold]),
    }


def hit_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    prompt = sum(row["prompt"] for row in rows)
    return round(sum(row["cached"] for row in rows) / prompt, 4) if prompt else None


def middle(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def share(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers among ``rows``, with a 95 % interval."""
    right = sum(row["right"] for row in rows)
    return {f"{name}_answers": len(rows), f"{name}_right": right, f"{name}_confidence95": wilson(right, len(rows))}


def measure(method: Method, options: argparse.Namespace, seed: int, bar: tqdm[Any]) -> dict[str, Any]:
    """One replay on a fresh server.

    Raises:
        ServerFailed: it did not start. RuntimeError: it logged an error, or an answer is not whole.
    """
    turns = trace(options.contexts, options.turns, options.lines, options.order, seed)
    prompts, _ = prompt_ids(options.model, [turn.problem for turn in turns])
    args = method.server_args(options.model, parse_size(options.pool_bytes), options.concurrency, options.chunk)
    with serve(options.model, [*args, *extra_args(options)], quant=method.quant) as server:
        # The first request of a server is slow.
        server.generate(input_ids=prompts[0], sampling_params={"max_new_tokens": 16})
        server.flush()
        server.mark()
        answers = asyncio.run(replay(server, prompts, turns, options.concurrency, bar))
        errors = server.errors(since_mark=True)
        if errors:
            raise RuntimeError(f"{method.name}: the server logged {errors[:3]}")
        info = server.info()
        out = {**figures(turns, answers), "retractions": server.retracted(), "running_peak": server.peak_running()}
        if method.quant:
            pool = info["internal_states"][0]["pmkvq"]
            return {
                **out,
                "logical_tokens": pool["logical_tokens"],
                "shrinks": sum(pool["shrinks"].values()),
                "evict_requests": pool["evict_requests"],
                "effective_bits_avg": pool["effective_bits_avg"],
            }
        return {**out, "logical_tokens": info["max_total_num_tokens"]}


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, one per method; several seeds are added up, times are medians."""
    lines = [
        "| method | logical tokens | hit rate | of returns | by quarter of the trace | TTFT ms: hits, misses "
        "| right | of cold hits | their bits: lowest, mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "missing" not in row:
            by_method.setdefault(label(row["key"]["method"]), []).append(row)

    def center(rows: Sequence[dict[str, Any]], key: str, form: str = ".0f") -> str:
        values = [row[key] for row in rows if row[key] is not None]
        return format(statistics.median(values), form) if values else "-"

    def right(rows: Sequence[dict[str, Any]], name: str) -> str:
        good, n = sum(r[f"{name}_right"] for r in rows), sum(r[f"{name}_answers"] for r in rows)
        low, high = wilson(good, n)
        return f"{good}/{n} ({100 * low:.0f}-{100 * high:.0f} %)" if n else "-"

    for name, rows in by_method.items():
        parts = zip(*(row["hit_rate_by_part"] for row in rows), strict=True)
        lowest = [row["cold_lowest_bits"] for row in rows if row["cold_lowest_bits"] is not None]
        lines.append(
            f"| {name} | {rows[0]['logical_tokens']:,} | {100 * statistics.fmean(r['hit_rate'] for r in rows):.1f} % "
            f"| {100 * statistics.fmean(r['hit_rate_of_returns'] or 0 for r in rows):.1f} % "
            f"| {', '.join(f'{100 * statistics.fmean(part):.0f}' for part in parts)} "
            f"| {center(rows, 'ttft_hit_p50_ms')}, {center(rows, 'ttft_miss_p50_ms')} | {right(rows, 'all')} "
            f"| {right(rows, 'cold')} | {min(lowest) if lowest else '-'}, {center(rows, 'cold_mean_bits', '.1f')} |"
        )
    lost = [f"Missing: {label(row['key']['method'])}: {row['missing']}" for row in result["rows"] if "missing" in row]
    return "\n".join([*lines, *(["", *lost] if lost else [])])


def check_options(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: a value outside its range."""
    for name in ("contexts", "turns", "concurrency", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected a positive number")
    if not QUESTIONS <= options.lines < 255:
        raise ValueError(f"--lines {options.lines}: expected {QUESTIONS} to 254")
    parse_size(options.pool_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, "stock,age-2,age-4,static-4,static-2,16bit", "benchmarks/results/prefix.json")
    parser.add_argument("--pool-bytes", default="12MiB", help="KV bytes of every server, default %(default)s")
    parser.add_argument("--contexts", type=int, default=16, help="programs, default %(default)s")
    parser.add_argument("--turns", type=int, default=96, help="questions, default %(default)s")
    parser.add_argument("--lines", type=int, default=64, help="lines of each program, default %(default)s")
    parser.add_argument("--order", choices=("zipf", "round"), default="zipf", help="default %(default)s")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time, default %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="seeds from --seed on, default %(default)s")
    parser.add_argument("--chunk", type=int, default=256, help="--chunked-prefill-size of every server")
    options = parser.parse_args(argv)
    try:
        check_options(options)
        wanted = methods(options.methods)
        results = Results(options.out, "prefix", config(options, drop=("repeats",)), argv)
    except ValueError as error:
        print(f"pmkvq bench prefix: {error}", file=sys.stderr)
        return 2
    keys = [
        ({"method": method.name, "seed": options.seed + repeat}, method)
        for repeat in range(options.repeats)
        for method in wanted
    ]
    todo = [(key, method) for key, method in keys if not results.has(key)]
    with tqdm(total=options.turns * len(todo), unit="turn", disable=None) as bar:
        for key, method in todo:
            bar.set_description(method.name)
            try:
                results.add(key, **measure(method, options, key["seed"], bar))
            except ServerFailed as error:
                results.missing(key, error.reason)
    results.order(key for key, _ in keys)
    print(table({**results.head, "rows": results.rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
