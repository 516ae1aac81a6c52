"""Right answers of a running server, methods at equal bytes: pass@1, lengths, bytes and effective bits.

    pmkvq bench accuracy --methods 16bit,stock,age-2,static-2 --share 0.25 --problems 200
    pmkvq bench accuracy --model MODEL --task gsm8k --data gsm8k.jsonl --problems 200 --share 0.4 --concurrency 16
    pmkvq bench accuracy --model MODEL --task aime.jsonl --samples 16 --temperature 0.6 --pool-bytes 8GiB

Every row is one real server that answers all problems once. Everybody gets the same bytes, except ``16bit``;
``--share`` is of what the running problems need at 16 bits when right answers end. Tasks: the bundled one, ``gsm8k``
(few-shot), ``needles``, ``tools`` (two dependent calls), ``orders`` (JSON by schema), or a file. Methods, tasks and
checkers: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.harness import experiment, methods, structured, texts
from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.methods import PAGE, Method, bytes_per_token, model_facts
from benchmarks.harness.results import Result, Results, Row, measured, mib, table, unmeasured
from benchmarks.harness.servers import Server, together
from benchmarks.harness.stats import bootstrap, percent, points, wilson
from benchmarks.harness.tasks import CHECKERS, Item, builtin, item_ids, load_jsonl

TASKS = ("gsm8k", "needles", "tools", "orders")
GSM8K_TOKENS = 300
# SGLang's default grammar backend, xgrammar, ends the server at the first such request on a CPU. Without any parser no
# call is parsed; this one leaves required calls to a JSON schema. Not qwen25: its format begins with a token that
# Qwen2.5-Coder cannot write, and is constrained by structural tags that only xgrammar knows.
TASK_FLAGS = {
    "tools": ("--grammar-backend", "llguidance", "--tool-call-parser", "pythonic"),
    "orders": ("--grammar-backend", "llguidance"),
}


@dataclass
class Run:
    """Problems, their token ids, and how they are sampled; ``ends``: tokens that right answers have, or may have."""

    options: argparse.Namespace
    items: list[Item]
    ids: list[list[int]]
    ends: list[int]
    max_new: int

    @property
    def concurrency(self) -> int:
        return int(min(self.options.concurrency, len(self.items)))

    @property
    def held_bytes(self) -> int:
        """16-bit bytes, in whole pages, of the first ``concurrency`` problems when their chains end.

        Pages that all of them begin with count once.
        """
        first = self.ids[: self.concurrency]
        shared = len(os.path.commonprefix(first)) // PAGE * PAGE
        own = [len(ids) + end - shared for ids, end in zip(first, self.ends, strict=False)]
        return methods.held_bytes(self.options.model, [shared, *own])

    def enough_bytes(self) -> int:
        """16-bit bytes that never run short, whatever runs together."""
        longest = max(map(len, self.ids)) + self.max_new
        return methods.held_bytes(self.options.model, [longest + PAGE] * self.concurrency)

    def ask(self, server: Server, method: Method, problem: tuple[Item, list[int]]) -> dict[str, Any]:
        """One answer."""
        item, ids = problem
        params: dict[str, Any] = {"temperature": self.options.temperature, "top_p": self.options.top_p}
        if method.quant:
            params["custom_params"] = {"pmkvq_kv_bits": True}
        if item.tools:
            params |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": self.max_new}
            return server.converse(item.messages, item.tools, item.respond, **params)
        return server.generate(input_ids=ids, sampling_params={**params, "max_new_tokens": self.max_new, **item.params})


def problems(options: argparse.Namespace, tokenizer: Any) -> list[Item]:
    """What ``--task`` names.

    Raises:
        ValueError: a file holds none. OSError: it cannot be read.
    """
    o, text = options, str(options.data or "opticks")
    if o.task == "builtin":
        return builtin(o.problems or 200, o.lines, o.first)
    if o.task == "gsm8k":
        if o.data is None:
            raise ValueError("--task gsm8k needs --data FILE: lines of GSM8K with question and answer")
        found = texts.gsm8k(o.data)
    elif o.task == "needles":
        found = texts.needles(tokenizer, texts.read_text(text), o.seed)
    elif o.task == "tools":
        found = structured.tool_chains(o.first + (o.problems or 40), o.seed)
    elif o.task == "orders":
        before = tokenizer.decode(texts.pieces(tokenizer, text, 1, 320)[0])
        found = structured.orders(o.first + (o.problems or 40), o.seed, before)
    else:
        found = load_jsonl(Path(o.task), o.checker, o.seed)
    return found[o.first :][: o.problems or None]


def load(options: argparse.Namespace) -> Run:
    """Problems of the command.

    Raises:
        ValueError: options that contradict one another, or a file that holds no problems.
    """
    if options.samples > 1 and options.temperature <= 0:
        raise ValueError(f"--samples {options.samples} needs a --temperature above 0: greedy passes are all the same")
    model_facts(options.model)  # a wrong path is said here, before anybody looks for it elsewhere
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    items = problems(options, tokenizer)
    if not items:
        raise ValueError(f"--first {options.first}: {options.task} has no problems from there on")
    longest = max(item.max_tokens or 0 for item in items)
    max_new = longest + 64 if longest else GSM8K_TOKENS if options.task == "gsm8k" else 16384
    max_new = options.max_new_tokens or max_new
    ends = [item.max_tokens or len(tokenizer(item.gold)["input_ids"]) * bool(item.gold) for item in items]
    if options.share and not all(ends):
        raise ValueError(
            f"--share needs a task whose lengths are known, not {options.task}; give --pool-bytes, not {options.share}"
        )
    return Run(options, items, [item_ids(tokenizer, item) for item in items], [n or max_new for n in ends], max_new)


def measure(run: Run, method: Method, budget: int, sample: int = 0) -> dict[str, Any]:
    """Serve one method in ``budget`` bytes and answer every problem once."""
    # Of equal flags the server takes the last one.
    flags = ["--random-seed", str(run.options.seed + sample)]
    flags += TASK_FLAGS.get(run.options.task, ())
    with experiment.serve_method(run.options, method, budget, run.concurrency, *flags) as server:
        server.flush()
        server.mark()
        start = time.perf_counter()
        asked = zip(run.items, run.ids, strict=True)
        answers = together(partial(run.ask, server, method), asked, run.concurrency)
        wall = time.perf_counter() - start
        share = round(budget / run.held_bytes, 4)
        return {"share": share, **judge(run, answers), "wall_s": round(wall, 2), **memory(run, server, method, answers)}


def judge(run: Run, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers and lengths."""
    right = [item.check(a["text"]) for item, a in zip(run.items, answers, strict=True)]
    lengths = [a["meta_info"]["completion_tokens"] for a in answers]
    parts: dict[str, list[int]] = {}
    for item, a in zip(run.items, answers, strict=True):
        for name, check in item.parts.items():
            hits, of = parts.get(name, (0, 0))
            parts[name] = [hits + check(a["text"]), of + 1]
    return {
        "problems": len(right),
        "right": sum(right),
        "wrong": [i for i, ok in enumerate(right) if not ok],
        "output_tokens": sum(lengths),
        "cut_off": sum((a["meta_info"]["finish_reason"] or {}).get("type") == "length" for a in answers),
        **({"parts": parts} if parts else {}),
    }


