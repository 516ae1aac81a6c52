"""Accuracy of published ways to quantize a KV cache, on the bundled model in plain PyTorch, without a server.

    pmkvq bench offline --methods 16bit,static-4,static-2,kivi-4,kivi-2,kivi-2@bytes --share 0.22,0.35
    pmkvq bench offline --codings --model models/qwen2.5-coder-0.5b    real models, one forward: `codings.py`

Methods: ``16bit``; ``static-FINAL``, as our server under ``--pmkvq-policy static --pmkvq-protect hard``;
``kivi-BITS``; ``kivi-BITS@bytes``, a row per number of bytes; ``rounded-BITS``, everything at one width as soon as it
is written, at 16 not even rounded to bf16. docs/benchmarks.md says what each is, and how bytes are counted.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.forced import SINK, WINDOW
from benchmarks.harness import methods
from benchmarks.harness.experiment import Experiment, Job, budgets, budgets_arguments, numbers, problem_arguments
from benchmarks.harness.methods import PAGE
from benchmarks.harness.results import Result, Results, Row, mib, table
from benchmarks.harness.servers import Unmeasurable
from benchmarks.harness.stats import percent, wilson
from benchmarks.harness.tasks import line_range, problem_set, prompt_ids
from benchmarks.reasoner.evaluate import K, Quantizer, evaluate, load
from benchmarks.reasoner.model import Config
from sglang_pmkvq.formats import META_PAIR_BYTES, PageShape, groups_from_finals, page_bytes
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.serving.config import parse_final_bits
from sglang_pmkvq.serving.sizing import page_shape

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
class Rounded(Sixteen):
    """Everything at one width, rounded when written: one group of D channels per token and head."""

    width: int

    def enter(self, x: Tensor) -> Tensor:
        if self.width >= 16:
            return x
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.width - 1)).clamp_min(1e-12)
        return low + ((x - low) / scale).round() * scale

    def bytes(self, tokens: int) -> int:
        meta = 0 if self.width >= 16 else META_PAIR_BYTES * self.elements // self.config.head_dim
        return tokens * (self.elements * self.width // 8 + meta)


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
    if match := re.fullmatch(r"rounded-(16|8|4|2)", name):
        return Rounded(config, int(match[1])), False
    if match := re.fullmatch(r"kivi-([248])(@bytes)?", name):
        return Kivi(config, int(match[1])), bool(match[2])
    raise ValueError(
        f"unknown method {name!r}: expected 16bit, static- and then final bits, kivi-2, kivi-4, kivi-8, "
        f"kivi-2@bytes and so on, or rounded-16, -8, -4 or -2"
    )


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


def grown(quantizer: Kivi, spans: Spans, limit: int) -> Kivi:
    """``quantizer`` with the longest residual, in steps of a group, with which ``spans`` fit ``limit`` bytes.

    Raises:
        Unmeasurable: not even the shortest one does.
    """
    longest = max(prompt + output for prompt, output in spans)
    for residual in range(-(-longest // KIVI_GROUP) * KIVI_GROUP, 0, -KIVI_GROUP):
        found = replace(quantizer, residual=residual)
        if (least := together(found, spans)) <= limit:
            return found
    raise Unmeasurable(f"needs {least} bytes with its shortest residual of {KIVI_GROUP} tokens, may have {limit}")


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


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    """A row per method, for ``@bytes`` per method and budget."""
    torch.set_num_threads(options.threads)
    problems = problem_set(options.problems, *line_range(options.lines), options.first)
    model = load(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # (prompt, gold chain) tokens of the problems that run first.
    first = problems[: options.concurrency]
    ends = [(len(ids), p.chain_tokens) for ids, p in zip(prompt_ids(options.model, first)[0], first, strict=True)]
    held = methods.held_bytes(options.model, map(sum, ends))
    sizes = budgets(options, held) if options.share or options.budget_bytes else []

    def measure(name: str, quantizer: Sixteen, budget: int | None) -> dict[str, Any]:
        if budget is not None:
            assert isinstance(quantizer, Kivi)
            quantizer = grown(quantizer, ends, budget)
        start = time.perf_counter()
        records = evaluate(model, tokenizer, problems, quantizer, name)
        wall = time.perf_counter() - start
        spans = [(r["prompt_tokens"], r["tokens"]) for r in records]
        right = [bool(r["right"]) for r in records]
        gold = [p.chain_tokens for p in problems]
        return {
            "problems": len(records),
            "chain_tokens": [min(gold), max(gold)],
            "right": sum(right),
            "wrong": [i for i, ok in enumerate(right) if not ok],
            "chains_right": sum(bool(r["chain_right"]) for r in records),
            "output_tokens": sum(output for _, output in spans),
            "residual_tokens": quantizer.residual if isinstance(quantizer, Kivi) else None,
            "end_bytes": together(quantizer, ends),
            **memory(quantizer, spans, options.concurrency),
            "wall_s": round(wall, 1),
        }

    def jobs() -> Iterator[Job]:
        for name in methods.names(options.methods):
            quantizer, grows = parse_method(name, model.config)
            if grows and not sizes:
                raise ValueError(f"{name} needs --share or --pool-bytes")
            for budget in sizes if grows else [None]:
                key = {"method": name, "budget_bytes": budget, "lines": options.lines, "problems": options.problems}
                yield Job.row(key, partial(measure, name, quantizer, budget), name)

    return list(jobs())


def rows_table(result: Result) -> str:
    """Rows as Markdown."""

    def shown(row: Row) -> Row:
        budget = row["key"]["budget_bytes"]
        name = row["key"]["method"] + (f" = {mib(budget)} MiB" if budget else "")
        if "missing" in row:
            return {**row, "name": name}
        share = row["right"] / row["problems"]
        return {**row, "name": name, "share": share, "interval": percent(wilson(row["right"], row["problems"]))}

    return table(
        map(shown, result["rows"]),
        "method | program lines | tokens of the chain | residual | right | 95 % | whole chains | tokens | peak MiB "
        "| mean MiB | eff. bits, mean | at the peak | first problems at their ends, MiB",
        "{name} | {lines} | {chain_tokens[0]:,} to {chain_tokens[1]:,} | {residual_tokens} "
        "| {right}/{problems} = {share:.1%} | {interval} | {chains_right}/{problems} | {output_tokens:,} "
        "| {used_bytes_peak:M} | {used_bytes_avg:M} | {effective_bits_avg:.2f} | {effective_bits_at_peak:.2f} "
        "| {end_bytes:M}",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    problem_arguments(parser, 200)
    numbers(parser, concurrency=(32, "problems at a time"), threads=(2, "of PyTorch"))
    budgets_arguments(parser)


FREE = ("share", "budget_bytes", "problems", "lines", "threads")
METHODS = "16bit,static-8,static-4,static-2,kivi-4,kivi-2,kivi-2@bytes"
EXPERIMENT = Experiment("offline", __doc__, plan, rows_table, arguments, METHODS, "results/offline.json", FREE)


def main(argv: Sequence[str] | None = None) -> int:
    """The experiment of this file, or with ``--codings`` that of ``codings.py``."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--codings" not in given:
        return EXPERIMENT.main(given)
    from benchmarks import codings

    given.remove("--codings")
    return codings.EXPERIMENT.main(given)
