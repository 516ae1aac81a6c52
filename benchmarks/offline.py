"""Accuracy of published ways to quantize a KV cache, on the bundled model in plain PyTorch, without a server.

    pmkvq bench offline --methods 16bit,static-4,static-2,kivi-4,kivi-2,kivi-2@bytes --share 0.22,0.35

Greedy decoding, weights in fp32, keys (after RoPE) and values rounded to bf16 when they are written. Prompts are read
at 16 bits and then quantized, as the authors of KIVI do. Methods:

* ``16bit``: nothing more is rounded.
* ``static-FINAL``: what our server does under ``--pmkvq-policy static --pmkvq-protect hard``: the first page of 16
  tokens and all pages that the last 128 tokens touch stay at 16 bits, every other page is at its layer's final width,
  codes, zeros and ranges exactly those of the pool. FINAL is what ``--pmkvq-final-bits`` takes; widths per layer
  (``static-0-2:8,3-5:k4v2``) are the KVTuner-like mix.
* ``kivi-BITS``: KIVI (Liu et al., ICML 2024, arXiv 2402.02750, algorithm 1 and the authors' code). Keys are quantized
  per channel over groups of 32 tokens, whenever the residual has 128 of them, values per token over groups of 32
  channels as soon as they are older than 128 tokens; scale and zero in fp16.
* ``kivi-BITS@bytes``: the same with the residual grown in steps of 32 tokens, from 32 on, as far as the bytes of
  ``--share`` or ``--pool-bytes`` allow: the KIVI that may use the memory that others use. One row for each number of
  bytes.

Bytes count everything: codes, scales and zeros; pages whole, KIVI's tokens one by one. They are those of decode steps
of ``--concurrency`` problems that run at a time, each followed by the next; the forward over a prompt is not counted.
``--share`` is of the 16-bit bytes of the first of them at the ends of their chains, as for the servers in
``pmkvq bench accuracy``.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import methods
from benchmarks.forced import SINK, WINDOW
from benchmarks.methods import PAGE
from benchmarks.reasoner.evaluate import K, Quantizer, evaluate, load, prompt_tokens
from benchmarks.reasoner.model import Config
from benchmarks.reasoner.task import Problem
from benchmarks.result import Results, wilson
from benchmarks.tasks import line_range
from sglang_pmkvq.formats import META_PAIR_BYTES, PageShape, groups_from_finals, page_bytes
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.serving.config import parse_final_bits
from sglang_pmkvq.serving.sizing import page_shape

DEFAULT = "16bit,static-8,static-4,static-2,kivi-4,kivi-2,kivi-2@bytes"
KIVI_GROUP = 32
KIVI_RESIDUAL = 128


@dataclass(frozen=True)
class Sixteen(Quantizer):
    """Keys and values in bf16."""

    config: Config

    def enter(self, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @property
    def elements(self) -> int:
        """Elements of one token's keys and values."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    def bytes(self, tokens: int) -> int:
        """Bytes of a sequence in a forward that reads ``tokens`` tokens of it."""
        return 2 * tokens * self.elements


