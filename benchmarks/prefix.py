"""What the prefix cache keeps: many users come back to old contexts with a new question, methods at equal bytes.

    pmkvq bench prefix --pool-bytes 12MiB --contexts 16 --turns 96 --out benchmarks/results/prefix.json

A context is a program of the bundled task; each turn asks it for another of its last variables. Which one comes next
is drawn by Zipf's law (``--order zipf``, rank r has weight 1/r) or goes round (``--order round``, the worst case of an
LRU cache). *Of returns* leaves out each context's first turn, which nothing can hit. A hit is a prompt of which at
least half was cached, a *cold* one read pages below 16 bits. ``16bit`` has memory for everything.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import experiment
from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.methods import Method, methods
from benchmarks.harness.results import Result, Results, Row, measured, table, unmeasured
from benchmarks.harness.servers import greedy, stream_many
from benchmarks.harness.stats import median, wilson
from benchmarks.harness.tasks import prompt_ids
from benchmarks.reasoner.task import EVAL_SEED_START, Problem, check, make_problem, render
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
        "ttft_p50_ms": median([row["ttft_ms"] for row in rows]),
        "ttft_hit_p50_ms": median([row["ttft_ms"] for row in hits]),
        "ttft_miss_p50_ms": median([row["ttft_ms"] for row in rows if 2 * row["cached"] < row["prompt"]]),
        **share("all", rows),
        **share("cold", cold),
        "cold_lowest_bits": min((row["lowest"] for row in cold), default=None),
        "cold_mean_bits": median([row["mean"] for row in cold]),
    }


def hit_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    prompt = sum(row["prompt"] for row in rows)
    return round(sum(row["cached"] for row in rows) / prompt, 4) if prompt else None


def share(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers among ``rows``, with a 95 % interval."""
    right = sum(row["right"] for row in rows)
    return {f"{name}_answers": len(rows), f"{name}_right": right, f"{name}_confidence95": wilson(right, len(rows))}


def measure(method: Method, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One replay on a fresh server, the turns in order.

    Raises:
        ServerFailed: it did not start. RuntimeError: it logged an error, or an answer is not whole.
    """
    turns = trace(options.contexts, options.turns, options.lines, options.order, seed)
    prompts, _ = prompt_ids(options.model, [turn.problem for turn in turns])
    bodies = [greedy(p, t.problem.chain_tokens + 32, bits=True) for p, t in zip(prompts, turns, strict=True)]
    budget = None if method.unbounded else parse_size(options.budget_bytes)
    with experiment.serve_method(options, method, budget, options.concurrency) as server:
        # The first request of a server is slow.
        server.generate(**greedy(prompts[0], 16))
        server.flush()
        server.mark()
        answers = stream_many(server, bodies, options.concurrency)
        server.check_log(method.name)
        out = {**figures(turns, answers), "retractions": server.retracted(), "running_peak": server.peak_running()}
        if not method.quant:
            return {**out, "logical_tokens": server.info()["max_total_num_tokens"]}
        pool = server.pool()
        wanted = ("logical_tokens", "evict_requests", "effective_bits_avg")
        return {**out, **{name: pool[name] for name in wanted}, "shrinks": sum(pool["shrinks"].values())}


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    if not QUESTIONS <= options.lines < 255:
        raise ValueError(f"--lines {options.lines}: expected {QUESTIONS} to 254")
    parse_size(options.budget_bytes)  # refuses a wrong one before anything runs

    def job(method: Method, seed: int) -> Job:
        key = {"method": method.name, "seed": seed}
        return Job.row(key, lambda: measure(method, options, seed), method.name)

    wanted = methods(options.methods)
    return [job(method, options.seed + repeat) for repeat in range(options.repeats) for method in wanted]


def rows_table(result: Result) -> str:
    """The rows as Markdown, one per method; several seeds are added up, times are medians."""
    by_method: dict[str, list[Row]] = {}
    for row in measured(result):
        by_method.setdefault(row["key"]["method"], []).append(row)

    def center(rows: Sequence[Row], key: str) -> float | None:
        return median([row[key] for row in rows if row[key] is not None])

    def right(rows: Sequence[Row], name: str) -> str:
        good, n = sum(r[f"{name}_right"] for r in rows), sum(r[f"{name}_answers"] for r in rows)
        low, high = wilson(good, n)
        return f"{good}/{n} ({100 * low:.0f}-{100 * high:.0f} %)" if n else "-"

    def average(values: Sequence[float | None]) -> float:
        return statistics.fmean(value or 0 for value in values)

    def pooled(name: str, rows: Sequence[Row]) -> Row:
        parts = zip(*(row["hit_rate_by_part"] for row in rows), strict=True)
        return {
            "method": name,
            "logical_tokens": rows[0]["logical_tokens"],
            "hits": average([r["hit_rate"] for r in rows]),
            "returns": average([r["hit_rate_of_returns"] for r in rows]),
            "parts": ", ".join(f"{100 * average(part):.0f}" for part in parts),
            "ttft_hit": center(rows, "ttft_hit_p50_ms"),
            "ttft_miss": center(rows, "ttft_miss_p50_ms"),
            "all": right(rows, "all"),
            "cold": right(rows, "cold"),
            "lowest": min((r["cold_lowest_bits"] for r in rows if r["cold_lowest_bits"]), default=None),
            "mean": center(rows, "cold_mean_bits"),
        }

    return table(
        [*(pooled(*group) for group in by_method.items()), *unmeasured(result)],
        "method | logical tokens | hit rate | of returns | by quarter of the trace | TTFT ms: hits, misses | right "
        "| of cold hits | their bits: lowest, mean",
        "{method:m} | {logical_tokens:,} | {hits:.1%} | {returns:.1%} | {parts} | {ttft_hit:.0f}, {ttft_miss:.0f} "
        "| {all} | {cold} | {lowest}, {mean:.1f}",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    experiment.server_arguments(parser, chunk=256, pool="12MiB")
    parser.add_argument("--order", choices=("zipf", "round"), default="zipf", help="default %(default)s")
    experiment.numbers(parser, contexts=(16, "programs"), turns=(96, "questions"), lines=(64, "lines of each program"))
    experiment.numbers(parser, concurrency=(4, "requests at a time"), repeats=(1, "seeds from --seed on"))


OUT = "benchmarks/results/prefix.json"
METHODS = "stock,age-2,age-4,static-4,static-2,16bit"
EXPERIMENT = Experiment("prefix", __doc__, plan, rows_table, arguments, METHODS, OUT, ("repeats",))
main = EXPERIMENT.main
