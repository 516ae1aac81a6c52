#!/usr/bin/env python3
"""Speed of the Triton kernels on this machine's GPU against FlashInfer and SGLang's Triton kernels on bf16.

    python benchmarks/kernels.py                      the whole table -> benchmarks/results/kernels_<GPU>.json
    python benchmarks/kernels.py --only decode        one part: decode, extend, shrink, store, plan
    python benchmarks/kernels.py --resume             go on with the cells of decode and extend that the file lacks
    python benchmarks/kernels.py --dry-run            no GPU: tiny shapes in Triton's interpreter, SGLang's kernels too

Every cell is checked against fp32 before it is timed; a cell that fails prints no time. A cell that does
not fit the memory, and a baseline that cannot run, are rows of the table with the reason. Exits with 1 if
any check failed or a baseline is missing, with 2 if there is no GPU.

Timed by replays of a CUDA graph that rotates through layers, so that the data is several times the L2;
the time of a row is the median of the replays, per layer. GB/s counts the bytes that must be read (and
written), 1 GB = 1e9 bytes; the share is of a large device-to-device copy measured in the same run. A plan
is timed as SGLang has it, from its table of token slots, and from dense page ids; `host_us` is what one
plan costs the host, waiting for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # As a script this folder would come first, and `import kernels` elsewhere means another package.
    sys.path[0] = str(ROOT)

BATCHES = (1, 8, 32, 128)
TOKENS = (4096, 16384, 65536, 131072)
GQAS = (4, 8)
KV_HEADS, HEAD_DIM, PAGE = 8, 128, 16
PARTS = ("decode", "extend", "shrink", "store", "plan")
# Requests and chunk of an extend: fewer new tokens per request in larger batches, and short chunks on long prefixes.
EXTENDS = ((1, 2048), (1, 64), (8, 2048), (8, 64), (32, 512), (128, 64))
STORE_TOKENS = (1, 32, 256)
L2_TIMES = 4  # the working set, in L2 sizes


class Timer:
    """Times functions of a layer index by CUDA graph replay."""

    def __init__(self, repeats: int) -> None:
        import torch

        self.repeats = repeats
        n = 1 << 31
        source = torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        p50 = self(lambda _: target.copy_(source), 2)["p50_us"]
        self.copy_gbs = 2 * n / p50 / 1e3
        self.cache_bytes = L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size

    def layers_for(self, layer_bytes: int) -> int:
        """Layers to rotate through, so that none is still in the L2 when its turn comes again."""
        return max(2, -(-self.cache_bytes // max(1, layer_bytes)))

    def host(self, run: Callable[[], Any]) -> float:
        """Median µs that a call keeps the host busy; the device is idle before each."""
        import torch

        times = []
        for _ in range(5 + self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        return round(statistics.median(times[5:]), 1)

    def __call__(self, run: Callable[[int], Any], layers: int) -> dict[str, float]:
        import torch

        for layer in range(layers):
            run(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                run(layer)
        graph.replay()
        times = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / layers)
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        return {"p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2)}

    def rate(self, row: dict[str, Any], moved: int) -> None:
        row["bytes"] = moved
        row["gbs"] = round(moved / row["p50_us"] / 1e3, 1)
        row["share_of_copy"] = round(row["gbs"] / self.copy_gbs, 3)


class Table:
    """Rows, and whether all of them are what they should be."""

    def __init__(self, out: Path | None, head: dict[str, Any]) -> None:
        self.out, self.head, self.rows = out, head, list[dict[str, Any]]()

    def resume(self, last_mix: str) -> None:
        """Keep the attention cells of an earlier run that are whole; the other parts are quick and made anew.

        Args:
            last_mix: the mix that a cell ends with.
        """
        if self.out is None or not self.out.exists():
            return
        earlier = json.loads(self.out.read_text())
        if any(earlier[name] != self.head[name] for name in ("gpu", "torch", "triton", "commit", "dtype")):
            return
        rows = [row for row in earlier["rows"] if row["part"] in ("decode", "extend")]
        whole = [cell_of(row) for row in rows if row.get("mix") == last_mix]
        failed = [cell_of(row) for row in rows if "failed" in row]
        self.rows = [row for row in rows if cell_of(row) in whole and cell_of(row) not in failed]

    def has(self, cell: dict[str, Any]) -> bool:
        return any(cell_of(row) == cell for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out is not None:
            lines = ",\n".join(f"  {json.dumps(r)}" for r in self.rows)
            # Whole or not at all: the run may be killed while it writes.
            partial = self.out.with_name(self.out.name + ".part")
            partial.write_text(f'{{{json.dumps(self.head)[1:-1]}, "rows": [\n{lines}\n]}}\n')
            os.replace(partial, self.out)

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "failed" in row]


def cell_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of decode or extend shares with the others of its cell."""
    return {k: row[k] for k in ("part", "batch", "tokens", "gqa", "kv_heads", "chunk") if k in row}


