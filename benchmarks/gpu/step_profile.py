"""Where the time of a decode step goes: SGLang's own profiler on a running server, its trace as a table.

Kernels are sorted by name into attention, plan, shrink, store, matrix products, sampling and the rest. *Host* is the
time of a step in which the GPU does nothing: waiting for the scheduler, launches, Python. On the CPU there are no
kernels; operators take their place, each with its own time only, and plan and shrink have no names of their own there.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from benchmarks.gpu.cells import MODELS, Cell, CheckFailed, Context, command_of, probe
from benchmarks.gpu.throughput import CHUNK, GIB, START_S, SYSTEMS
from benchmarks.methods import Method, model_facts
from benchmarks.result import Row
from benchmarks.serve import word_tokenizer
from benchmarks.serving import Server, generate_many, serve
from benchmarks.steady import random_prompts

STEPS = 20

# The first that matches; names of our kernels are those of kernels/triton/.
CATEGORIES: tuple[tuple[str, str], ...] = (
    ("shrink", r"^(copy|table)_kernel"),
    ("plan", r"^(count|scatter|schedule|ranges)_kernel|kv_indices|num_kv_splits|req_to_token|page_table"),
    ("store", r"^store_kernel|store_kv|set_kv|kv_buffer"),
    (
        "attention",
        r"^(decode|merge|extend)_kernel|BatchDecode|BatchPrefill|MergeStates|_fwd_(grouped_)?kernel|"
        r"flash|attention|attn|fmha",
    ),
    ("sampling", r"argmax|softmax|sampl|topk|top_k|multinomial|sort"),
    ("matrix products", r"gemm|gemv|matmul|cutlass|nvjet|cublas|xmma|splitk|aten::(mm|addmm|bmm|linear)\b"),
    ("copies", r"^Memcpy|^Memset|aten::(copy_|fill_|zero_)"),
)

# (name, system, pool bytes, requests, prompt tokens). At 16 bits 4 GiB hold the prompts and little more, 16 GiB all.
CASES = (
    ("ours, shrinking", "age-4", 4 * GIB, 64, 1024),
    ("ours, nothing shrunk", "age-4", 16 * GIB, 64, 1024),
    ("stock", "stock", 16 * GIB, 64, 1024),
)
DRY_CASES = (("ours, shrinking", "age-4", 1280 << 10, 12, 64),)
MODEL, NEW = "r1-distill-qwen-7b", 2048
DRY_MODEL, DRY_NEW = "tiny", 400


def category(name: str) -> str:
    """The first category that the name of a kernel or operator fits, else ``other``."""
    return next((c for c, pattern in CATEGORIES if re.search(pattern, name, re.IGNORECASE)), "other")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def own_times(events: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """(name, µs without what is nested in it) of the events of a thread."""
    open_: list[tuple[str, float, float, list[float]]] = []

    def close() -> tuple[str, float]:
        name, start, end, inner = open_.pop()
        return name, end - start - sum(inner)

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_ and open_[-1][2] <= start:
            yield close()
        if open_:
            open_[-1][3].append(min(end, open_[-1][2]) - start)
        open_.append((event["name"], start, end, []))
    while open_:
        yield close()


def shares(trace: dict[str, Any], steps: int, top: int = 12) -> dict[str, Any]:
    """A Chrome trace of `steps` decode steps as milliseconds per step and shares, by category.

    Raises:
        CheckFailed: it holds neither kernels nor operators.
    """
    timed = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur") is not None]
    device = [e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events = device or [e for e in timed if e.get("cat") == "cpu_op"]
    if not events:
        raise CheckFailed("the trace holds no kernels and no operators")
    start = min(e["ts"] for e in events)
    wall = max(e["ts"] + e["dur"] for e in events) - start
    by_name: dict[str, float] = defaultdict(float)
    if device:
        for event in device:
            by_name[event["name"]] += event["dur"]
    else:
        threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            threads[event["pid"], event["tid"]].append(event)
        for thread in threads.values():
            for name, own in own_times(thread):
                by_name[name] += own
    by_category: dict[str, float] = defaultdict(float)
    for name, spent in by_name.items():
        by_category[category(name)] += spent
    by_category["host"] = wall - covered((e["ts"], e["ts"] + e["dur"]) for e in events)
    ranked = sorted(by_name.items(), key=lambda item: -item[1])[:top]
    return {
        "of": "kernels" if device else "operators",
        "steps": steps,
        "step_ms": round(wall / steps / 1e3, 4),
        "ms_per_step": {c: round(t / steps / 1e3, 4) for c, t in sorted(by_category.items(), key=lambda i: -i[1])},
        "share": {c: round(t / wall, 4) for c, t in sorted(by_category.items(), key=lambda i: -i[1])},
        "longest": [
            {"name": n[:120], "category": category(n), "ms_per_step": round(t / steps / 1e3, 4)} for n, t in ranked
        ],
    }


def wait_for(what: str, met: Any, seconds: float = 300.0) -> None:
    """Poll until `met()` is true.

    Raises:
        CheckFailed: it does not become true.
    """
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            raise CheckFailed(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.1)


def record(server: Server, folder: Path, steps: int) -> Path:
    """Profile the next `steps` forwards of a busy server; the trace file.

    Raises:
        CheckFailed: none appears.
    """
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["CPU", "GPU"], "with_stack": False}
    requests.post(f"{server.url}/start_profile", json=body, timeout=120).raise_for_status()
    wait_for("the trace", lambda: "Profiling done" in server.new_log())
    (trace,) = folder.glob("*.trace.json.gz")
    return trace


def cells(context: Context) -> Iterator[Cell]:
    name_of_model, new = (DRY_MODEL, DRY_NEW) if context.dry else (MODEL, NEW)
    model = MODELS / name_of_model
    vocab = model_facts(model)["vocab_size"]
    for case, system, pool, count, prompt in DRY_CASES if context.dry else CASES:

        def run(values: dict[str, Any], case: str = case, system: str = system, pool: int = pool, count: int = count,
                prompt: int = prompt) -> None:  # fmt: skip
            tokenizer = context.out / "tokenizers" / str(vocab)
            if not (tokenizer / "tokenizer_config.json").exists():
                word_tokenizer(tokenizer, vocab)
            method = Method.parse(SYSTEMS[system].method)
            args = method.server_args(model, pool, count, 64 if context.dry else CHUNK)
            args += ["--load-format", "dummy", "--tokenizer-path", str(tokenizer), "--grammar-backend", "none"]
            args += ["--random-seed", "0", "--context-length", str(prompt + new + 64)]
            args += [] if method.quant else context.stock_args(SYSTEMS[system].backend)
            folder = context.out / "traces" / case.replace(",", "").replace(" ", "-")
            for old in folder.glob("*.trace.json.gz"):
                old.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
            bodies = [{"input_ids": p, "sampling_params": params} for p in random_prompts(3, count, prompt, vocab)]
            log = context.log("profile", case)
            # The load ends with the server, which the inner block ends first.
            with (
                ThreadPoolExecutor(1) as load,
                serve(model, args, quant=method.quant, device=context.device, log_path=log) as server,
            ):
                values["server"] = command_of(server)
                probe(server, vocab)
                server.flush()
                server.mark()
                answers = load.submit(generate_many, server, bodies, count)
                # Not before all have their prompts in: a prefill among the steps would be counted as decode.
                wait_for("all requests to decode", lambda: server.peak_running() == count or answers.done())
                if method.quant and "shrinking" in case:
                    wait_for("a shrink", lambda: sum(server.pool()["shrinks"].values()) > 0 or answers.done())
                if answers.done():
                    raise CheckFailed(f"all ended before {count} of them decoded together")
                steps = 5 if context.dry else STEPS
                values |= shares(json.loads(gzip.decompress(record(server, folder, steps).read_bytes())), steps)
                whole = [len(a["output_ids"]) for a in answers.result()]
                if whole != [new] * count:
                    raise CheckFailed(f"answers of {new} tokens were expected, got {sorted(set(whole))}")
                if errors := server.errors():
                    raise CheckFailed(f"the server logged {errors[:3]}")

        yield Cell({"case": case}, run, START_S + 45)


def table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of a step by category, and their shares."""
    rows = [row for row in rows if "ms_per_step" in row]
    names = sorted({c for row in rows for c in row["ms_per_step"]})
    lines = ["| case | step ms | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for row in rows:
        parts = [f"{row['ms_per_step'].get(c, 0.0):.3f} ({100 * row['share'].get(c, 0.0):.0f} %)" for c in names]
        lines.append(f"| {row['key']['case']} | {row['step_ms']:.3f} | " + " | ".join(parts) + " |")
    return "\n".join(lines)