def memory(run: Run, server: Server, method: Method, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes of pages in use over the run, and what they were worth in bits."""
    out: dict[str, Any] = {"retractions": server.retracted(), "peak_running": server.peak_running()}
    if method.quant:
        pool = server.pool()
        bits = [a["meta_info"]["pmkvq_kv_bits"][0] for a in answers]
        return out | {
            **{name: pool[name] for name in ("used_bytes_peak", "used_bytes_avg", "effective_bits_avg")},
            "lowest_bits": min(b["lowest"] for b in bits),
            "end_bits_mean": sum(b["mean"] for b in bits) / len(bits),
            "shrinks": sum(pool["shrinks"].values()),
        }
    # Stock says how many tokens it holds in every eighth decode step's line.
    tokens = [int(n) for n in re.findall(r"#token: (\d+)", server.new_log())] or [0]
    size = method.stock_token_bytes(run.options.model)
    bits_now = 16.0 * size / bytes_per_token(run.options.model)
    return out | {
        "used_bytes_peak": max(tokens) * size,
        "used_bytes_avg": sum(tokens) / len(tokens) * size,
        **dict.fromkeys(("effective_bits_avg", "lowest_bits", "end_bits_mean"), bits_now),
        "shrinks": 0,
    }


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    """A row per sample, method and budget; ``16bit`` stands once, as no budget limits it."""
    chosen = methods.methods(options.methods)
    run = load(options)
    sizes = experiment.budgets(options, run.held_bytes)

    pairs = [(m, run.enough_bytes()) for m in chosen if m.unbounded]
    pairs += [(m, size) for size in sizes for m in chosen if not m.unbounded]
    return [
        Job.row(
            {"method": method.name, "budget_bytes": size, "sample": sample, "problems": len(run.items)},
            partial(measure, run, method, size, sample),
            f"{method.name}, {mib(size)} MiB",
        )
        for sample in range(options.samples)
        for method, size in pairs
    ]


# -- tables --------------------------------------------------------------------------------------------------


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
    return wilson(rows[0]["right"], rows[0]["problems"]) if len(rows) == 1 else bootstrap(correctness(rows))


def against(rows: Sequence[Row], other: Sequence[Row]) -> str:
    """Points by which ``rows`` are better than ``other``, paired by problem, with their 95 % interval."""
    return points(correctness(rows) - correctness(other))


def groups(result: Result) -> dict[tuple[str, int, int], list[Row]]:
    """Measured rows by (method, budget in bytes, problems), samples together."""
    out: dict[tuple[str, int, int], list[Row]] = {}
    for row in measured(result):
        key = row["key"]
        out.setdefault((key["method"], key["budget_bytes"], key["problems"]), []).append(row)
    return out


def rows_table(result: Result) -> str:
    """Rows as Markdown; with a ``baseline``, differences to it on the same problems and bytes, with their interval."""
    by, baseline = groups(result), result.get("baseline")
    bundled = result.get("config", {}).get("task", "builtin") == "builtin"
    names = list(dict.fromkeys(name for row in measured(result) for name in row.get("parts", ())))
    # No budget limits the ceiling, so it stands once, for all of them.
    ceiling = {problems: rows for (name, _, problems), rows in by.items() if name == baseline == "16bit"}

    def pooled(name: str, budget: int, problems: int, rows: Sequence[Row]) -> Row:
        other = by.get((baseline or "", budget, problems)) or ceiling.get(problems)
        parts = {name: np.sum([row["parts"][name] for row in rows], 0) for name in rows[0].get("parts", ())}
        # Files of earlier versions have no bytes in use.
        used = [(row["used_bytes_peak"], row["used_bytes_avg"]) for row in rows if "used_bytes_peak" in row]
        samples = f" × {len(rows)}" if len(rows) > 1 else ""
        output = float(np.mean([row["output_tokens"] for row in rows]))
        return {
            "method": name,
            "budget": budget,
            "pass": f"{100 * sum(row['right'] for row in rows) / (problems * len(rows)):.1f} % of {problems}{samples}",
            "interval": percent(interval(rows)),
            "tokens": output / problems,
            "cut": sum(row["cut_off"] for row in rows) if not bundled else None,
            "parts": {name: f"{hits}/{of}" for name, (hits, of) in parts.items()},
            "speed": output / float(np.mean([row["wall_s"] for row in rows])),
            "peak": max((peak for peak, _ in used), default=None),
            "mean": float(np.mean([average for _, average in used])) if used else None,
            "bits": float(np.mean([row["effective_bits_avg"] for row in rows])),
            "end_bits": float(np.mean([row["end_bits_mean"] for row in rows])),
            "running": max(row["peak_running"] for row in rows),
            "retractions": sum(row["retractions"] for row in rows),
            "against": against(rows, other) if other and name != baseline else None,
        }

    head = "method | pool MiB | pass@1 | 95 % | tokens | peak MiB | mean MiB | eff. bits | at the end | retractions"
    form = "{method:m} | {budget:M} | {pass} | {interval} | {tokens:.0f} | {peak:M} | {mean:M} | {bits:.2f} "
    form += "| {end_bits:.2f} | {retractions}"
    if not bundled:
        head = head.replace("tokens |", "tokens | cut off |")
        form = form.replace("{tokens:.0f}", "{tokens:.0f} | {cut}")
    head += "".join(f" | {name}" for name in names)
    form += "".join(f" | {{parts[{name}]}}" for name in names)
    head += " | running" + (" | tok/s" if result.get("timed") else "")
    form += " | {running}" + (" | {speed:.0f}" if result.get("timed") else "")
    head += f" | points against {baseline}" if baseline else ""
    form += " | {against}" if baseline else ""
    return table([*(pooled(*key, rows) for key, rows in by.items()), *unmeasured(result)], head, form)


def arguments(parser: argparse.ArgumentParser) -> None:
    experiment.server_arguments(parser, chunk=512)
    told = f"builtin, {', '.join(TASKS)}, or a JSON-lines file"
    parser.add_argument("--task", default="builtin", help=told)
    told = "lines of GSM8K; for needles and orders a text file, default Newton's Opticks"
    parser.add_argument("--data", type=Path, help=told)
    parser.add_argument("--checker", choices=sorted(CHECKERS), help="for records that name none")
    parser.add_argument("--problems", type=int, default=0, help="default: 200 bundled ones, 40 made up, all of a file")
    parser.add_argument("--first", type=int, default=0, help="index of the first problem")
    parser.add_argument("--lines", default="64-128", help="program lines of the bundled task")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=0, help="default: what the task needs; for files 16384")
    experiment.numbers(parser, samples=(1, "answers per problem"), concurrency=(32, "requests at a time"))
    experiment.budgets_arguments(parser)
    parser.add_argument("--timed", action="store_true", help="the machine has no other work: show speeds in the table")
    parser.add_argument("--baseline", help="method that the others are compared with in the table")


FREE = ("share", "budget_bytes", "problems", "samples")
METHODS = "16bit,stock,age-4,age-2,static-4,static-2"
EXPERIMENT = Experiment("accuracy", __doc__, plan, rows_table, arguments, METHODS, "results/accuracy.json", FREE)
main = EXPERIMENT.main
