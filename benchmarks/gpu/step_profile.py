"""Where the time of a decode step goes: SGLang's own profiler on a running server, its trace as a table.

Kernels are sorted by name into attention, plan, shrink, store, matrix products, sampling and the rest. *Host* is the
time of a step in which the GPU does nothing: waiting for the scheduler, launches, Python. On the CPU there are no
kernels; operators take their place, with those that they call, and plan and shrink have no names of their own there.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import requests

from benchmarks.gpu.cells import GIB, MODELS, START_S, Cell, CheckFailed, Context, dummy_server
from benchmarks.harness.methods import model_facts
from benchmarks.harness.results import Row
from benchmarks.harness.results import table as markdown_table
from benchmarks.harness.servers import Server, generate_many, greedy
from benchmarks.harness.tasks import random_prompts

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

# (system, pool bytes, requests, prompt tokens). At 16 bits 4 GiB hold the prompts and little more, 16 GiB all.
CASES = {
    "ours, shrinking": ("age-4", 4 * GIB, 64, 1024),
    "ours, nothing shrunk": ("age-4", 16 * GIB, 64, 1024),
    "stock": ("stock", 16 * GIB, 64, 1024),
}
DRY_CASES = {"ours, shrinking": ("age-4", 1280 << 10, 12, 64)}
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


def outermost(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events without those that are nested in another one of their thread."""
    reached: dict[Any, float] = defaultdict(lambda: float("-inf"))
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= reached[event["pid"], event["tid"]]:
            reached[event["pid"], event["tid"]] = event["ts"] + event["dur"]
            yield event


def shares(trace: dict[str, Any], steps: int, top: int = 12) -> dict[str, Any]:
    """A Chrome trace of `steps` decode steps as milliseconds per step and shares, by category."""
    timed = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur") is not None]
    device = [e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events = device or list(outermost(e for e in timed if e.get("cat") == "cpu_op"))
    if not events:
        raise CheckFailed("the trace holds no kernels and no operators")
    wall = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    by_name, by_category = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in events:
        by_name[event["name"]] += event["dur"]
        by_category[category(event["name"])] += event["dur"]
    by_category["host"] = wall - covered((e["ts"], e["ts"] + e["dur"]) for e in events)

    def longest(times: dict[str, float]) -> list[tuple[str, float]]:
        return sorted(times.items(), key=lambda item: -item[1])

    def per_step(spent: float) -> float:
        return round(spent / steps / 1e3, 4)

    return {
        "of": "kernels" if device else "operators",
        "steps": steps,
        "step_ms": per_step(wall),
        "ms_per_step": {name: per_step(spent) for name, spent in longest(by_category)},
        "share": {name: round(spent / wall, 4) for name, spent in longest(by_category)},
        "longest": [
            {"name": name[:120], "category": category(name), "ms_per_step": per_step(spent)}
            for name, spent in longest(by_name)[:top]
        ],
    }


def wait_for(what: str, met: Any, seconds: float = 300.0) -> None:
    """Poll until `met()` is true; CheckFailed if that takes longer."""
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            raise CheckFailed(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.1)


def record(server: Server, folder: Path, steps: int) -> Path:
    """Profile the next `steps` forwards of a busy server; the trace file."""
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["CPU", "GPU"], "with_stack": False}
    requests.post(f"{server.url}/start_profile", json=body, timeout=120).raise_for_status()
    wait_for("the trace", lambda: "Profiling done" in server.new_log())
    (trace,) = folder.glob("*.trace.json.gz")
    return trace


def run(context: Context, case: str, system: str, pool: int, count: int, prompt: int, values: Row) -> None:
    model, new = (DRY_MODEL, DRY_NEW) if context.dry else (MODEL, NEW)
    steps = 5 if context.dry else STEPS
    name = case.replace(",", "").replace(" ", "-")
    folder = context.out / "traces" / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.trace.json.gz"):
        old.unlink()
    prompts = random_prompts(3, count, prompt, model_facts(MODELS / model)["vocab_size"])
    bodies = [greedy(p, new, ignore_eos=True) for p in prompts]
    # The load ends with the server, which the inner block ends first.
    with (
        ThreadPoolExecutor(1) as load,
        dummy_server(context, values, f"profile-{name}", system, model, pool, count, prompt + new) as server,
    ):
        server.flush()
        server.mark()
        answers = load.submit(generate_many, server, bodies, count)
        # Not before all have their prompts in: a prefill among the steps would be counted as decode.
        wait_for("all requests to decode", lambda: server.peak_running() == count or answers.done())
        if "shrinking" in case:
            wait_for("a shrink", lambda: sum(server.pool()["shrinks"].values()) > 0 or answers.done())
        if answers.done():
            raise CheckFailed(f"all ended before {count} of them decoded together")
        values |= shares(json.loads(gzip.decompress(record(server, folder, steps).read_bytes())), steps)
        whole = [len(a["output_ids"]) for a in answers.result()]
        if whole != [new] * count:
            raise CheckFailed(f"answers of {new} tokens were expected, got {sorted(set(whole))}")


def cells(context: Context) -> Iterator[Cell]:
    for case, values in (DRY_CASES if context.dry else CASES).items():
        yield Cell({"case": case}, partial(run, context, case, *values), START_S + 45)


def table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of a step by category, and their shares."""
    rows = [row for row in rows if "ms_per_step" in row]
    names = sorted({c for row in rows for c in row["ms_per_step"]})
    forms = [f"{{ms_per_step[{name}]:.3f}} ({{share[{name}]:.0%}})" for name in names]
    head, form = (" | ".join(cells) for cells in (["case", "step ms", *names], ["{case}", "{step_ms:.3f}", *forms]))
    return markdown_table(rows, head, form)
