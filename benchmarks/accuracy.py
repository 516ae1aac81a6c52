"""Right answers of a running server, methods at equal bytes: pass@1, lengths, bytes and effective bits.

    pmkvq bench accuracy --methods 16bit,stock,age-2,static-2 --share 0.25 --problems 200
    pmkvq bench accuracy --model MODEL --task aime.jsonl --samples 16 --temperature 0.6 --pool-bytes 8GiB

Every row is one real server that answers all problems once through its decode path, so a row's sample number counts
passes over the problems. Methods are named in benchmarks/methods.py, files and checkers described in
benchmarks/tasks.py. ``--share`` gives the pool as a share of what the running problems need at 16 bits when their
chains end (bundled task only); several values make a row per method and value. Everybody gets the same bytes, except
``16bit``. A run that is killed goes on with the rows that its file lacks.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import methods
from benchmarks.methods import PAGE, Method, bytes_per_token
from benchmarks.result import Results, Row, wilson
from benchmarks.serving import Server, ServerFailed, generate_many, serve
from benchmarks.tasks import CHECKERS, Item, builtin, load_jsonl

DEFAULT = "16bit,stock,age-4,age-2,static-4,static-2"


@dataclass
class Run:
    """Problems, their token ids, and how they are sampled."""

    options: argparse.Namespace
    items: list[Item]
    ids: list[list[int]]
    max_new: int

    @property
    def concurrency(self) -> int:
        return int(min(self.options.concurrency, len(self.items)))

    @property
    def held_bytes(self) -> int:
        """16-bit bytes, in whole pages, of the first ``concurrency`` problems when their chains end."""
        ends = [
            len(prompt) + (item.max_tokens or self.max_new) for item, prompt in zip(self.items, self.ids, strict=True)
        ]
        return methods.held_bytes(self.options.model, ends[: self.concurrency])

    def enough_bytes(self) -> int:
        """16-bit bytes that never run short, whatever runs together."""
        longest = max(map(len, self.ids)) + self.max_new
        return (math.ceil(longest / PAGE) + 1) * PAGE * self.concurrency * bytes_per_token(self.options.model)

    def bodies(self, method: Method) -> list[dict[str, Any]]:
        o = self.options
        params: dict[str, Any] = {
            "temperature": o.temperature,
            "top_p": o.top_p,
            "max_new_tokens": self.max_new,
        }
        if method.quant:
            params["custom_params"] = {"pmkvq_kv_bits": True}
        return [{"input_ids": prompt, "sampling_params": params} for prompt in self.ids]


def load(options: argparse.Namespace) -> Run:
    """Problems of the command.

    Raises:
        ValueError: options that contradict one another, or a file that holds no problems.
    """
    from transformers import AutoTokenizer

    if options.samples > 1 and options.temperature <= 0:
        raise ValueError(f"--samples {options.samples} needs a --temperature above 0: greedy passes are all the same")
    if options.task == "builtin":
        items = builtin(options.problems or 200, options.lines, options.first)
    else:
        items = load_jsonl(Path(options.task), options.checker, options.seed)
        items = items[options.first :][: options.problems or None]
        if options.share:
            raise ValueError(
                f"--share needs --task builtin, whose lengths are known; give --pool-bytes, not {options.share}"
            )
    if not items:
        raise ValueError(f"--first {options.first}: {options.task} has no problems from there on")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = [
        tokenizer.apply_chat_template(item.messages, add_generation_prompt=True, return_dict=False) for item in items
    ]
    longest = max(item.max_tokens or 0 for item in items)
    return Run(options, items, ids, options.max_new_tokens or (longest + 64 if longest else 16384))


def measure(run: Run, method: Method, pool: int, sample: int) -> dict[str, Any]:
    """Serve one method and answer every problem once."""
    o = run.options
    args = method.server_args(o.model, pool, run.concurrency, o.chunk)
    args += ["--random-seed", str(o.seed + sample), *methods.extra_args(o)]
    with serve(o.model, args, quant=method.quant) as server:
        server.flush()
        server.mark()
        start = time.perf_counter()
        answers = generate_many(server, run.bodies(method), run.concurrency)
        wall = time.perf_counter() - start
        return {**_judge(run, answers), "wall_s": round(wall, 2), **_memory(run, server, method, answers)}


def _judge(run: Run, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right = [item.check(a["text"]) for item, a in zip(run.items, answers, strict=True)]
    lengths = [a["meta_info"]["completion_tokens"] for a in answers]
    cut = sum((a["meta_info"]["finish_reason"] or {}).get("type") == "length" for a in answers)
    return {
        "problems": len(right),
        "right": sum(right),
        "wrong": [i for i, ok in enumerate(right) if not ok],
        "output_tokens": sum(lengths),
        "output_tokens_mean": round(sum(lengths) / len(lengths), 1),
        "cut_off": cut,
    }


def _memory(run: Run, server: Server, method: Method, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes of pages in use over the run, and what they were worth in bits."""
    out: dict[str, Any] = {"retractions": server.retracted(), "peak_running": server.peak_running()}
    if method.quant:
        pool = server.pool()
        bits = [a["meta_info"]["pmkvq_kv_bits"][0] for a in answers]
        return out | {
            "used_bytes_peak": pool["used_bytes_peak"],
            "used_bytes_avg": pool["used_bytes_avg"],
            "effective_bits_avg": pool["effective_bits_avg"],
            "lowest_bits": min(b["lowest"] for b in bits),
            "end_bits_mean": sum(b["mean"] for b in bits) / len(bits),
            "shrinks": sum(pool["shrinks"].values()),
        }
    # Stock says how many tokens it holds in every eighth decode step's line.
    tokens = [int(n) for n in re.findall(r"#token: (\d+)", server.new_log())] or [0]
    width = 1 if method.name == "stock-fp8" else 2
    size = bytes_per_token(run.options.model) * width // 2
    bits_now = 8.0 * width
    return out | {
        "used_bytes_peak": max(tokens) * size,
        "used_bytes_avg": sum(tokens) / len(tokens) * size,
        "effective_bits_avg": bits_now,
        "lowest_bits": bits_now,
        "end_bits_mean": bits_now,
        "shrinks": 0,
    }


