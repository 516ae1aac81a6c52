"""Ahead-of-time compilation of the Triton kernels for GPUs that are not there: what ptxas says about each.

Launches are built by the same code that runs them, on small CPU tensors, and compiled instead of run.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sglang_pmkvq.formats import LayerGroup, PageShape
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.device_attention import DevicePlan, run_launches
from sglang_pmkvq.kernels.device_pages import copy_launch, store_launch, table_launch
from sglang_pmkvq.kernels.device_plan import plan_launches
from sglang_pmkvq.kernels.launch import Launch, interpreted
from sglang_pmkvq.kernels.reference.inputs import copies
from sglang_pmkvq.kernels.rotary import Center, RotaryTable, on_one_table
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.transforms import key_transform

RESULTS = Path(__file__).parent / "results" / "kernels_aot.json"
ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FINALS = ((16, 16), (8, 8), (4, 4), (2, 2), (4, 2))
# Kernels that need one configuration only.
SMALL = ("merge", "store", "count", "scatter", "schedule", "ranges", "table")


@dataclass(frozen=True)
class Config:
    """One compilation: ``kernel`` is the name of a launch below."""

    kernel: str
    arch: int
    dtype: str = "bf16"
    head_dim: int = 128
    group_size: int = 128
    page_size: int = 16
    finals: tuple[int, int] = (4, 2)
    gqa: int = 4
    transform: str = "none"
    clip: bool = False
    logit_cap: bool = False
    center: int = 0  # blocks of rotary pairs
    values: str = "none"  # their transform

    @property
    def name(self) -> str:
        flags = f"-{self.transform}" * (self.transform != "none") + "-clip" * self.clip + "-cap" * self.logit_cap
        flags += f"-center{self.center}" * (self.center > 0) + f"-v{self.values}" * (self.values != "none")
        return (
            f"{self.kernel}-sm{self.arch}-{self.dtype}-d{self.head_dim}g{self.group_size}p{self.page_size}"
            f"-k{self.finals[0]}v{self.finals[1]}-gqa{self.gqa}{flags}"
        )


def configs() -> Iterator[Config]:
    """Every configuration of the table. ``sample()`` is the part that the normal test suite compiles."""
    for arch in ARCHITECTURES:
        for finals in FINALS:
            for d in (64, 128, 256):
                yield Config("decode", arch, head_dim=d, group_size=min(d, 128), finals=finals)
            yield Config("decode", arch, "fp16", finals=finals)
        for g in (32, 64):
            yield Config("decode", arch, group_size=g)
        yield Config("decode", arch, head_dim=256, group_size=32)
        for p in (32, 64):
            yield Config("decode", arch, page_size=p)
        for finals in ((16, 4), (8, 16), (2, 8)):
            yield Config("decode", arch, finals=finals)
        yield Config("decode", arch, gqa=16)
        yield Config("extend", arch, page_size=32, finals=(8, 8), gqa=5)
        yield Config("extend", arch, finals=(16, 4), gqa=1)
        for d in (64, 128, 256):
            yield Config("extend", arch, head_dim=d, group_size=min(d, 128))
            yield Config("copy", arch, head_dim=d, group_size=min(d, 128), finals=(2, 2))
            yield Config("copy", arch, head_dim=d, group_size=min(d, 128), finals=(2, 2), transform="hadamard")
        yield Config("extend", arch, "fp16")
        yield Config("extend", arch, finals=(16, 16))
        for kernel in ("decode", "extend"):
            yield Config(kernel, arch, transform="scale", logit_cap=True)
            yield Config(kernel, arch, finals=(2, 2), transform="scale", clip=True)
            yield Config(kernel, arch, finals=(2, 2), transform="hadamard", clip=True)
        yield Config("decode", arch, "fp16", finals=(2, 2), clip=True)
        yield Config("copy", arch, finals=(2, 2), transform="scale", clip=True)
        yield Config("copy", arch)
        yield Config("copy", arch, "fp16", finals=(8, 8))
        yield Config("copy", arch, group_size=32, transform="scale")
        yield from (Config(kernel, arch) for kernel in SMALL)
        for blocks in (1, 2):
            yield Config("decode", arch, transform="hadamard", center=blocks)
        yield Config("decode", arch, finals=(2, 2), transform="hadamard", clip=True, center=4, values="hadamard")
        yield Config("decode", arch, "fp16", center=4)
        yield Config("decode", arch, head_dim=256, center=2, values="hadamard")
        yield Config("extend", arch, transform="hadamard", center=2, values="hadamard")
        yield Config("copy", arch, "fp16", finals=(2, 4), center=1, values="hadamard")
        yield Config("copy", arch, finals=(2, 2), transform="hadamard", clip=True, center=4, values="hadamard")
        yield Config("count", arch, center=1)


def sample() -> Iterator[Config]:
    """Each kernel once per architecture, decode at head_dim 128 and 256, both dtypes; one extend of all tiers."""
    yield Config("extend", 90)
    for arch in ARCHITECTURES:
        yield Config("decode", arch)
        yield Config("decode", arch, "fp16", finals=(4, 4))
        yield Config("decode", arch, head_dim=256, finals=(8, 8))
        yield Config("extend", arch, finals=(16, 16))
        yield from (Config(kernel, arch) for kernel in SMALL)
        yield Config("copy", arch, finals=(2, 2))
        yield Config("copy", arch, finals=(2, 2), transform="scale", clip=True)
        yield Config("copy", arch, finals=(2, 2), transform="hadamard")
    yield Config("decode", 90, finals=(2, 2), transform="scale", clip=True)
    yield Config("decode", 90, finals=(2, 2), transform="hadamard", clip=True)
    yield Config("decode", 90, finals=(2, 2), transform="hadamard", clip=True, center=4, values="hadamard")
    yield Config("copy", 90, finals=(2, 2), transform="hadamard", clip=True, center=4, values="hadamard")
    yield Config("count", 90, center=1)


def launches(config: Config) -> dict[str, Launch]:
    """The launches of a configuration by name."""
    heads = 2
    shape = PageShape(config.page_size, heads, config.head_dim, config.group_size)
    group = LayerGroup((0, 1), *config.finals)
    scale = torch.ones(2, heads, config.head_dim) if config.transform == "scale" else None
    clip = torch.full((2, heads), 0.6) if config.clip else None
    superblocks = [4] * len(group.arena_sides)
    center = None
    if config.center:
        angle = torch.zeros(64, config.head_dim // 2)
        vector = torch.ones(2, heads, config.head_dim)
        made = Center.of(vector, [range(config.center)] * 2, RotaryTable.of(angle, angle, config.head_dim))
        (center,) = on_one_table([made], "cpu", DTYPES[config.dtype])
    keys = key_transform(config.transform, config.head_dim, scale)
    coding = Coding(keys, clip, key_transform(config.values, config.head_dim), center)
    storage = GroupStorage.allocate(shape, group, superblocks, 8, DTYPES[config.dtype], coding=coding)
    requests, pages, hq = 4, 512, heads * config.gqa
    plan = DevicePlan()
    plan.reserve(storage, requests, pages, hq, columns=True)
    assert plan.buffers is not None
    source = PageSource(torch.zeros(requests, pages * config.page_size, dtype=torch.int32),
                        torch.zeros(requests, dtype=torch.int64), config.page_size, config.page_size)  # fmt: skip
    q_len = np.array([1, 1, 160, 200])
    q_row = np.cumsum(q_len) - q_len
    plan.requests, plan.num_queries, plan.singles = requests, int(q_len.sum()), 2
    plan.chunks, plan.q_len, plan.q_row = (q_len, q_row), torch.from_numpy(q_len).int(), torch.from_numpy(q_row).int()
    plan.kv_lens = torch.full((requests,), 300, dtype=torch.int32)
    q = torch.zeros(plan.num_queries, hq, config.head_dim, dtype=storage.dtype)
    lse = torch.zeros(plan.num_queries, hq)
    attention = list(run_launches(plan, q, 0, 0.1, 30.0 if config.logit_cap else 0.0, torch.empty_like(q), lse))
    index = list(plan_launches(plan.buffers, source, plan.kv_lens.long(), None, pages))
    rows = torch.zeros(24, heads, config.head_dim, dtype=storage.dtype)
    page = np.arange(4)
    names = ["decode", "merge", "extend", "count", "scatter", "schedule", "ranges", "store", "table", "copy"]
    update = type("Update", (), {"page": page, "entry": page, "arena": 0})()
    others = [
        store_launch(storage, 0, torch.zeros(24, dtype=torch.int64), rows, rows),
        table_launch(storage, update),
        copy_launch(storage, copies(0, page, page, page, 2, 2)),
    ]
    return dict(zip(names, [*attention, *index, *others], strict=True))


@cache
def binder(kernel: Any, arch: int) -> Callable[..., tuple[Any, list[tuple[str, Any]], Any]]:
    """Triton's own function that says of arguments what a kernel is compiled anew for."""
    if not isinstance(kernel, JITFunction):  # the interpreter's stand-in, which specializes nothing
        kept = ("do_not_specialize", "do_not_specialize_on_alignment")
        kernel = JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in kept})
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32)))