def guarded(table: Table, key: dict[str, Any], body: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """A row from ``body``; a failed check, a missing baseline or too little memory become the row."""
    import torch

    from benchmarks.kernel_cases import CheckFailed

    try:
        row = body()
    except CheckFailed as error:
        row = {"failed": str(error)}
    except torch.OutOfMemoryError as error:
        row = {"does_not_fit": str(error).split(". GPU")[0]}
        torch.cuda.empty_cache()
    except Exception as error:  # a missing or failing baseline, or a kernel that does not compile: say so, go on
        row = {"failed": f"{type(error).__name__}: {error}"[:300]}
    if row is not None:
        table.add(**key, **row)
    return row


def attention_row(part: str, timer: Timer | None, case: Any, q: Any, chunk: int) -> tuple[Any, dict[str, Any]]:
    """Output of the last layer and the row of one case; ``chunk`` queries per request."""
    from benchmarks import kernel_cases as kc
    from sglang_pmkvq.kernels.triton_kernels import TritonKernels

    scale, layers = HEAD_DIM**-0.5, case.storage.num_layers
    decode, extend = TritonKernels().decode(), TritonKernels().extend()
    wrapper = decode if part == "decode" else extend
    if part == "decode":
        decode.plan(case.storage, case.req_pages, case.kv_lens)
        out = decode.run(q, layers - 1, scale)
        error = kc.check_decode(case, q, out, layers - 1, scale)
    else:
        extend.plan(case.storage, case.req_pages, case.kv_lens - chunk, case.kv_lens)
        out = extend.run(q, layers - 1, scale)
        error = kc.check_extend(case, q, out, layers - 1, scale, chunk)
    row: dict[str, Any] = {"error": float(f"{error:.2g}")}
    if timer is not None:
        row |= timer(lambda layer: wrapper.run(q, layer, scale), layers)
        timer.rate(row, case.layer_bytes + 2 * q.nbytes)
        if part == "extend":
            pairs = q.shape[0] * (int(case.kv_lens[0]) - chunk / 2)
            row["tflops"] = round(4 * pairs * q.shape[1] * HEAD_DIM / row["p50_us"] / 1e6, 1)
    return out, row


def attention_cell(table: Table, timer: Timer | None, part: str, cell: dict[str, int], dtype: Any) -> None:
    """Decode or extend at one batch and length: every mix, and the baselines on the all-16 pool."""
    import torch

    from benchmarks import kernel_cases as kc
    from sglang_pmkvq.formats import PageShape

    if table.has({"part": part, **cell}):
        return
    device = torch.device("cuda" if timer is not None else "cpu")
    batch, tokens, chunk = cell["batch"], cell["tokens"], cell.get("chunk", 1)
    shape = PageShape(PAGE, cell["kv_heads"], HEAD_DIM, HEAD_DIM)
    scale, base = HEAD_DIM**-0.5, dict[str, float]()
    q = torch.randn(batch * chunk, cell["kv_heads"] * cell["gqa"], HEAD_DIM, device=device).to(dtype)

    def measure(rival: str, case: kc.Case, out: torch.Tensor) -> dict[str, Any]:
        assert timer is not None
        if part == "decode":
            run = (kc.sglang_decode if rival == "sglang_triton" else kc.flashinfer_decode)(case, q, scale)
        else:
            run = (kc.sglang_extend if rival == "sglang_triton" else kc.flashinfer_extend)(case, q, scale, chunk)
        layers = case.storage.num_layers
        error = kc.check(rival, run(layers - 1), out, 2 * kc.TOLERANCE[dtype])
        row = {"error": float(f"{error:.2g}"), **timer(run, layers)}
        timer.rate(row, case.layer_bytes + 2 * q.nbytes)
        base[rival] = row["p50_us"]
        return row

    def one(name: str, layers: int) -> None:
        kept: list[Any] = []

        def body() -> dict[str, Any]:
            case = kc.make_case(shape, batch, tokens, kc.MIXES[name], layers, dtype, device)
            out, row = attention_row(part, timer, case, q, chunk)
            kept.extend((case, out))
            return row | {f"times_{n}": round(t / row["p50_us"], 2) for n, t in base.items()}

        guarded(table, {"part": part, "mix": name, **cell}, body)
        if name == "all-16" and kept and timer is not None:
            for rival in ("flashinfer", "sglang_triton"):
                guarded(table, {"part": part, "baseline": rival, **cell}, lambda rival=rival: measure(rival, *kept))

    def interpreted_baseline() -> dict[str, Any]:
        # In fp16: SGLang's kernels do not know that the interpreter computes bf16 on raw bits.
        case = kc.make_case(shape, batch, tokens, kc.MIXES["all-16"], 1, torch.float16, device)
        if part == "decode":
            out = kc.sglang_decode(case, q.half(), scale)(0)
            return {"error": float(f"{kc.check_decode(case, q.half(), out, 0, scale):.2g}")}
        out = kc.sglang_extend(case, q.half(), scale, chunk)(0)
        return {"error": float(f"{kc.check_extend(case, q.half(), out, 0, scale, chunk):.2g}")}

    if timer is None:
        guarded(table, {"part": part, "baseline": "sglang_triton", **cell}, interpreted_baseline)
    for name, mix in kc.MIXES.items():
        need = kc.layer_bytes_of(shape, batch, tokens, mix)
        layers = timer.layers_for(need) if timer is not None else 1
        if timer is not None:
            torch.cuda.empty_cache()
            if need * layers * 1.05 > torch.cuda.mem_get_info()[0]:
                table.add(part=part, mix=name, **cell, does_not_fit=f"needs {need * layers / 1e9:.1f} GB")
                continue
        one(name, layers)


def pool_part(table: Table, timer: Timer | None, part: str, pages: int, layers: int, dtype: Any) -> None:
    """Store, shrink and plan; each against torch on the same inputs, byte for byte."""
    import torch

    from benchmarks import kernel_cases as kc
    from sglang_pmkvq.formats import PageShape
    from sglang_pmkvq.kernels.attention import PageSource
    from sglang_pmkvq.kernels.device_pages import copy_launch, store_launch
    from sglang_pmkvq.kernels.device_plan import plan_launches
    from sglang_pmkvq.kernels.reference.inputs import copies
    from sglang_pmkvq.kernels.torch_kernels import TorchKernels
    from sglang_pmkvq.kernels.triton_kernels import TritonKernels

    device = torch.device("cuda" if timer is not None else "cpu")
    heads = KV_HEADS if timer is not None else 1
    shape = PageShape(PAGE, heads, HEAD_DIM, HEAD_DIM)

    def twins(mix: kc.Mix) -> tuple[kc.Case, kc.Case]:
        a, b = (kc.make_case(shape, 2, pages * PAGE, mix, layers, dtype, device) for _ in range(2))
        return a, b

    def equal(a: kc.Case, b: kc.Case, name: str) -> None:
        for x, y in zip((*a.storage.arenas, *a.storage.meta), (*b.storage.arenas, *b.storage.meta), strict=True):
            if x is not None and y is not None and not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                raise kc.CheckFailed(f"{name}: bytes differ from torch's")

    def shrink(src: int, dst: int) -> dict[str, Any]:
        a, b = twins(kc.Mix((2, 2), tuple(float(t == src) for t in (16, 8, 4, 2))))
        # The first request's pages shrink into the second one's blocks, in random order.
        units = [(a.storage.table[0][row.long()].long() >> 2).cpu().numpy() for row in a.req_pages]
        page = a.req_pages[0].cpu().numpy()
        command = copies(0, page, units[0], units[1], src, dst)  # a source block's first unit fits any lower tier
        TorchKernels().copy(a.storage, command)
        TritonKernels().copy(b.storage, command)
        equal(a, b, f"shrink {src}→{dst}")
        row: dict[str, Any] = {"pages": int(page.size), "layers": layers}
        if timer is not None:
            launch = copy_launch(b.storage, command)
            row |= timer(lambda _: launch.run(), 1)
            moved = shape.code_bytes(src) + shape.code_bytes(dst) + (shape.meta_bytes if src == 16 else 0)
            timer.rate(row, 2 * moved * layers * int(page.size))
        return row

    def store(tokens: int) -> dict[str, Any]:
        a, b = twins(kc.MIXES["all-16"])
        slots = (a.req_pages.flatten().long()[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()
        slots = slots[:: max(1, slots.numel() // tokens)][:tokens].contiguous()  # of as many requests as can be
        k, v = torch.randn(2, slots.numel(), heads, HEAD_DIM, device=device).to(dtype)
        TorchKernels().store(a.storage, 0, slots, k, v)
        TritonKernels().store(b.storage, 0, slots, k, v)
        equal(a, b, "store")
        row: dict[str, Any] = {"tokens": slots.numel()}
        if timer is not None:
            row |= timer(lambda layer: store_launch(b.storage, layer, slots, k, v).run(), layers)
            timer.rate(row, 4 * k.nbytes)
        return row

    def plan(batch: int, tokens: int, source_name: str, mix: str) -> dict[str, Any]:
        small = PageShape(PAGE, 1, 64, 64)  # the plan does not read KV
        case = kc.make_case(small, batch, tokens, kc.MIXES[mix], 1, dtype, device)
        source = kc.request_table(case) if source_name == "slots" else PageSource(case.req_pages)
        wrapper = TritonKernels().decode()
        wrapper.plan_source(case.storage, source, case.kv_lens)
        device_plan = wrapper.device_plan
        assert device_plan.buffers is not None
        buffers, n = device_plan.buffers, case.req_pages.shape[1]
        for units, arena in ((buffers.k_units, 0), (buffers.v_units, -1)):
            entries = case.storage.table[arena][case.req_pages.long()]
            order = torch.sort(entries & 3, dim=1, stable=True).indices
            if not torch.equal(units[:batch, :n], (entries.gather(1, order) >> 2).int()):
                raise kc.CheckFailed("plan: lists differ from a stable sort by step")
        row: dict[str, Any] = {}
        if timer is not None:
            row |= timer(lambda _: [x.run() for x in plan_launches(buffers, source, case.kv_lens)], 1)
            timer.rate(row, kc.plan_bytes(case))
            row["host_us"] = timer.host(lambda: wrapper.plan_source(case.storage, source, case.kv_lens))
        return row

    if part == "shrink":
        for src, dst in ((16, 8), (16, 4), (16, 2), (8, 4), (8, 2), (4, 2), (16, 16), (4, 4)):
            guarded(table, {"part": part, "from": src, "to": dst}, lambda src=src, dst=dst: shrink(src, dst))
    elif part == "store":
        for tokens in (*STORE_TOKENS, 2 * pages * PAGE) if timer is not None else (1, 3, 2 * pages * PAGE):
            guarded(table, {"part": part}, lambda tokens=tokens: store(tokens))
    else:
        sizes = ((1, 4096), (32, 16384), (256, 131072)) if timer is not None else ((1, 40), (3, 5000))
        for batch, tokens in sizes:
            for name, mix in (("slots", "mix"), ("slots", "k4v2"), ("dense", "mix")):
                key = {"part": part, "source": name, "mix": mix, "batch": batch, "tokens": tokens}
                guarded(table, key, lambda key=key: plan(key["batch"], key["tokens"], key["source"], key["mix"]))


def attention_cells(part: str, dry: bool) -> list[dict[str, int]]:
    batches = [(b, 1) for b in BATCHES] if part == "decode" else list(EXTENDS)
    cells = [
        {"batch": b, "tokens": t, "gqa": g, "kv_heads": KV_HEADS, "chunk": c}
        for g in GQAS
        for t in TOKENS
        for b, c in batches
        if t > c
    ]
    if dry:
        small = ((2, 1),) if part == "decode" else ((2, 5), (1, 17))
        cells = [{"batch": b, "tokens": 100, "gqa": 4, "kv_heads": 1, "chunk": c} for b, c in small]
    return [{k: v for k, v in c.items() if part == "extend" or k != "chunk"} for c in cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    parser.add_argument("--dry-run", action="store_true", help="check tiny shapes in the interpreter, time nothing")
    parser.add_argument("--repeats", type=int, default=30, help="graph replays per row")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="data file (default: benchmarks/results/kernels_<GPU>.json)")
    parser.add_argument("--resume", action="store_true", help="keep whole cells of decode and extend that are in it")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch
    import triton

    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU on this machine: nothing was timed (--dry-run checks on the CPU)", file=sys.stderr)
        return 2
    gpu = "interpreter" if arguments.dry_run else torch.cuda.get_device_name()
    from benchmarks.kernel_cases import MIXES
    from benchmarks.result import commit

    head = {
        "command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:]),
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "dtype": arguments.dtype,
        "head_dim": HEAD_DIM,
        "page_size": PAGE,
    }
    timer = None
    out = arguments.out
    if not arguments.dry_run:
        timer = Timer(arguments.repeats)
        head["copy_gbs"] = round(timer.copy_gbs, 1)
        out = out or ROOT / "benchmarks" / "results" / f"kernels_{gpu.lower().replace(' ', '_')}.json"
    print(json.dumps(head), flush=True)
    table = Table(out, head)
    if arguments.resume:
        table.resume(list(MIXES)[-1])
    dtype = getattr(torch, arguments.dtype)
    for part in (arguments.only,) if arguments.only else PARTS:
        if part in ("decode", "extend"):
            for cell in attention_cells(part, arguments.dry_run):
                attention_cell(table, timer, part, cell, dtype)
        else:
            pool_part(table, timer, part, *((4096, 4) if timer is not None else (4, 1)), dtype)
    if arguments.dry_run:
        print("dry run: no times; of the baselines FlashInfer needs a GPU and was not run")
    for row in table.failed:
        print("FAILED", json.dumps(row), file=sys.stderr)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
