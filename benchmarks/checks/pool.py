"""Checks of servers against stock SGLang, against a reference, and against time; each takes ``--help``.

What ``tests/support`` checks once, at length: ``equality``, ``oracle``, ``capacity`` and ``steady``; and ``tpot``, time
per output token with no page shrunk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.harness.experiment import Experiment, Job, number_list, numbers, problem_arguments
from benchmarks.harness.methods import model_facts
from benchmarks.harness.results import Key, Result, Results, measured, table
from benchmarks.harness.servers import Server, generate_many, greedy, serve
from benchmarks.harness.tasks import line_range, problem_set, prompt_ids, random_prompts
from tests.support.memory import SHAPE, resident_memory, run
from tests.support.models import make_model
from tests.support.oracle import CASES, Case, load, noisy, run_case
from tests.support.stock import compare


def problems(options: argparse.Namespace, spare: int) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, and ``spare`` tokens more than the longest chain has."""
    found = problem_set(options.problems, *line_range(options.lines), options.first)
    return prompt_ids(options.model, found)[0], max(p.chain_tokens for p in found) + spare


# -- equality ------------------------------------------------------------------------------------------------


def equality(options: argparse.Namespace, results: Results) -> list[Job]:
    ids, longest = problems(options, 64)

    def job(part: str) -> Job:
        key = {"part": part, "problems": options.problems, "lines": options.lines}
        return Job.row(key, partial(compare, options.model, ids, longest, part == "alone"), part)

    return [job(part) for part in ("alone", "together") if options.part in (part, "both")]


def equality_table(result: Result) -> str:
    alone = {"alone": {"how": "off, 1", "stock_against_stock": None}, "together": {"how": "on, 8"}}
    return table(
        [{**row, **alone[row["key"]["part"]]} for row in result["rows"]],
        "radix tree, requests at a time | answers | tokens | shrinks | ours ≠ stock | stock ≠ stock",
        "{how} | {answers} | {tokens:,} | {shrinks} | {ours_against_stock} | {stock_against_stock}",
    )


def unequal(result: Result) -> bool:
    return any(r["ours_against_stock"] > r["stock_against_stock"] or r["shrinks"] for r in measured(result))


def equality_arguments(parser: argparse.ArgumentParser) -> None:
    problem_arguments(parser, 200)
    parser.add_argument("--part", choices=["alone", "together", "both"], default="both")


# -- time per output token -----------------------------------------------------------------------------------


