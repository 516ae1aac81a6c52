"""Reasoning programs in SGLang's frontend language, under every method: answers, what their forks share, throughput.

    pmkvq bench programs --out benchmarks/results/programs.json
    pmkvq bench programs --url http://127.0.0.1:30000 --programs tutor

One server per method, in too few bytes for the chains of all forks at 16 bits; with ``--url`` the server that is there.
*Prefix* is what the readers of one shared prefix would hold at 16 bits apart, and once. *Kept* and *bits* are asked of
the server at the end of each program, by a request for one token after its prefix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import requests
from transformers import AutoTokenizer

from benchmarks.harness import experiment
from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.methods import Method, bytes_per_token, methods
from benchmarks.harness.results import Key, Result, Results, Row, table
from benchmarks.harness.servers import REASONER, Server, Unmeasurable
from benchmarks.programs import functions, problems
from benchmarks.programs.functions import PROGRAMS
from benchmarks.programs.runs import Client, Program, figures
from sglang_pmkvq.serving.config import parse_size


def chosen(text: str) -> list[Program]:
    """Programs of a comma-separated list, each once.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    names = [name for name in dict.fromkeys(text.split(",")) if name]
    if not names or not PROGRAMS.keys() >= set(names):
        raise ValueError(f"--programs {text}: expected some of {','.join(PROGRAMS)}")
    return [PROGRAMS[name] for name in names]


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    """A job per method, which has a server for all programs."""
    programs, budget = chosen(options.programs), parse_size(options.budget_bytes)
    asked = {program.name: problems.load(options, program.follow_ups(options)) for program in programs}

    def measure(url: str, model: Path | str, keys: Sequence[Key], server: Server | None) -> Iterator[dict[str, Any]]:
        client = Client(url, AutoTokenizer.from_pretrained(model))
        for key in keys:
            name = key["program"]
            if server:
                server.flush()
                server.mark()
            start = time.perf_counter()
            try:
                runs = client.run_all(PROGRAMS[name], asked[name], options)
                if server:
                    server.check_log(name)
            except RuntimeError as error:  # the server refused a request, or reported an error
                yield {"missing": str(error)}
                continue
            values = figures(runs, time.perf_counter() - start, bytes_per_token(options.model))
            if server:
                values |= {"retractions": server.retracted(), "peak_running": server.peak_running()}
            yield values

    def serve(method: Method, keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
        with experiment.serve_method(options, method, None if method.unbounded else budget, options.running) as server:
            yield from measure(server.url, options.model, keys, server)

    def attach(keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
        try:
            served = requests.get(f"{options.url}/get_model_info", timeout=30).json()["model_path"]
        except requests.RequestException as error:
            raise Unmeasurable(f"--url {options.url}: {error}") from error
        yield from measure(options.url, served if options.model == REASONER else options.model, keys, None)

    def keys(method: str) -> list[Key]:
        return [{"program": program.name, "method": method} for program in programs]

    if options.url:
        return [Job(keys(options.url), attach, options.url)]
    return [Job(keys(m.name), partial(serve, m), m.name) for m in methods(options.methods)]


def rows_table(result: Result) -> str:
    """A result as Markdown."""

    def shown(row: Row) -> Row:
        if "missing" in row:
            return row
        low, high = row["confidence95"]
        return {
            **row,
            "interval": f"{100 * low:.0f}-{100 * high:.0f} %",
            "single": f"{row['chains_right']}/{row['chains']}" if row["chains"] else None,
            "apart": row["prefix_apart_bytes"] / 1024,
            "once": row["prefix_once_bytes"] / 1024,
            "cached": row["cached_tokens"] / row["prompt_tokens"],
        }

    return table(
        map(shown, result["rows"]),
        "program | method | right | 95 % | single chains | prefix KiB, apart / once | kept | bits, lowest / mean "
        "| prompt cached | tok/s | retractions",
        "{program} | {method:m} | {right}/{answers} | {interval} | {single} | {apart:.0f} / {once:.0f} "
        "| {prefix_kept:.0%} | {prefix_lowest_bits} / {prefix_mean_bits:.1f} | {cached:.0%} | {output_tok_s:.0f} "
        "| {retractions}",
        names=2,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    experiment.server_arguments(parser, chunk=256, pool="6MiB")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default %(default)s")
    experiment.numbers(parser, running=(16, "--max-running-requests"))
    parser.add_argument("--url", help="of a running server, such as http://127.0.0.1:30000, instead of --methods")
    problems.arguments(parser)
    functions.arguments(parser)


OUT, FREE = "results/programs.json", ("programs", "url")
EXPERIMENT = Experiment("programs", __doc__, plan, rows_table, arguments, "stock,age-4,age-2", OUT, FREE)
main = EXPERIMENT.main

if __name__ == "__main__":
    raise SystemExit(main())