def plan(run: Run, chosen: Sequence[Method], sizes: Sequence[int]) -> list[tuple[dict[str, Any], Method, int, int]]:
    """(key, method, pool bytes, sample) of every row; ``16bit`` stands once, as no size limits it."""
    out = []
    free = [m for m in chosen if m.unbounded]
    for sample in range(run.options.samples):
        pairs = [(m, run.enough_bytes()) for m in free]
        pairs += [(m, size) for size in sizes for m in chosen if not m.unbounded]
        for method, size in pairs:
            key = {"method": method.name, "pool_bytes": size, "sample": sample, "problems": len(run.items)}
            out.append((key, method, size, sample))
    return out


def correctness(rows: Sequence[Row]) -> np.ndarray:
    """float64 [problems], the share of right answers of each problem over the rows' samples."""
    total = np.zeros(rows[0]["problems"])
    for row in rows:
        hits = np.ones(row["problems"])
        hits[row["wrong"]] = 0
        total += hits
    return total / len(rows)


def interval(rows: Sequence[Row]) -> tuple[float, float]:
    """95 % interval of pass@1: Wilson for one sample; else problems are drawn anew with all their samples."""
    if len(rows) == 1:
        return wilson(rows[0]["right"], rows[0]["problems"])
    return bootstrap(correctness(rows))


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values``, float64 [problems]."""
    from scipy.stats import bootstrap as resample

    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = resample((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def groups(result: dict[str, Any]) -> dict[tuple[str, int, int], list[Row]]:
    """Measured rows by (method, pool bytes, problems), samples together."""
    out: dict[tuple[str, int, int], list[Row]] = {}
    for row in result["rows"]:
        key = row["key"]
        if "missing" not in row:
            out.setdefault((key["method"], key["pool_bytes"], key["problems"]), []).append(row)
    return out


def table(result: dict[str, Any], baseline: str | None = None) -> str:
    """Rows as Markdown; with a baseline, differences to it on the same problems and bytes, with their interval."""
    names = ["method", "pool MiB", "pass@1", "95 %", "tokens", "peak MiB", "mean MiB", "eff. bits", "at the end"]
    names += ["retractions", *([f"points against {baseline}"] if baseline else [])]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    by = groups(result)
    for (name, pool, problems), rows in by.items():
        value = float(correctness(rows).mean())
        low, high = interval(rows)

        def mean(what: str, rows: Sequence[Row] = rows) -> float:
            return float(np.mean([row[what] for row in rows]))

        cells = [
            methods.label(name),
            f"{pool / 2**20:.1f}",
            f"{100 * value:.1f} % of {problems}" + (f" × {len(rows)}" if len(rows) > 1 else ""),
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{mean('output_tokens_mean'):.0f}",
            f"{max(row['used_bytes_peak'] for row in rows) / 2**20:.1f}",
            f"{mean('used_bytes_avg') / 2**20:.1f}",
            f"{mean('effective_bits_avg'):.2f}",
            f"{mean('end_bits_mean'):.2f}",
            f"{sum(row['retractions'] for row in rows)}",
        ]
        other = by.get((baseline or "", pool, problems))
        if baseline:
            cells.append(against(rows, other) if other and name != baseline else "-")
        lines.append("| " + " | ".join(cells) + " |")
    for row in result["rows"]:
        if "missing" in row:
            name = methods.label(row["key"]["method"])
            lines.append(f"| {name} | missing: {row['missing']} " + "| " * (len(names) - 2) + "|")
    return "\n".join(lines)


def against(rows: Sequence[Row], other: Sequence[Row]) -> str:
    """Points by which ``rows`` are better than ``other``, paired by problem, with their 95 % interval."""
    difference = correctness(rows) - correctness(other)
    low, high = bootstrap(difference)
    return f"{100 * difference.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmkvq bench accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods.arguments(parser, DEFAULT, "results/accuracy.json")
    parser.add_argument("--task", default="builtin", help="builtin, or a JSON-lines file")
    parser.add_argument("--checker", choices=sorted(CHECKERS), help="for records that name none")
    parser.add_argument("--problems", type=int, default=0, help="default: 200 of the bundled task, all of a file")
    parser.add_argument("--first", type=int, default=0, help="index of the first problem")
    parser.add_argument("--lines", default="64-128", help="program lines of the bundled task")
    parser.add_argument("--samples", type=int, default=1, help="answers per problem")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=0, help="default: what the task needs, 16384 for files")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="--chunked-prefill-size of every server")
    methods.size_arguments(parser)
    parser.add_argument("--baseline", help="method that the others are compared with in the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        chosen = methods.methods(options.methods)
        run = load(options)
        rows = plan(run, chosen, methods.pool_sizes(options, run.held_bytes))
        drop = ("share", "pool_bytes", "problems", "samples", "baseline")
        results = Results(options.out, "accuracy", methods.config(options, drop=drop), argv)
    except (OSError, ValueError) as error:
        print(f"pmkvq bench accuracy: {error}", file=sys.stderr)
        return 2
    with tqdm(total=len(rows), unit="row") as bar:
        for key, method, size, sample in rows:
            bar.set_description(f"{method.name}, {size / 2**20:.0f} MiB")
            if not results.has(key):
                try:
                    results.add(key, **measure(run, method, size, sample))
                except ServerFailed as error:
                    results.missing(key, error.reason)
            bar.update()
    results.order(key for key, *_ in rows)
    print(table({"rows": results.rows}, options.baseline))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