@dataclass(frozen=True)
class Static(Sixteen):
    """Our pool under policy ``static`` with hard protection; ``finals``: (K, V) bits per layer."""

    finals: tuple[tuple[int, int], ...]
    sink = SINK

    def old(self, tokens: int) -> tuple[int, int]:
        end = max(0, tokens - WINDOW) // PAGE * PAGE
        return end, end

    def low(self, layer: int, side: int, x: Tensor) -> Tensor:
        return fake_quantize(x, self.finals[layer][side], self._shape.group_size)

    @property
    def _shape(self) -> PageShape:
        return page_shape(PAGE, self.config.num_key_value_heads, self.config.head_dim, None)

    def bytes(self, tokens: int) -> int:
        low = max(0, self.old(tokens)[K] - SINK) // PAGE
        high = -(-tokens // PAGE) - low
        return sum(
            low * page_bytes(self._shape, group, group.final_step) + high * page_bytes(self._shape, group, 0)
            for group in groups_from_finals(list(self.finals))
        )


@dataclass(frozen=True)
class Kivi(Sixteen):
    """KIVI with a residual of ``residual`` tokens, a multiple of the group of 32."""

    bits: int
    residual: int = KIVI_RESIDUAL

    def old(self, tokens: int) -> tuple[int, int]:
        # Both sides are quantized at the end of a forward, so the coming one's own token has no part in it.
        stored = tokens - 1
        return stored - stored % self.residual, max(0, stored - self.residual)

    def low(self, layer: int, side: int, x: Tensor) -> Tensor:
        if side == K:
            return round_groups(x.unflatten(-2, (-1, KIVI_GROUP)), self.bits, -2).flatten(-3, -2)
        return round_groups(x.unflatten(-1, (-1, KIVI_GROUP)), self.bits, -1).flatten(-2)

    def bytes(self, tokens: int) -> int:
        low = sum(self.old(tokens))
        # Per side; a group has one scale and one zero for KIVI_GROUP elements.
        side = self.elements // 2
        return side * low * self.bits // 8 + side * low // KIVI_GROUP * META_PAIR_BYTES + 2 * side * (2 * tokens - low)


def round_groups(x: Tensor, bits: int, dim: int) -> Tensor:
    """``x`` after asymmetric rounding over the groups along ``dim``: x ≈ code · scale + zero (KIVI, eq. 1).

    zero = minimum and scale = (maximum − minimum) / (2^bits − 1), both stored in fp16; a constant group is its zero.
    """
    zero = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - zero) / (2**bits - 1)).half().float()
    codes = ((x - zero) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * scale + zero


@dataclass(frozen=True)
class Plan:
    """One row: its key, the quantizer, and whether its residual grows to the key's bytes."""

    key: dict[str, Any]
    quantizer: Sixteen
    grows: bool = False


def parse_method(name: str, config: Config) -> tuple[Sixteen, bool]:
    """The quantizer of that name, and whether it is to grow to given bytes.

    Raises:
        ValueError: there is none.
    """
    if name == "16bit":
        return Sixteen(config), False
    if name.startswith("static-"):
        finals = parse_final_bits(name.removeprefix("static-"), config.num_hidden_layers)
        return Static(config, tuple(finals)), False
    match = re.fullmatch(r"kivi-([248])(@bytes)?", name)
    if match:
        return Kivi(config, int(match[1])), bool(match[2])
    raise ValueError(
        f"unknown method {name!r}: expected 16bit, static- and then final bits, kivi-2, kivi-4, kivi-8, or "
        f"kivi-2@bytes and so on"
    )


def plan(names: Sequence[str], config: Config, sizes: Sequence[int], problems: int) -> list[Plan]:
    """All rows, each ``@bytes`` method once per size.

    Raises:
        ValueError: a method is unknown, or has no bytes to grow to.
    """
    out = []
    for name in names:
        quantizer, grows = parse_method(name, config)
        if grows and not sizes:
            raise ValueError(f"{name} needs --share or --pool-bytes")
        for size in sizes if grows else [None]:
            out.append(Plan({"method": name, "pool_bytes": size, "problems": problems}, quantizer, grows))
    return out


Spans = Sequence[tuple[int, int]]


def table_of(quantizer: Sixteen, tokens: int) -> np.ndarray:
    """int64 [tokens + 1], bytes of a sequence by the tokens that a forward reads."""
    return np.array([0, *(quantizer.bytes(n) for n in range(1, tokens + 1))], np.int64)


def together(quantizer: Sixteen, spans: Spans) -> int:
    """Most bytes of sequences (prompt tokens, output tokens) that start together, each kept when it has ended."""
    size = table_of(quantizer, max(prompt + output for prompt, output in spans))
    total = np.zeros(max(output for _, output in spans), np.int64)
    for prompt, output in spans:
        lengths = prompt + np.minimum(np.arange(len(total)) + 1, output)
        total += size[lengths]
    return int(total.max())


def grown(quantizer: Kivi, spans: Spans, limit: int) -> Kivi | None:
    """``quantizer`` with the longest residual, in steps of a group, with which ``spans`` fit; None: no one does."""
    longest = max(prompt + output for prompt, output in spans)
    for residual in range(-(-longest // KIVI_GROUP) * KIVI_GROUP, 0, -KIVI_GROUP):
        found = replace(quantizer, residual=residual)
        if together(found, spans) <= limit:
            return found
    return None


def memory(quantizer: Sixteen, spans: Spans, concurrency: int) -> dict[str, float]:
    """Bytes and bits over the decode steps of sequences that follow one another, ``concurrency`` at a time."""
    size = table_of(quantizer, max(prompt + output for prompt, output in spans))
    free = [0] * concurrency
    starts = []
    for _, output in spans:
        starts.append(heapq.heappop(free))
        heapq.heappush(free, starts[-1] + output - 1)
    held = np.zeros(max(free), np.int64)
    tokens = np.zeros(max(free), np.int64)
    for start, (prompt, output) in zip(starts, spans, strict=True):
        # The last output token is not fed.
        lengths = prompt + 1 + np.arange(output - 1)
        held[start : start + output - 1] += size[lengths]
        tokens[start : start + output - 1] += lengths
    peak = int(held.argmax())
    return {
        "used_bytes_peak": int(held[peak]),
        "used_bytes_avg": float(held.mean()),
        "effective_bits_avg": float(8 * held.sum() / (tokens.sum() * quantizer.elements)),
        "effective_bits_at_peak": float(8 * held[peak] / (tokens[peak] * quantizer.elements)),
    }


class TooFewBytes(ValueError):
    """A method cannot be had in the bytes that it may have."""


@dataclass
class Run:
    """The model, its problems, and what is asked of them."""

    options: argparse.Namespace
    model: Any
    tokenizer: Any
    problems: list[Problem]

    @property
    def ends(self) -> Spans:
        """(prompt, gold chain) tokens of the problems that run first."""
        first = self.problems[: self.options.concurrency]
        return [(len(prompt_tokens(self.tokenizer, p)), p.chain_tokens) for p in first]

    def measure(self, row: Plan) -> dict[str, Any]:
        """Answer all problems with the row's quantizer, and count.

        Raises:
            TooFewBytes: the row's bytes do not hold the shortest residual.
        """
        o, quantizer = self.options, row.quantizer
        if row.grows:
            assert isinstance(quantizer, Kivi)
            found = grown(quantizer, self.ends, row.key["pool_bytes"])
            if found is None:
                least = together(replace(quantizer, residual=KIVI_GROUP), self.ends)
                raise TooFewBytes(
                    f"needs {least} bytes with its shortest residual of {KIVI_GROUP} tokens, may have "
                    f"{row.key['pool_bytes']}"
                )
            quantizer = found
        start = time.perf_counter()
        label = row.key["method"]
        records = evaluate(self.model, self.tokenizer, self.problems, quantizer, o.batch, label=label)
        wall = time.perf_counter() - start
        spans = [(r["prompt_tokens"], r["tokens"]) for r in records]
        right = [bool(r["right"]) for r in records]
        return {
            "problems": len(records),
            "right": sum(right),
            "accuracy": sum(right) / len(right),
            "confidence95": wilson(sum(right), len(right)),
            "wrong": [i for i, ok in enumerate(right) if not ok],
            "chains_right": sum(bool(r["chain_right"]) for r in records),
            "output_tokens": sum(output for _, output in spans),
            "residual_tokens": quantizer.residual if isinstance(quantizer, Kivi) else None,
            "end_bytes": together(quantizer, self.ends),
            **memory(quantizer, spans, o.concurrency),
            "wall_s": round(wall, 1),
        }


def table(result: dict[str, Any]) -> str:
    """Rows as Markdown."""
    names = ["method", "residual", "right", "95 %", "whole chains", "tokens"]
    names += ["peak MiB", "mean MiB", "eff. bits, mean", "at the peak", "first problems at their ends, MiB"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in result["rows"]:
        name, pool = row["key"]["method"], row["key"]["pool_bytes"]
        name = name if pool is None else f"{name} = {pool / 2**20:.1f} MiB"
        if "missing" in row:
            lines.append(f"| {name} | missing: {row['missing']} " + "| " * (len(names) - 2) + "|")
            continue
        low, high = row["confidence95"]
        n = row["problems"]
        cells = [
            name,
            "-" if row["residual_tokens"] is None else str(row["residual_tokens"]),
            f"{row['right']}/{n} = {100 * row['accuracy']:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{row['chains_right']}/{n}",
            f"{row['output_tokens']:,}",
            f"{row['used_bytes_peak'] / 2**20:.1f}",
            f"{row['used_bytes_avg'] / 2**20:.1f}",
            f"{row['effective_bits_avg']:.2f}",
            f"{row['effective_bits_at_peak']:.2f}",
            f"{row['end_bytes'] / 2**20:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmkvq bench offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods.arguments(parser, DEFAULT, "results/offline.json", servers=False)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="index of the first problem")
    parser.add_argument("--lines", default="64-128", help="program lines")
    parser.add_argument("--concurrency", type=int, default=32, help="problems at a time, default %(default)s")
    methods.size_arguments(parser)
    parser.add_argument("--batch", type=int, default=64, help="sequences decoded at once, default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def prepare(options: argparse.Namespace) -> tuple[Run, list[Plan]]:
    """What the command asks for.

    Raises:
        ValueError: options that are not possible. OSError: there is no such model.
    """
    for name in ("problems", "concurrency", "batch", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 1 or more")
    from transformers import AutoTokenizer

    from benchmarks.reasoner.task import eval_problem

    low, high = line_range(options.lines)
    problems = [eval_problem(options.first + i, low, high) for i in range(options.problems)]
    model = load(options.model)
    run = Run(options, model, AutoTokenizer.from_pretrained(options.model), problems)
    held = methods.held_bytes(options.model, map(sum, run.ends))
    sizes = methods.pool_sizes(options, held) if options.share or options.pool_bytes else []
    return run, plan(methods.names(options.methods), run.model.config, sizes, len(problems))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        run, rows = prepare(options)
        torch.set_num_threads(options.threads)
        drop = ("share", "pool_bytes", "problems", "threads")
        results = Results(options.out, "offline", methods.config(options, drop=drop), argv)
    except (OSError, ValueError) as error:
        print(f"pmkvq bench offline: {error}", file=sys.stderr)
        return 2
    for row in tqdm(rows, unit="row"):
        if results.has(row.key):
            continue
        try:
            results.add(row.key, **run.measure(row))
        except TooFewBytes as error:
            results.missing(row.key, str(error))
    results.order(row.key for row in rows)
    print(table({"rows": results.rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