def specialization(launch: Launch, arch: int = 90) -> tuple[tuple[str, Any], ...]:
    """(type, specialization) of every parameter: a kernel is compiled once for each of these tuples.

    The second is the value of a constexpr, "D" for a pointer aligned to 16 bytes or an integer that 16 divides, or
    empty; an integer of 1 is a constexpr too.
    """
    return tuple(binder(launch.kernel, arch)(**launch.args)[1])


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for an architecture, specialized as a run of the launch would be."""
    assert not interpreted(), "TRITON_INTERPRET is set: nothing would be compiled"
    target = GPUTarget("cuda", arch, 32)
    parse = make_backend(target).parse_attr
    names, kinds = launch.kernel.arg_names, specialization(launch, arch)
    signature = {name: kind for name, (kind, _) in zip(names, kinds, strict=True)}
    constants = {(i,): launch.args[names[i]] for i, (kind, _) in enumerate(kinds) if kind == "constexpr"}
    attributes = {(i,): parse(x) for i, (kind, x) in enumerate(kinds) if kind != "constexpr" and isinstance(x, str)}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def tool(name: str, *arguments: str) -> str:
    """Output of a CUDA binary tool that Triton ships."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
LAYOUT = re.compile(r"^#(\w+) = #ttg\.blocked<\{sizePerThread = \[(?:\d+, )*(\d+)\]", re.M)
CODE_LOAD = re.compile(r"(?:tt\.load|ttg\.async_copy_global_to_local) .*tensor<[\dx]+x!tt\.ptr<i8>, #(\w+)>")


