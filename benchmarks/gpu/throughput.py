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
from typing import Any

from benchmarks import serve as client
from benchmarks.gpu.cells import MODELS, Cell, Context, TimeUp, abort_all, check_bytes, command_of, probe
from benchmarks.methods import Method, bytes_per_token, model_facts
from benchmarks.result import Key, Row
from benchmarks.serving import Server, serve

GIB = 1 << 30
START_S = 75.0  # a server with CUDA graphs, from nothing to its first answer
CHUNK = 2048


@dataclass(frozen=True)
class System:
    """A server to compare.

    Attributes:
        method: name in ``benchmarks/methods.py``.
        backend: stock's attention backend; ours has its own.
        running: share of a workload's concurrency that may run at once. Hard-protected windows are 16-bit pages of
            every request that may run, so ``static`` would have little pool left for as many as the others.
        on_cpu: whether a CPU can serve it.
    """

    method: str
    backend: str = "flashinfer"
    running: float = 1.0
    on_cpu: bool = True


STOCK = System("stock")
OURS_4, OURS_2 = System("age-4"), System("age-2")
STATIC_2 = System("static-2", running=0.5)
SYSTEMS = {
    "stock": STOCK,
    "age-4": OURS_4,
    "age-2": OURS_2,
    "static-2": STATIC_2,
    "stock-fp8": System("stock-fp8"),
    "stock-triton": System("stock", backend="triton", on_cpu=False),
}


@dataclass(frozen=True)
class Workload:
    """Requests of one length, all at once.

    Attributes:
        prompt, output: tokens of each; EOS is ignored.
        requests: how many, and how many at a time.
    """

    prompt: int
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
DRY_PLANS = (Plan("tiny", 448 << 10, (Workload(16, 120, 20), Workload(64, 8, 2)), tuple(SYSTEMS)),)


def server_args(context: Context, system: System, plan: Plan, tokenizer: str) -> list[str]:
    """Flags of a server; the same for all systems but for the cache itself."""
    method = Method.parse(system.method)
    most = max(w.requests for w in plan.workloads)
    running = max(1, round(most * system.running))
    longest = max(w.prompt + w.output for w in plan.workloads)
    args = method.server_args(MODELS / plan.model, plan.kv_bytes, running, 64 if context.dry else CHUNK)
    args += ["--load-format", "dummy", "--tokenizer-path", tokenizer, "--context-length", str(longest + 64)]
    # The client reads whole answers so far; one message per token would be gigabytes.
    args += ["--stream-interval", "32", "--grammar-backend", "none", "--random-seed", "0"]
    if not method.quant:
        args += context.stock_args(system.backend)
    if not context.dry:
        args += ["--cuda-graph-max-bs-decode", str(running)]
    return args


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
    out = []
    for running, tokens, bits, tok_s, queued in LINE.findall(log):
        if int(running) and float(tok_s):
            out.append(DecodeLine(int(running), int(tokens), float(bits or stock_bits), float(tok_s), int(queued)))
    return out


def log_figures(lines: Sequence[DecodeLine], token_bytes: int) -> dict[str, Any] | None:
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


def run_workload(context: Context, server: Server, method: Method, plan: Plan, work: Workload, tokenizer: Any) -> Row:
    """One workload on an empty cache: the client's figures if it ended in time, and the server's."""
    model = MODELS / plan.model
    profile = client.Profile("long-cot", 0, work.prompt, work.output)
    row: Row = {"workload": str(work), "client": None}
    server.flush()
    server.mark()
    before = server.pool() if method.quant else {}
    try:
        with context.clock.limit(context.options.seconds):
            count, seed = work.requests, context.options.seed
            out = client.run_client(server.url, tokenizer, context.out, profile, count, count, seed)
        row["client"] = client.client_figures(out, profile.output_lengths(count, seed))
    except TimeUp:
        if context.clock.left() <= 0:
            raise
        row["client_missing"] = f"not all {work.requests} requests ended in {context.options.seconds:.0f} s"
    token_bytes = bytes_per_token(model)
    # The first line counts from the last one before, whatever lies between.
    lines = decode_lines(server.new_log(), 8.0 if method.name == "stock-fp8" else 16.0)[1:]
    row["retractions"] = server.retracted()
    row["saturated"] = log_figures([line for line in lines if line.queued], token_bytes)
    row["all"] = log_figures(lines, token_bytes)
    if method.quant:
        pool = server.pool()
        row["pool"] = {
            "shrinks": {k: n - before["shrinks"].get(k, 0) for k, n in pool["shrinks"].items()},
            "shrink_s": round(pool["shrink_seconds"] - before["shrink_seconds"], 4),
            "evict_requests": pool["evict_requests"] - before["evict_requests"],
        }
        lost = {k: pool[k] for k in ("dropped_rows", "unmapped_reads") if pool[k]}
        if lost:
            raise RuntimeError(f"{method.name} lost {lost}; its times are worth nothing")
    if row["client"] is None:
        abort_all(server)
    errors = server.errors(since_mark=True)
    if errors:
        raise RuntimeError(f"the server logged {errors[:3]}")
    return row


