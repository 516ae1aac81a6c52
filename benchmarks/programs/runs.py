"""Runs of the programs on a server: what they answered, what their requests shared, how the server holds it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import requests
from sglang.lang.ir import SglFunction

from benchmarks.harness.methods import PAGE
from benchmarks.harness.servers import TIMEOUT_S, greedy, together
from benchmarks.harness.stats import wilson
from benchmarks.programs.frontend import Endpoint, TokenizerTemplate, execute, template_of
from benchmarks.programs.problems import Problem


@dataclass(frozen=True)
class Program:
    """One of the programs; ``follow_ups``: how many further questions it asks in the same conversation."""

    name: str
    function: SglFunction
    follow_ups: Callable[[argparse.Namespace], int] = lambda options: 0


@dataclass(frozen=True)
class Shared:
    """A prefix that several requests read; ``readers``: prompt tokens of each request that goes on from it."""

    text: str
    readers: Sequence[int]

    @property
    def pages_once(self) -> int:
        """Whole pages of the longest reader: with sharing they exist once."""
        return max(self.readers) // PAGE

    @property
    def pages_apart(self) -> int:
        """Whole pages of all readers: what they would hold without sharing."""
        return sum(tokens // PAGE for tokens in self.readers)


@dataclass(frozen=True)
class CachedPrefix:
    """How the server holds a shared prefix now.

    Attributes:
        pages: whole pages of it. cached_pages: those that a request with this prefix found.
        lowest_bits, mean_bits: payload bits per element of the cached pages; None if one is missing.
    """

    pages: int
    cached_pages: int
    lowest_bits: int | None = None
    mean_bits: float | None = None


def look_up(url: str, prefix: Sequence[int]) -> CachedPrefix:
    """Ask for one token after ``prefix`` and see what of it was cached, and how wide.

    The request holds the prefix's whole pages and one token, so its last page is new, at 16 bits, and not of them.
    A server without our pool keeps 16 bits whatever it keeps.
    """
    pages = (len(prefix) - 1) // PAGE
    if not pages:
        return CachedPrefix(0, 0)
    body = greedy(prefix[: pages * PAGE + 1], 1, bits=True)
    response = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    cached = meta["cached_tokens"] // PAGE
    if cached < pages:
        return CachedPrefix(pages, cached)
    (bits,) = meta.get("pmkvq_kv_bits") or [{"lowest": 16, "mean": 16.0}]
    return CachedPrefix(pages, cached, bits["lowest"], (bits["mean"] * (pages + 1) - 16) / pages)


@dataclass(frozen=True)
class Run:
    """A program on one problem.

    Attributes:
        right: of each answer, whether it is; candidates: the same of each chain that the program chose from.
        shared: the largest prefix that its requests shared; prefix: how the server holds it at the end.
        used: its requests, and their prompt, cached and output tokens.
    """

    right: Sequence[bool]
    candidates: Sequence[bool]
    shared: Shared
    used: Counter[str]
    prefix: CachedPrefix


@dataclass
class Client:
    """A server and the tokenizer of its model."""

    url: str
    tokenizer: Any

    @cached_property
    def template(self) -> TokenizerTemplate:
        return template_of(self.tokenizer)

    def run(self, program: Program, problem: Problem, options: argparse.Namespace) -> Run:
        endpoint = Endpoint(self.url, self.template)
        given = {"problem": problem, "options": options, "temperature": options.temperature}
        state = execute(program.function, endpoint, **given)
        return Run(
            right=[asked.right(text) for asked, text in state["answers"]],
            candidates=[problem.right(text) for text in state["candidates"]],
            shared=Shared(state["prefix"], state["readers"]),
            used=endpoint.used,
            prefix=look_up(self.url, self.tokenizer(state["prefix"])["input_ids"]),
        )

    def run_all(self, program: Program, asked: Sequence[Problem], options: argparse.Namespace) -> list[Run]:
        """All problems, ``options.concurrency`` at a time, answers in order."""
        return together(lambda problem: self.run(program, problem, options), asked, options.concurrency)


def figures(runs: Sequence[Run], wall_s: float, token_bytes: int) -> dict[str, Any]:
    """What the runs of one program add up to.

    ``prefix_apart_bytes`` and ``prefix_once_bytes`` are whole pages of the shared prefixes for each reader, and once;
    ``prefix_kept`` is the share of the prefixes' pages that are still cached when their program ends, and the bits are
    payload bits of prefixes that are cached whole, None if none is.
    """
    answers = [right for run in runs for right in run.right]
    chains = [right for run in runs for right in run.candidates]
    used = sum((run.used for run in runs), Counter())
    prefixes = [run.prefix for run in runs]
    whole = [prefix for prefix in prefixes if prefix.mean_bits is not None]
    pages = sum(prefix.pages for prefix in whole)
    return {
        "right": sum(answers),
        "answers": len(answers),
        "confidence95": wilson(sum(answers), len(answers)),
        "chains_right": sum(chains),
        "chains": len(chains),
        "prefix_apart_bytes": token_bytes * PAGE * sum(run.shared.pages_apart for run in runs),
        "prefix_once_bytes": token_bytes * PAGE * sum(run.shared.pages_once for run in runs),
        "prefix_kept": round(sum(p.cached_pages for p in prefixes) / max(1, sum(p.pages for p in prefixes)), 4),
        "prefix_lowest_bits": min((p.lowest_bits for p in whole if p.lowest_bits), default=None),
        "prefix_mean_bits": round(sum(p.pages * (p.mean_bits or 0) for p in whole) / pages, 3) if pages else None,
        **{name: used[name] for name in ("requests", "prompt_tokens", "cached_tokens", "output_tokens")},
        "wall_s": round(wall_s, 2),
        "output_tok_s": round(used["output_tokens"] / wall_s, 1),
    }