def describe(compiled: Any) -> dict[str, int]:
    """Registers, shared memory, spilled bytes and instruction counts of a compiled kernel.

    ``loads16`` and ``async16`` are instructions that load 16 bytes per thread; ``code_loads`` are the loads of packed
    codes in the program (only they are bytes), ``code_loads16`` those that give a thread 16 bytes at once,
    ``code_bytes`` the fewest: Triton gives a thread as many neighbours as it can prove to be contiguous and aligned.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ops = Counter(INSTRUCTION.findall(sass))
    width = {name: int(last) for name, last in LAYOUT.findall(compiled.asm["ttgir"])}
    codes = [width[name] for name in CODE_LOAD.findall(compiled.asm["ttgir"])]

    def count(*names: str, wide: bool = False) -> int:
        return sum(n for op, n in ops.items() if op.split(".")[0] in names and (not wide or ".128" in op))

    return {
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "spills": count("LDL", "STL"),
        "shared": int(compiled.metadata.shared),
        "instructions": ops.total() - count("NOP"),
        "mma": count("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA"),
        "loads16": count("LDG", "LDGSTS", wide=True),
        "async16": count("LDGSTS", wide=True),
        "loads": count("LDG", "LDGSTS"),
        "code_loads": len(codes),
        "code_loads16": codes.count(16),
        "code_bytes": min(codes, default=0),
        "conversions": count("I2F", "I2FP"),
    }


def measure(config: Config) -> dict[str, int]:
    return describe(compile_launch(launches(config)[config.kernel], config.arch))


def remake(only: str = "", only_sample: bool = False) -> int:
    """Compile the configurations whose name contains `only` and write the table; of the others old rows are kept."""
    chosen = {c.name for c in (sample() if only_sample else configs()) if only in c.name}
    table = json.loads(RESULTS.read_text())["kernels"] if (only or only_sample) and RESULTS.exists() else {}
    for config in configs():
        if config.name in chosen:
            table[config.name] = measure(config)
            print(config.name, *(f"{k}={v}" for k, v in table[config.name].items()), flush=True)
    head = {"command": "python -m benchmarks.kernels --aot", "triton": triton.__version__}
    rows = {config.name: table[config.name] for config in configs() if config.name in table}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    RESULTS.write_text(f'{{{json.dumps(head)[1:-1]}, "kernels": {{\n{lines}\n}}}}\n')
    return 0