def cell(context: Context, name: str, plan: Plan, round_: int) -> Cell:
    system = SYSTEMS[name]
    method = Method.parse(system.method)
    key = {"model": plan.model, "kv_bytes": plan.kv_bytes, "system": name, "round": round_}
    key["workloads"] = "; ".join(map(str, plan.workloads))

    def run(values: dict[str, Any]) -> None:
        facts = model_facts(MODELS / plan.model)
        tokenizer = context.out / "tokenizers" / str(facts["vocab_size"])
        if not (tokenizer / "tokenizer_config.json").exists():
            client.word_tokenizer(tokenizer, facts["vocab_size"])
        args = server_args(context, system, plan, str(tokenizer))
        model = MODELS / plan.model
        log = context.log("throughput", plan.model, plan.kv_bytes >> 20, name, len(plan.workloads), round_)
        with serve(model, args, quant=method.quant, device=context.device, log_path=log) as server:
            values["server"] = command_of(server)
            probe(server, facts["vocab_size"])
            width = 1 if "fp8" in name else 2
            values |= check_bytes(server, method, plan.kv_bytes, bytes_per_token(model) * width // 2)
            values["rows"] = []
            for work in plan.workloads:
                values["rows"].append(run_workload(context, server, method, plan, work, tokenizer))

    return Cell(key, run, START_S + 20.0 * len(plan.workloads))


def cells(context: Context) -> Iterator[Cell]:
    for plan in DRY_PLANS if context.dry else PLANS:
        for round_ in range(context.options.rounds):
            for name in plan.systems if round_ % 2 == 0 else reversed(plan.systems):
                if context.dry and not SYSTEMS[name].on_cpu:
                    print(f"suite: {name} does not run on the CPU, its cell is left out of the dry run", flush=True)
                    continue
                yield cell(context, name, plan, round_)


def table(rows: Sequence[Row]) -> str:
    """Markdown: each workload of each server, and its saturated tokens per second against stock's of the same round."""
    lines = [
        "| model | KV GiB | workload | system | tok/s, requests waiting | x stock | client tok/s | TTFT ms p50 "
        "| step ms | running mean, peak | retractions | eff. bits | KV GB/s | shrink s |",
        "|" + "---|" * 14,
    ]

    def number(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    def rate(row: Row) -> float | None:
        """Saturated tokens per second, else the client's."""
        return row["saturated"]["tok_s"] if row["saturated"] else row["client"] and row["client"]["output_tok_s"]

    def place(key: Key) -> tuple[Any, ...]:
        return key["model"], key["kv_bytes"], key["round"]

    base: dict[Any, float | None] = {}
    done = [(r["key"], w) for r in rows for w in r.get("rows", [])]
    for key, work in done:
        if key["system"] == "stock":
            base[place(key), work["workload"]] = rate(work)
    for key, work in done:
        own, stock, client_row = rate(work), base.get((place(key), work["workload"])), work["client"] or {}
        best = work["saturated"] or work["all"] or {}
        pool = work.get("pool", {})
        lines.append(
            f"| {key['model']} | {key['kv_bytes'] / GIB:.3g} | {work['workload']} | {key['system']} | {number(own)} "
            f"| {number(own / stock if own and stock else None, '.2f')} | {number(client_row.get('output_tok_s'))} "
            f"| {number(client_row.get('ttft_p50_ms'))} | {number(best.get('step_ms'), '.2f')} "
            f"| {number(best.get('running_mean'), '.1f')}, {number(best.get('running_peak'))} | {work['retractions']} "
            f"| {number(best.get('effective_bits_mean'), '.2f')} | {number(best.get('kv_gb_s'))} "
            f"| {number(pool.get('shrink_s'), '.2f')} |"
        )
    return "\n".join(lines)