def time_per_token(server: Server, prompts: Sequence[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """Milliseconds per decode step, and the answers: the difference of ``new`` and of 1 output tokens."""

    def timed(tokens: int) -> tuple[float, list[list[int]]]:
        server.flush()
        bodies = [greedy(p, tokens, ignore_eos=True) for p in prompts]
        start = time.perf_counter()
        out = generate_many(server, bodies, len(bodies))
        return time.perf_counter() - start, [a["output_ids"] for a in out]

    first, _ = timed(1)
    whole, output = timed(new)
    return 1e3 * (whole - first) / (new - 1), output


def compare_times(
    ours: Server, stock: Server, vocab: int, batch: int, repeats: int,
    new: int = 128, prompt: int = 256, exact: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Median of per-repeat ratios, alternating which goes first, so that a busy machine hits both.

    Args:
        prompt, new: tokens in and out.
        exact: a request alone must have the same answer from both; else only as many tokens.

    Raises:
        RuntimeError: it has not.
    """
    prompts = random_prompts(batch, batch, prompt, vocab)
    times: list[tuple[float, float]] = []
    for server in (ours, stock):
        time_per_token(server, prompts, 8)
    for repeat in range(repeats):
        order = (ours, stock) if repeat % 2 == 0 else (stock, ours)
        got = {id(s): time_per_token(s, prompts, new) for s in order}
        (a, ours_ids), (b, stock_ids) = got[id(ours)], got[id(stock)]
        if exact and batch == 1 and ours_ids != stock_ids:
            raise RuntimeError("answers differ; no time is worth keeping")
        if any(len(ids) != new for ids in (*ours_ids, *stock_ids)):
            raise RuntimeError(f"an answer has not {new} tokens; no time is worth keeping")
        times.append((a, b))
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "ours_ms": statistics.median(a for a, _ in times),
        "stock_ms": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
        "ratios": [round(a / b, 4) for a, b in times],
        "shrinks": sum(ours.pool()["shrinks"].values()),
    }


def tpot(options: argparse.Namespace, results: Results) -> list[Job]:
    vocab = model_facts(options.model)["vocab_size"]
    args = ["--max-running-requests", "32", "--chunked-prefill-size", "8192"]

    def measure(keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
        with (
            serve(options.model, [*args, "--pmkvq-pool-bytes", "512MiB"]) as ours,
            serve(options.model, [*args, "--max-total-tokens", "100000"], quant=False) as stock,
        ):
            for key in keys:
                yield compare_times(ours, stock, vocab, key["batch"], options.repeats)

    batches = number_list("--batches", options.batches)
    return [Job([{"batch": batch, "repeats": options.repeats} for batch in batches], measure)]


def tpot_table(result: Result) -> str:
    return table(
        [{**row, "low": min(row["ratios"]), "high": max(row["ratios"])} for row in measured(result)],
        "batch | ours ms | stock ms | ratio (median) | lowest to highest | shrinks",
        "{batch} | {ours_ms:.2f} | {stock_ms:.2f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {shrinks}",
    )


def tpot_arguments(parser: argparse.ArgumentParser) -> None:
    numbers(parser, repeats=(6, "times that all is measured"))
    parser.add_argument("--batches", default="1,8,32")


# -- what the pool holds, what it costs, and what is read from it -------------------------------------------


def oracle(options: argparse.Namespace, results: Results) -> list[Job]:
    ids, longest = problems(options, 16)
    model = cache(partial(load, options.model))
    control = cache(lambda: None if options.no_control else noisy(model()))

    def job(case: Case) -> Job:
        key = {"case": case.name, "problems": options.problems, "lines": options.lines}
        return Job.row(key, lambda: run_case(options.model, model(), case, ids, longest, control()), case.name)

    return [job(case) for case in CASES if not options.only or options.only in case.name]


def oracle_table(result: Result) -> str:
    return table(
        result["rows"],
        "case | chains | positions | mean bits at the end | mean difference | 99 % | largest | control: mean "
        "| control: 99 % | control: largest",
        "{case} | {chains} | {positions:,} | {mean_bits_at_end:.2f} | {mean_difference:.1e} | {p99_difference:.1e} "
        "| {max_difference:.1e} | {control_mean:.1e} | {control_p99:.1e} | {control_max:.1e}",
    )


def oracle_arguments(parser: argparse.ArgumentParser) -> None:
    problem_arguments(parser, 20, lines="60-80")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--no-control", action="store_true", help="leave the bf16 control out: half the time")


def logical_tokens(model: Path, final: str, pool: str) -> dict[str, Any]:
    """A server with a pool of ``pool``; b bits cost b + 32/G with scales, G channels to a group."""
    with serve(model, ["--pmkvq-pool-bytes", pool, "--pmkvq-final-bits", final]) as server:
        got = server.pool()
    ratio = got["logical_tokens"] / got["stock_tokens"]
    bound = 16 / (int(final) + 32 / got["group_size"])
    wanted = ("logical_tokens", "stock_tokens", "max_running_requests", "chunked_prefill_size")
    return {**{name: got[name] for name in wanted}, "ratio": ratio, "of_the_bound": ratio / bound}


def capacity(options: argparse.Namespace, results: Results) -> list[Job]:
    def tokens(final: str) -> Job:
        key = {"part": "logical tokens", "final": final, "pool": "1GiB"}
        return Job.row(key, lambda: logical_tokens(options.model, final, key["pool"]), f"final {final}")

    def memory() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return resident_memory(make_model(Path(folder) / "wide", **SHAPE))  # type: ignore[arg-type]

    return [*map(tokens, ("8", "4", "2")), Job.row({"part": "resident memory"}, memory, "resident memory")]


def capacity_table(result: Result) -> str:
    tokens = table(
        [row for row in result["rows"] if row["key"]["part"] == "logical tokens"],
        "final bits | pool | logical tokens | stock's in the same bytes | ratio | of 16 / (b + 32/G)",
        "{final} | {pool} | {logical_tokens:,} | {stock_tokens:,} | {ratio:.2f} | {of_the_bound:.3f}",
    )
    memory = table(
        [row for row in result["rows"] if row["key"]["part"] == "resident memory"],
        "tokens through | pool MiB | of its bytes in use at the end | peak of the scheduler above an empty pool, MiB "
        "| what ran at once, at 16 bits, MiB",
        "{tokens_through:,} | {budget_bytes:.0fM} | {used_share_at_end:.0%} | {growth:.0fM} "
        "| {running_set_at_16_bits:.0fM}",
    )
    return f"{tokens}\n\n{memory}"


def steady(options: argparse.Namespace, results: Results) -> list[Job]:
    return [Job.row({"min_active_bits": n}, partial(run, options.model, n), f"{n} bits") for n in (8, 2)]


def steady_table(result: Result) -> str:
    return table(
        result["rows"],
        "`--pmkvq-min-active-bits` | tokens filled | fresh request: lowest bits | mean bits | hit rate of old prompts",
        "{min_active_bits} | {filled_tokens:,} into {logical_tokens:,} | {fresh_lowest_bits} | {fresh_mean_bits} "
        "| {hit_rate:.1%}",
    )


EXPERIMENTS = (
    Experiment(
        "checks equality", "Greedy answers of a pool that never shrinks: the token ids must be those of stock SGLang",
        equality, equality_table, equality_arguments, free=("part", "problems", "lines"), failed=unequal,
    ),
    Experiment(
        "checks oracle", "Log-probabilities of output tokens over low-bit pages, against tests/support/oracle.py",
        oracle, oracle_table, oracle_arguments, free=("only", "problems", "lines"),
    ),
    Experiment(
        "checks tpot", "Time per output token with no page shrunk, against stock, in alternation",
        tpot, tpot_table, tpot_arguments, free=("repeats", "batches"),
    ),
    Experiment(
        "checks capacity", "Logical tokens in the same bytes against stock; resident memory of a pool driven full",
        capacity, capacity_table,
    ),
    Experiment(
        "checks steady", "A fresh request on a warm server: how wide is its KV, and what do old prompts hit?",
        steady, steady_table,
    ),
)  # fmt: skip
