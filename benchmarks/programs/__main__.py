"""The programs under every method: answers, what their forks share and at which precision, and throughput.

    pmkvq bench programs --out benchmarks/results/programs.json

One server per method, in the same bytes (``--pool-bytes``), too few for the chains of all forks at 16 bits. Each row is
one program on it, with an empty cache at its start. *Single chains* are the chains that a program chose from. *Prefix*
is what the readers of one shared prefix would hold at 16 bits apart, and once. *Kept* and *bits* are asked of the
server at the end of each program, by a request for one token after its prefix: how much of it is still cached, and the
lowest and mean payload bits of what is. Chains are sampled, so their texts differ from run to run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import AutoTokenizer

from benchmarks.methods import Method, arguments, bytes_per_token, config, extra_args, label, methods
from benchmarks.programs import best_of_n, problems, self_consistency, tree_of_thought, tutor
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Client, Program, figures
from benchmarks.result import Key, Results
from benchmarks.serving import Server, ServerFailed, serve
from sglang_pmkvq.serving.config import parse_size

PROGRAMS = {
    program.name: program
    for program in (self_consistency.PROGRAM, tree_of_thought.PROGRAM, tutor.PROGRAM, best_of_n.PROGRAM)
}


def chosen(text: str) -> list[Program]:
    """Programs of a comma-separated list, each once.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    names = [name for name in dict.fromkeys(text.split(",")) if name]
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown or not names:
        raise ValueError(f"--programs {text}: expected some of {','.join(PROGRAMS)}")
    return [PROGRAMS[name] for name in names]


def measure(
    server: Server,
    method: Method,
    program: Program,
    asked: Sequence[Problem],
    client: Client,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row: the program on all problems, from an empty cache.

    Raises:
        RuntimeError: the server refused a request, or reported an error meanwhile.
    """
    server.flush()
    server.mark()
    before = server.pool()["shrinks"] if method.quant else {}
    start = time.perf_counter()
    runs = client.run_all(program, asked, options)
    wall = time.perf_counter() - start
    if errors := server.errors(since_mark=True):
        raise RuntimeError(f"the server reported: {errors[0]}")
    token_bytes = bytes_per_token(options.model)
    found = figures(runs, wall)
    row = asdict(found)
    row["prefix_apart_bytes"] = found.prefix_tokens_apart * token_bytes
    row["prefix_once_bytes"] = found.prefix_tokens_once * token_bytes
    row["retractions"] = server.retracted()
    row["peak_running"] = server.peak_running()
    if method.quant:
        row["shrinks"] = {step: n - before.get(step, 0) for step, n in server.pool()["shrinks"].items()}
    return row


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    lines = [
        "| program | method | right | 95 % | single chains | prefix KiB, apart / once | kept | bits, lowest / mean "
        "| prompt cached | tok/s | retractions |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        key = row["key"]
        if "missing" in row:
            lines.append(f"| {key['program']} | {label(key['method'])} | missing: {row['missing']} |" + " |" * 8)
            continue
        low, high = row["confidence95"]
        chains = f"{row['chains_right']}/{row['chains']}" if row["chains"] else "-"
        mean = row["prefix_mean_bits"]
        bits = f"{row['prefix_lowest_bits']} / {mean:.1f}" if mean is not None else "-"
        lines.append(
            f"| {key['program']} | {label(key['method'])} | {row['right']}/{row['answers']} "
            f"| {100 * low:.0f}-{100 * high:.0f} % | {chains} "
            f"| {row['prefix_apart_bytes'] / 1024:.0f} / {row['prefix_once_bytes'] / 1024:.0f} "
            f"| {100 * row['prefix_kept']:.0f} % | {bits} "
            f"| {100 * row['cached_tokens'] / row['prompt_tokens']:.0f} % "
            f"| {row['output_tok_s']:.0f} | {row['retractions']} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, argv: Sequence[str] | None) -> Results:
    """Measure the rows that the result file lacks.

    Raises:
        ValueError: an option is wrong.
    """
    wanted, programs = methods(options.methods), chosen(options.programs)
    asked = {program.name: problems.load(options, program.follow_ups(options)) for program in programs}
    pool_bytes = parse_size(options.pool_bytes)
    results = Results(options.out, "programs", config(options, drop=("programs",)), argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    plan: list[Key] = [{"program": p.name, "method": m.name} for p in programs for m in wanted]
    for method in wanted:
        todo = [key for key in plan if key["method"] == method.name and not results.has(key)]
        if not todo:
            continue
        args = method.server_args(
            options.model, None if method.unbounded else pool_bytes, options.running, options.chunk
        )
        args += ["--random-seed", str(options.seed), *extra_args(options)]
        try:
            with serve(options.model, args, quant=method.quant) as server:
                client = Client(server.url, tokenizer)
                for key in todo:
                    name = key["program"]
                    try:
                        row = measure(server, method, PROGRAMS[name], asked[name], client, options)
                    except RuntimeError as error:
                        results.missing(key, str(error))
                    else:
                        results.add(key, **row)
        except ServerFailed as error:
            for key in todo:
                results.missing(key, error.reason)
    results.order(plan)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pmkvq bench programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser, "stock,age-4,age-2", "results/programs.json")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default %(default)s")
    parser.add_argument("--pool-bytes", default="6MiB", help="for KV of every method; default %(default)s")
    parser.add_argument("--running", type=int, default=16, help="--max-running-requests; default %(default)s")
    parser.add_argument("--chunk", type=int, default=256, help="--chunked-prefill-size; default %(default)s")
    problems.arguments(parser)
    for program in PROGRAMS.values():
        program.arguments(parser)
    options = parser.parse_args(argv)
    try:
        results = run(options, argv)
    except (OSError, ValueError) as error:
        print(f"pmkvq bench programs: {error}", file=sys.stderr)
        return 2
    print(table({**results.head, "rows": results.rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
