"""Throughput under SGLang's own client: stock and ours in the same KV bytes, one real server after the other.

A cell is one server and the workloads that it gets, in turn. Systems take turns within a plan; a second round goes
through them backwards. Figures of a workload:

* the client's (``benchmarks.serve``), if all its requests ended within ``--seconds``; else there are none;
* the server's, from its decode log, over the lines in which requests were waiting (``saturated``) and over all: tokens
  per second, running requests, milliseconds per decode step, KV bytes that attention read per second.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import requests

from benchmarks import serve as client
from benchmarks.gpu.cells import GIB, MODELS, START_S, SYSTEMS, Cell, CheckFailed, Context, TimeUp, dummy_server
from benchmarks.harness.methods import bytes_per_token
from benchmarks.harness.results import Key, Row
from benchmarks.harness.results import table as markdown_table
from benchmarks.harness.servers import Server


@dataclass(frozen=True)
class Workload:
    """Requests of one length, all at once; EOS is ignored."""

    prompt: int  # tokens
    output: int
    requests: int

    def __str__(self) -> str:
        return f"{self.prompt} in, {self.output} out, {self.requests} at a time"


@dataclass(frozen=True)
class Plan:
    """Systems and workloads of one model and one number of KV bytes."""

    model: str
    kv_bytes: int
    workloads: tuple[Workload, ...]
    systems: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """KV bytes, requests at a time, tokens of the longest."""
        longest = max(w.prompt + w.output for w in self.workloads)
        return self.kv_bytes, max(w.requests for w in self.workloads), longest


LONG_COT = (Workload(512, 8192, 256),)
LONG_PROMPT = tuple(Workload(32768, 1024, n) for n in (1, 8, 32))
SWEEP = tuple(Workload(512, 8192, n) for n in (16, 64, 128))
MAIN = ("stock", "age-4", "age-2")
# Most important first: a run that ends early has measured those.
PLANS = (
    Plan("r1-distill-qwen-7b", 8 * GIB, LONG_COT, (*MAIN, "static-2", "stock-fp8", "stock-triton")),
    Plan("r1-distill-qwen-7b", 24 * GIB, LONG_PROMPT, (*MAIN, "stock-fp8")),
    Plan("r1-distill-llama-8b", 8 * GIB, LONG_COT, (*MAIN, "static-2", "stock-fp8", "stock-triton")),
    Plan("r1-distill-qwen-7b", 24 * GIB, LONG_COT, MAIN),
    Plan("r1-distill-llama-8b", 24 * GIB, LONG_PROMPT, (*MAIN, "stock-fp8")),
    Plan("qwen3-8b", 8 * GIB, LONG_COT, MAIN),
    Plan("r1-distill-qwen-7b", 8 * GIB, SWEEP, MAIN),
    Plan("r1-distill-llama-8b", 24 * GIB, LONG_COT, MAIN),
)
# On a CPU stock has one backend only.
DRY_SYSTEMS = tuple(name for name in SYSTEMS if name != "stock-triton")
DRY_PLANS = (Plan("tiny", 448 << 10, (Workload(16, 120, 20), Workload(64, 8, 2)), DRY_SYSTEMS),)


@dataclass(frozen=True)
class DecodeLine:
    """One line of the decode log: figures of the `interval` steps before it."""

    running: int
    tokens: int
    bits: float
    tok_s: float
    queued: int

    @property
    def seconds(self) -> float:
        """Of one step: every running request gives one token."""
        return self.running / self.tok_s


LINE = re.compile(
    r"Decode batch.*?#running-req: (\d+), #token: (\d+),(?:.*?eff bits: ([\d.]+),)?"
    r".*?gen throughput \(token/s\): ([\d.]+), #queue-req: (\d+)"
)


def decode_lines(log: str, stock_bits: float = 16.0) -> list[DecodeLine]:
    """The decode lines of a log; `stock_bits` is the width of KV where the line does not say."""
    found = [
        DecodeLine(int(running), int(tokens), float(bits or stock_bits), float(tok_s), int(queued))
        for running, tokens, bits, tok_s, queued in LINE.findall(log)
    ]
    return [line for line in found if line.running and line.tok_s]


def log_figures(lines: Sequence[DecodeLine], token_bytes: int) -> Row | None:
    """Means over decode lines, weighted by their time; None without lines.

    Args:
        token_bytes: 16-bit KV bytes of a token. What attention reads in a step is that of the tokens that running
            requests hold, at the mean width of the pool's pages.
    """
    if not lines:
        return None
    seconds = sum(line.seconds for line in lines)
    tokens = sum(line.running for line in lines)
    read = sum(line.tokens * token_bytes * line.bits / 16 for line in lines)
    return {
        "lines": len(lines),
        "tok_s": round(tokens / seconds, 1),
        "step_ms": round(1e3 * seconds / len(lines), 3),
        "running_mean": round(tokens / len(lines), 1),
        "running_peak": max(line.running for line in lines),
        "kv_gb_s": round(read / seconds / 1e9, 1),
        "effective_bits_mean": round(statistics.fmean(line.bits for line in lines), 2),
    }


def run_workload(context: Context, server: Server, name: str, plan: Plan, work: Workload) -> Row:
    """One workload on an empty cache: the client's figures if it ended in time, and the server's."""
    quant, token_bytes = SYSTEMS[name].quant, bytes_per_token(MODELS / plan.model)
    profile = client.Profile("long-cot", 0, work.prompt, work.output)
    row: Row = {"workload": str(work), "client": None}
    server.flush()
    server.mark()
    before = server.pool() if quant else {}
    try:
        with context.clock.limit(context.options.seconds):
            n, tokenizer = work.requests, context.tokenizer(plan.model)
            out = client.run_client(server.url, tokenizer, context.out, profile, n, n, seed=0)
        row["client"] = client.client_figures(out, profile.output_lengths(n, seed=0))
    except TimeUp:
        if context.clock.left() <= 0:
            raise
        row["client_missing"] = f"not all {work.requests} requests ended in {context.options.seconds:.0f} s"
    # The first line counts from the last one before, whatever lies between.
    lines = decode_lines(server.new_log(), 8.0 if "fp8" in name else 16.0)[1:]
    row["retractions"] = server.retracted()
    row["saturated"] = log_figures([line for line in lines if line.queued], token_bytes)
    row["all"] = log_figures(lines, token_bytes)
    if quant:
        pool = server.pool()
        row["pool"] = {
            "shrinks": {k: n - before["shrinks"].get(k, 0) for k, n in pool["shrinks"].items()},
            "shrink_s": round(pool["shrink_seconds"] - before["shrink_seconds"], 4),
        }
        if lost := {k: pool[k] for k in ("dropped_rows", "unmapped_reads") if pool[k]}:
            raise CheckFailed(f"{name} lost {lost}; its times are worth nothing")
    if row["client"] is None:
        requests.post(f"{server.url}/abort_request", json={"rid": "", "abort_all": True}, timeout=60)
    return row


def check_bytes(server: Server, name: str, plan: Plan) -> Row:
    """KV bytes and tokens of a server; CheckFailed if they exceed what everybody was given, or are far from it."""
    tokens = server.info()["max_total_num_tokens"]
    stored = tokens * bytes_per_token(MODELS / plan.model) // (2 if "fp8" in name else 1)
    if SYSTEMS[name].quant:
        tokens, stored = (server.pool()[name] for name in ("logical_tokens", "storage_bytes"))
    if not 0.9 * plan.kv_bytes < stored <= plan.kv_bytes:
        raise CheckFailed(f"{name} stores {stored} bytes of KV, everybody was given {plan.kv_bytes}")
    return {"kv_bytes": stored, "kv_tokens": tokens}


def run(context: Context, plan: Plan, name: str, log: str, values: Row) -> None:
    """One server and its workloads."""
    with dummy_server(context, values, log, name, plan.model, *plan.size) as server:
        values |= check_bytes(server, name, plan)
        values["rows"] = []
        for work in plan.workloads:
            values["rows"].append(run_workload(context, server, name, plan, work))


def cells(context: Context) -> Iterator[Cell]:
    for plan in DRY_PLANS if context.dry else PLANS:
        for round_ in range(context.options.rounds):
            for name in plan.systems if round_ % 2 == 0 else reversed(plan.systems):
                key = {"model": plan.model, "kv_bytes": plan.kv_bytes, "system": name, "round": round_}
                key |= {"workloads": "; ".join(map(str, plan.workloads)), "seconds": context.options.seconds}
                log = f"throughput-{plan.model}-{plan.kv_bytes >> 20}-{name}-{len(plan.workloads)}-{round_}"
                yield Cell(key, partial(run, context, plan, name, log), START_S + 20.0 * len(plan.workloads))


def table(rows: Sequence[Row]) -> str:
    """Markdown: each workload of each server, and its saturated tokens per second against stock's of the same round."""
    done = [(row["key"], work) for row in rows for work in row.get("rows", [])]

    def rate(work: Row) -> float | None:
        """Saturated tokens per second, else the client's."""
        return work["saturated"]["tok_s"] if work["saturated"] else (work["client"] or {}).get("output_tok_s")

    def place(key: Key, work: Row) -> tuple[object, ...]:
        return key["model"], key["kv_bytes"], key["round"], work["workload"]

    base = {place(key, work): rate(work) for key, work in done if key["system"] == "stock"}

    def shown(key: Key, work: Row) -> Row:
        own, stock = rate(work), base.get(place(key, work))
        ratio = own / stock if own and stock else None
        best = work["saturated"] or work["all"]
        return {"key": key, **work, "gib": key["kv_bytes"] / GIB, "own": own, "ratio": ratio, "best": best}

    return markdown_table(
        [shown(key, work) for key, work in done],
        "model | KV GiB | workload | system | tok/s, requests waiting | x stock | client tok/s | TTFT ms p50 | step ms "
        "| running mean, peak | retractions | eff. bits | KV GB/s | shrink s",
        "{model} | {gib:.3g} | {workload} | {system} | {own:,.0f} | {ratio:.2f} | {client[output_tok_s]:,.0f} "
        "| {client[ttft_p50_ms]:,.0f} | {best[step_ms]:.2f} | {best[running_mean]:.1f}, {best[running_peak]} "
        "| {retractions} | {best[effective_bits_mean]:.2f} | {best[kv_gb_s]:,.0f} | {pool[shrink_s]:.2f}",
    )
