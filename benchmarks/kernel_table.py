"""The table of kernel speeds: its cells, checks and times. What it means: ``python -m benchmarks.kernels --help``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import kernel_cases as kc
from benchmarks.gpu.cells import facts
from benchmarks.harness.results import ROOT, Key, Results, Row
from benchmarks.kernels import PARTS
from sglang_pmkvq.formats import PageShape
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.device_pages import copy_launch, store_launch
from sglang_pmkvq.kernels.device_plan import plan_launches
from sglang_pmkvq.kernels.reference.inputs import copies
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.triton_kernels import TritonKernels

BATCHES, TOKENS, GQAS = (1, 8, 32, 128), (4096, 16384, 65536, 131072), (4, 8)
KV_HEADS, HEAD_DIM, PAGE = 8, 128, 16
SCALE = HEAD_DIM**-0.5
# Requests and chunk of an extend: fewer new tokens per request in larger batches, and short chunks on long prefixes.
EXTENDS = ((1, 2048), (1, 64), (8, 2048), (8, 64), (32, 512), (128, 64))
STORE_TOKENS, DRY_STORE_TOKENS = (1, 32, 256, 0), (1, 3, 0)  # 0: all that the requests hold
PLANS, DRY_PLANS = ((1, 4096), (32, 16384), (256, 131072)), ((1, 40), (3, 5000))  # batch, tokens
SHRINKS = ((16, 8), (16, 4), (16, 2), (8, 4), (8, 2), (4, 2), (16, 16), (4, 4))


class Timer:
    """Times functions of a layer index by CUDA graph replay."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        n = 1 << 31
        source = torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        p50 = self(lambda _: target.copy_(source), 2)["p50_us"]
        self.copy_gbs = 2 * n / p50 / 1e3
        self.cache_bytes = 4 * torch.cuda.get_device_properties(0).L2_cache_size

    def layers_for(self, layer_bytes: int) -> int:
        """Layers to rotate through, so that none is still in the L2 when its turn comes again."""
        return max(2, -(-self.cache_bytes // max(1, layer_bytes)))

    def host(self, run: Callable[[], Any]) -> float:
        """Median µs that a call keeps the host busy; the device is idle before each."""
        times = []
        for _ in range(5 + self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        return round(statistics.median(times[5:]), 1)

    def __call__(self, run: Callable[[int], Any], layers: int) -> dict[str, float]:
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

    def rated(self, run: Callable[[int], Any], layers: int, moved: int) -> dict[str, float]:
        """Its times, and what they are in bytes per second if a call must move so many."""
        row = self(run, layers)
        gbs = moved / row["p50_us"] / 1e3
        return {**row, "bytes": moved, "gbs": round(gbs, 1), "share_of_copy": round(gbs / self.copy_gbs, 3)}


def keep_good_rows(results: Results) -> None:
    """Of an earlier run those that did not fail, if the code is the same."""
    results.keep(lambda row: "failed" not in row and row["commit"] == results.commit)


@dataclass
class Bench:
    """Checks and times one cell after the other."""

    results: Results
    timer: Timer | None  # None in the interpreter, where nothing is timed
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.timer else "cpu")

    def row(self, key: Key, body: Callable[[], Row]) -> None:
        """Add what `body` gives; a failed check, a missing baseline or too little memory become the row."""
        if self.results.has(key):
            return
        try:
            values = body()
        except torch.OutOfMemoryError as error:
            values = {"does_not_fit": str(error).split(". GPU")[0]}
            torch.cuda.empty_cache()
        except Exception as error:  # a missing or failing baseline, or a kernel that does not compile: say so, go on
            values = {"failed": f"{type(error).__name__}: {error}"[:300]}
        self.results.add(key, **values)
        print(json.dumps({**key, **values}), flush=True)

    # ------------------------------------------------------------ decode, extend

    def attention(self, part: str, cell: dict[str, int]) -> None:
        """Decode or extend at one batch and length: every mix, and the baselines on the all-16 pool.

        All or none are taken from an earlier run, since ratios are of one run.
        """
        mixes = {name: {"part": part, "mix": name, **cell} for name in kc.MIXES}
        names = kc.BASELINES if self.timer else ("sglang_triton",)
        rivals = {name: {"part": part, "baseline": name, **cell} for name in names}
        keys = [*mixes.values(), *rivals.values()]
        if all(map(self.results.has, keys)):
            return
        self.results.keep(lambda row: row["key"] not in keys)
        shape = PageShape(PAGE, cell["kv_heads"], HEAD_DIM, HEAD_DIM)
        batch, tokens, chunk = cell["batch"], cell["tokens"], cell.get("chunk", 1)
        q = torch.randn(batch * chunk, cell["kv_heads"] * cell["gqa"], HEAD_DIM, device=self.device).to(self.dtype)
        times, kept = dict[str, float](), list[Any]()

        def ours(name: str) -> Row:
            mix = kc.MIXES[name]
            need = kc.layer_bytes_of(shape, batch, tokens, mix)
            layers = self.timer.layers_for(need) if self.timer else 1
            if self.timer:
                torch.cuda.empty_cache()
                if need * layers * 1.05 > torch.cuda.mem_get_info()[0]:
                    return {"does_not_fit": f"needs {need * layers / 1e9:.1f} GB"}
            case = kc.make_case(shape, batch, tokens, mix, layers, self.dtype, self.device)
            out, row = self.attention_row(part, case, q, chunk)
            kept.extend((case, out) if name == "all-16" else ())
            return row | {f"times_{rival}": round(t / row["p50_us"], 2) for rival, t in times.items()}

        def theirs(rival: str) -> Row:
            if not kept:
                return {"missing": "there is no pool of 16-bit pages, see its row"}
            case, out = kept
            layers = case.storage.num_layers
            if self.timer:
                run = kc.BASELINES[rival](part, case, q, SCALE, chunk)
                error = kc.check(rival, run(layers - 1), out, 2 * kc.TOLERANCE[self.dtype])
                row = {"error": error, **self.timer.rated(run, layers, case.layer_bytes + 2 * q.nbytes)}
                times[rival] = row["p50_us"]
                return row
            # In fp16: SGLang's kernels do not know that the interpreter computes bf16 on raw bits.
            case = kc.make_case(shape, batch, tokens, kc.MIXES["all-16"], layers, torch.float16, self.device)
            out = kc.BASELINES[rival](part, case, q.half(), SCALE, chunk)(0)
            return {"error": kc.check_fp32(part, case, q.half(), out, 0, SCALE, chunk)}

        for name, key in mixes.items():
            self.row(key, lambda name=name: ours(name))
            for rival in rivals if name == "all-16" else ():
                self.row(rivals[rival], lambda rival=rival: theirs(rival))
            kept.clear()

    def attention_row(self, part: str, case: kc.Case, q: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Row]:
        """Output of the last layer and the row of one case; ``chunk`` queries per request."""
        layers, moved = case.storage.num_layers, case.layer_bytes + 2 * q.nbytes
        decode, extend = TritonKernels().decode(), TritonKernels().extend()
        wrapper = decode if part == "decode" else extend
        if part == "decode":
            decode.plan(case.storage, case.req_pages, case.kv_lens)
        else:
            extend.plan(case.storage, case.req_pages, case.kv_lens - chunk, case.kv_lens)
        out = wrapper.run(q, layers - 1, SCALE)
        row: Row = {"error": kc.check_fp32(part, case, q, out, layers - 1, SCALE, chunk)}
        if self.timer:
            row |= self.timer.rated(lambda layer: wrapper.run(q, layer, SCALE), layers, moved)
            if part == "extend":
                pairs = q.shape[0] * (int(case.kv_lens[0]) - chunk / 2)
                row["tflops"] = round(4 * pairs * q.shape[1] * HEAD_DIM / row["p50_us"] / 1e6, 1)
        return out, row

    # ------------------------------------------------------------ shrink, store, plan: against torch, byte for byte

    def twins(self, mix: kc.Mix) -> tuple[kc.Case, kc.Case]:
        """The same pool twice, 2 requests of many pages."""
        heads, pages, layers = (KV_HEADS, 4096, 4) if self.timer else (1, 4, 1)
        shape = PageShape(PAGE, heads, HEAD_DIM, HEAD_DIM)
        a, b = (kc.make_case(shape, 2, pages * PAGE, mix, layers, self.dtype, self.device) for _ in range(2))
        return a, b

    def shrink(self, src: int, dst: int) -> Row:
        a, b = self.twins(kc.Mix((2, 2), tuple(float(t == src) for t in (16, 8, 4, 2))))
        # The first request's pages shrink into the second one's blocks, in random order.
        units = [(a.storage.table[0][row.long()].long() >> 2).cpu().numpy() for row in a.req_pages]
        page = a.req_pages[0].cpu().numpy()
        command = copies(0, page, units[0], units[1], src, dst)  # a source block's first unit fits any lower tier
        TorchKernels().copy(a.storage, command)
        TritonKernels().copy(b.storage, command)
        kc.check_same_bytes(f"shrink {src}→{dst}", a, b)
        row: Row = {"pages": int(page.size), "layers": a.storage.num_layers}
        if self.timer:
            launch, shape = copy_launch(b.storage, command), a.storage.shape
            moved = shape.code_bytes(src) + shape.code_bytes(dst) + (shape.meta_bytes if src == 16 else 0)
            row |= self.timer.rated(lambda _: launch.run(), 1, 2 * moved * row["layers"] * row["pages"])
        return row

    def store(self, tokens: int) -> Row:
        """So many tokens, of as many pages as can be."""
        a, b = self.twins(kc.MIXES["all-16"])
        slots = (a.req_pages.flatten().long()[:, None] * PAGE + torch.arange(PAGE, device=self.device)).flatten()
        slots = slots[:: max(1, slots.numel() // tokens)][:tokens].contiguous() if tokens else slots
        k, v = torch.randn(2, slots.numel(), a.storage.shape.num_kv_heads, HEAD_DIM, device=self.device).to(self.dtype)
        TorchKernels().store(a.storage, 0, slots, k, v)
        TritonKernels().store(b.storage, 0, slots, k, v)
        kc.check_same_bytes("store", a, b)
        row: Row = {"stored": slots.numel()}
        if self.timer:
            launches = [store_launch(b.storage, layer, slots, k, v) for layer in range(a.storage.num_layers)]
            row |= self.timer.rated(lambda layer: launches[layer].run(), len(launches), 4 * k.nbytes)
        return row

    def plan(self, source: str, mix: str, batch: int, tokens: int) -> Row:
        small = PageShape(PAGE, 1, 64, 64)  # the plan does not read KV
        case = kc.make_case(small, batch, tokens, kc.MIXES[mix], 1, self.dtype, self.device)
        pages = kc.request_table(case) if source == "slots" else PageSource(case.req_pages)
        wrapper = TritonKernels().decode()
        wrapper.plan_source(case.storage, pages, case.kv_lens)
        device_plan = wrapper.device_plan
        assert device_plan is not None and device_plan.buffers is not None
        buffers, n = device_plan.buffers, case.req_pages.shape[1]
        for units, arena in ((buffers.k_units, 0), (buffers.v_units, -1)):
            entries = case.storage.table[arena][case.req_pages.long()]
            order = torch.sort(entries & 3, dim=1, stable=True).indices
            if not torch.equal(units[:batch, :n], (entries.gather(1, order) >> 2).int()):
                raise kc.CheckFailed("plan: lists differ from a stable sort by step")
        if not self.timer:
            return {}

        def run(_: int) -> None:
            for launch in plan_launches(buffers, pages, case.kv_lens):
                launch.run()

        host = self.timer.host(lambda: wrapper.plan_source(case.storage, pages, case.kv_lens))
        return {**self.timer.rated(run, 1, kc.plan_bytes(case)), "host_us": host}

    def part(self, name: str) -> None:
        """All rows of a part."""
        if name in ("decode", "extend"):
            for cell in attention_cells(name, dry=not self.timer):
                self.attention(name, cell)
        elif name == "shrink":
            for src, dst in SHRINKS:
                self.row({"part": name, "from": src, "to": dst}, lambda src=src, dst=dst: self.shrink(src, dst))
        elif name == "store":
            for tokens in STORE_TOKENS if self.timer else DRY_STORE_TOKENS:
                self.row({"part": name, "tokens": tokens or "all"}, lambda tokens=tokens: self.store(tokens))
        else:
            for batch, tokens in PLANS if self.timer else DRY_PLANS:
                for source, mix in (("slots", "mix"), ("slots", "k4v2"), ("dense", "mix")):
                    key = {"source": source, "mix": mix, "batch": batch, "tokens": tokens}
                    self.row({"part": name, **key}, lambda key=key: self.plan(**key))


def attention_cells(part: str, dry: bool) -> list[dict[str, int]]:
    """Batch, length, query heads per KV head and, of an extend, chunk."""
    if dry:
        cells = [(2, 100, 4, 1, 1)] if part == "decode" else [(2, 100, 4, 1, 5), (1, 100, 4, 1, 17)]
    else:
        batches = [(b, 1) for b in BATCHES] if part == "decode" else EXTENDS
        cells = [(b, t, g, KV_HEADS, c) for g in GQAS for t in TOKENS for b, c in batches if t > c]
    names = ("batch", "tokens", "gqa", "kv_heads", "chunk")[: 4 if part == "decode" else 5]
    return [dict(zip(names, cell, strict=False)) for cell in cells]


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Make the table, or go on with it; the exit status."""
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU on this machine: nothing was timed (--dry-run checks on the CPU)", file=sys.stderr)
        return 2
    gpu = "interpreter" if options.dry_run else torch.cuda.get_device_name()
    timer = None if options.dry_run else Timer(options.repeats)
    default = ROOT / "benchmarks" / "results" / f"kernels_{gpu.lower().replace(' ', '_')}.json"
    out = options.out or (default if timer else None)
    config = {"device": gpu, "dtype": options.dtype, "head_dim": HEAD_DIM, "page_size": PAGE, "machine": facts()}
    results = Results(out, "kernels", config, argv)
    results.head["copy_gbs"] = round(timer.copy_gbs, 1) if timer else None
    print(json.dumps({"command": results.command, **results.head}), flush=True)
    keep_good_rows(results)
    bench = Bench(results, timer, getattr(torch, options.dtype))
    for part in (options.only,) if options.only else PARTS:
        bench.part(part)
    if options.dry_run:
        print("dry run: no times; of the baselines FlashInfer needs a GPU and was not run")
    failed = [json.dumps(row) for row in results.rows if "failed" in row]
    print("".join(f"FAILED {row}\n" for row in failed), end="", file=sys.stderr)
    return 1 if failed else 0
