"""Attention over codes on the CPU: what the centre of keys costs, against the same pages without one.

One decode step's attention over pages that are all at their final width, per layer, for the heads of three real models.
A layer reads as many blocks of rotary pairs as its centre has; all counts are measured in alternation on the same
pages, and each output is first compared with fp32 attention over what the reference reads. A model's ratio is modelled:
made of these times and the blocks that its layers have by default (``BLOCKS``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.results import Result, markdown, versions, write
from benchmarks.ledger import cpu
from sglang_pmkvq.formats import K, LayerGroup, PageShape, V
from sglang_pmkvq.kernels.reference import attention as reference
from sglang_pmkvq.kernels.reference.inputs import Inputs, make_inputs
from sglang_pmkvq.kernels.rotary import Center, RotaryTable, on_one_table
from sglang_pmkvq.kernels.torch_kernels import TorchKernels

RESULTS = Path(__file__).parent / "results" / "kernels_cpu.json"
PAGE = 16
FINALS = {"4": (4, 4), "k4v2": (4, 2), "2": (2, 2)}
# A plan's rows of the table are read once and kept for all layers of a group: so many runs per plan.
LAYERS = 14


@dataclass(frozen=True)
class Heads:
    """KV heads, query heads per KV head, and channels of a model."""

    kv_heads: int
    per_head: int
    head_dim: int


MODELS = {
    "Qwen2.5-Coder-1.5B": Heads(2, 6, 128),
    "Qwen2.5-Coder-0.5B": Heads(2, 7, 64),
    "SmolLM2-135M": Heads(3, 3, 64),
}
# Blocks of pairs that the layers of a model read by default: for keys that end at 4 bits, and at 2.
BLOCKS: dict[str, dict[int, list[int]]] = {
    "Qwen2.5-Coder-1.5B": {
        4: [7, 8, 3, 2, 1, 1, 1, 7, 0, 1, 1, 1, 0, 3, 0, 2, 0, 0, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2],
        2: [8, 8, 5, 5, 2, 2, 3, 7, 2, 2, 2, 2, 1, 5, 1, 3, 0, 1, 4, 4, 2, 1, 3, 3, 3, 2, 3, 3],
    },
    "Qwen2.5-Coder-0.5B": {
        4: [4, 4, 4, 3, 3, 1, 3, 1, 3, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 0, 1],
        2: [4, 4, 4, 4, 4, 3, 4, 2, 4, 1, 3, 1, 2, 2, 3, 2, 2, 2, 2, 3, 2, 2, 2, 2],
    },
    # Means, over 1,024 tokens of Newton's Opticks.
    "SmolLM2-135M": {
        4: [3, 3, 4, 4, 4, 3, 3, 3, 3, 4, 4, 4, 4, 4, 3, 3, 4, 3, 3, 4, 3, 3, 4, 2, 3, 3, 3, 4, 3, 4],
        2: [4, 4, 4, 4, 4, 4, 4, 3, 3, 4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 3, 3, 4, 3, 3, 4, 4, 4, 4, 4],
    },
}


def inputs_of(heads: Heads, final: str, requests: int, tokens: int) -> Inputs:
    """Pages of one layer, all at their final width; keys rotated, as by default."""
    group = LayerGroup((0,), *FINALS[final])
    shape = PageShape(PAGE, heads.kv_heads, heads.head_dim, heads.head_dim)
    return make_inputs(
        0, shape, group, [tokens] * requests, steps=group.final_step, query_heads=heads.kv_heads * heads.per_head,
        transform="hadamard", center="neox", stale=False, clip=FINALS[final][K] == 2,
        value_transform="hadamard" if FINALS[final][V] == 2 else "none",
    )  # fmt: skip


def with_blocks(inputs: Inputs, count: int, tokens: int) -> Inputs:
    """The same codes, read with a centre in the last ``count`` blocks of pairs."""
    d, center = inputs.storage.shape.head_dim, None
    if count:
        angle = torch.arange(tokens + 1)[:, None] * 1e4 ** (-torch.arange(d // 2) / (d // 2))
        table = RotaryTable.of(angle.cos(), angle.sin(), d)
        vector = torch.randn(1, inputs.storage.shape.num_kv_heads, d, generator=torch.Generator().manual_seed(count))
        made = Center.of(vector, [table.blocks[-count:]], table)
        (center,) = on_one_table([made], "cpu", inputs.storage.dtype)
    coding = replace(inputs.storage.coding, center=center)
    return replace(inputs, storage=replace(inputs.storage, coding=coding))


def check(inputs: Inputs) -> None:
    """Raises:
    SystemExit: what attention reads of the first request is not what the reference reads.
    """
    decode = TorchKernels().decode()
    decode.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    scale, layer = inputs.storage.shape.head_dim**-0.5, 0
    got = decode.run(inputs.q, layer, scale)[0]
    pages, tokens = inputs.pages(0), inputs.kv_lens[0]
    keys, values = (reference.read_sequence(inputs.storage, side, layer, pages, tokens) for side in (K, V))
    want, _ = reference.attention(inputs.q[:1], keys, values, scale)
    if not torch.allclose(got, want[0], rtol=1e-3, atol=1e-3):
        raise SystemExit(f"attention is off by {float((got - want[0]).abs().max())}")


def measure(name: str, final: str, requests: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per layer by blocks of pairs, the least of ``repeats`` in alternation."""
    heads = MODELS[name]
    base = inputs_of(heads, final, requests, tokens)
    counts = range(heads.head_dim // 16 + 1)
    cases = {count: with_blocks(base, count, tokens) for count in counts}
    scale, decode = heads.head_dim**-0.5, TorchKernels().decode()
    times: dict[int, list[float]] = {count: [] for count in counts}
    for inputs in cases.values():
        check(inputs)
    for _ in range(repeats):
        for count, inputs in cases.items():
            decode.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
            start = time.perf_counter()
            for _ in range(LAYERS):
                decode.run(inputs.q, 0, scale)
            times[count].append((time.perf_counter() - start) / LAYERS)
    ms = [round(1e3 * min(times[count]), 4) for count in counts]
    blocks = BLOCKS[name][FINALS[final][K]]
    key = {"model": name, "final": final, "requests": requests, "tokens": tokens}
    return {"key": key, "ms": ms, "blocks": blocks, "ratio": ratio(ms, blocks)}


def ratio(ms: list[float], blocks: list[int]) -> float:
    """Throughput of attention with a model's centres over that without any."""
    return round(len(blocks) * ms[0] / sum(ms[count] for count in blocks), 4)


def rows_table(result: Result) -> str:
    """Rows as Markdown."""
    lines = [
        [
            row["key"]["model"],
            row["key"]["final"],
            f"{row['key']['requests']} × {row['key']['tokens']:,}",
            f"{row['ms'][0]:.2f}",
            f"{row['ms'][0] / row['ms'][-1]:.2f}",
            f"{sum(row['blocks']) / len(row['blocks']):.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["heads of", "final", "requests × tokens", "ms per layer, no centre", "all blocks: times as fast"]
    return markdown([*head, "blocks per layer, mean", "its layers: times as fast"], lines)


def run(out: Path | None, repeats: int) -> int:
    """Measure everything on one thread, and write ``out``."""
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        for final in FINALS:
            rows.append(measure(name, final, 8, 1536, repeats))
            print(rows[-1], flush=True)
    head = {"command": f"python -m benchmarks.kernels --cpu --repeats {repeats}"}
    write({**head, "versions": versions(), "cpu": cpu(), "rows": rows}, out or RESULTS)
    return 0
