"""Runs of the programs on a server: what they answered, what their requests shared, how the server holds it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import requests
from tqdm import tqdm

from benchmarks.methods import PAGE
from benchmarks.programs import problems
from benchmarks.programs.frontend import Endpoint, TokenizerTemplate, Usage, template_of
from benchmarks.programs.problems import Problem
from benchmarks.result import wilson

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Shared:
    """A prefix that several requests of one program read.

    Attributes:
        text: the prefix.
        readers: prompt tokens of each request that goes on from it.
    """

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
class Outcome:
    """One run of a program.

    Attributes:
        right: of each answer that it gives, whether it is.
        shared: the largest prefix that its requests shared.
        candidates: the same for each single chain behind an answer, where a program chooses between chains.
    """

    right: Sequence[bool]
    shared: Shared
    candidates: Sequence[bool] = ()


@dataclass(frozen=True)
class Program:
    """One of the programs.

    Attributes:
        run: solves a problem by it.
        arguments: adds its own options.
        follow_ups: how many further questions it asks in the same conversation.
    """

    name: str
    run: Callable[[Problem, Endpoint, argparse.Namespace], Outcome]
    arguments: Callable[[argparse.ArgumentParser], None]
    follow_ups: Callable[[argparse.Namespace], int] = lambda options: 0


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
    params = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"pmkvq_kv_bits": True}}
    response = requests.post(
        f"{url}/generate",
        json={"input_ids": list(prefix[: pages * PAGE + 1]), "sampling_params": params},
        timeout=TIMEOUT_S,
    )
    response.raise_for_status()
    meta = response.json()["meta_info"]
    cached = meta["cached_tokens"] // PAGE
    if cached < pages:
        return CachedPrefix(pages, cached)
    (bits,) = meta.get("pmkvq_kv_bits") or [{"lowest": 16, "mean": 16.0}]
    return CachedPrefix(pages, cached, bits["lowest"], (bits["mean"] * (pages + 1) - 16) / pages)


@dataclass(frozen=True)
class Run:
    """A program on one problem: what it came to, what it used, how its prefix is held at its end."""

    outcome: Outcome
    used: Usage
    prefix: CachedPrefix


@dataclass(frozen=True)
class Client:
    """A server and the tokenizer of its model."""

    url: str
    tokenizer: Any
    template: TokenizerTemplate = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", template_of(self.tokenizer))

    def run(self, program: Program, problem: Problem, options: argparse.Namespace) -> Run:
        endpoint = Endpoint(self.url, self.template)
        outcome = program.run(problem, endpoint, options)
        ids = self.tokenizer(outcome.shared.text)["input_ids"]
        return Run(outcome, endpoint.used, look_up(self.url, ids))

    def run_all(self, program: Program, asked: Sequence[Problem], options: argparse.Namespace) -> list[Run]:
        """All problems, ``options.concurrency`` at a time, answers in order."""
        pool = ThreadPoolExecutor(options.concurrency)
        try:
            runs = pool.map(lambda problem: self.run(program, problem, options), asked)
            return list(tqdm(runs, total=len(asked), desc=program.name))
        finally:  # after an error or Ctrl-C, what has not begun does not begin
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Figures:
    """What the runs of one program add up to; JSON values, units in the names.

    Attributes:
        right, answers: answers that are right, and all of them; ``confidence95`` is the Wilson interval of their ratio.
        chains_right, chains: the same of the single chains behind them; 0 where a program does not choose.
        prefix_tokens_apart, prefix_tokens_once: whole pages of the shared prefixes for each reader, and once.
        prefix_kept: share of the prefixes' pages that are still cached when their program ends.
        prefix_lowest_bits, prefix_mean_bits: payload bits of prefixes that are cached whole; None if none is.
        prompt_tokens, cached_tokens: of all requests.
    """

    right: int
    answers: int
    accuracy: float
    confidence95: tuple[float, float]
    chains_right: int
    chains: int
    prefix_tokens_apart: int
    prefix_tokens_once: int
    prefix_kept: float
    prefix_lowest_bits: int | None
    prefix_mean_bits: float | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    wall_s: float
    output_tok_s: float


def figures(runs: Sequence[Run], wall_s: float) -> Figures:
    answers = [right for run in runs for right in run.outcome.right]
    chains = [right for run in runs for right in run.outcome.candidates]
    used = sum((run.used for run in runs), Usage())
    prefixes = [run.prefix for run in runs]
    whole = [prefix for prefix in prefixes if prefix.mean_bits is not None]
    pages = sum(prefix.pages for prefix in whole)
    return Figures(
        right=sum(answers),
        answers=len(answers),
        accuracy=sum(answers) / len(answers),
        confidence95=wilson(sum(answers), len(answers)),
        chains_right=sum(chains),
        chains=len(chains),
        prefix_tokens_apart=PAGE * sum(run.outcome.shared.pages_apart for run in runs),
        prefix_tokens_once=PAGE * sum(run.outcome.shared.pages_once for run in runs),
        prefix_kept=round(sum(p.cached_pages for p in prefixes) / max(1, sum(p.pages for p in prefixes)), 4),
        prefix_lowest_bits=min((p.lowest_bits for p in whole if p.lowest_bits), default=None),
        prefix_mean_bits=round(sum(p.pages * (p.mean_bits or 0) for p in whole) / pages, 3) if pages else None,
        requests=used.requests,
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens,
        output_tokens=used.output_tokens,
        wall_s=round(wall_s, 2),
        output_tok_s=round(used.output_tokens / wall_s, 1),
    )


def alone(program: Program, description: str | None, argv: Sequence[str] | None = None) -> int:
    """``main`` of a program's own module: run it against a server that is there, print what came of it."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a running server, such as http://127.0.0.1:30000")
    parser.add_argument("--model", help="folder or name of its tokenizer (default: as the server was given it)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of options in multiple-choice files")
    problems.arguments(parser)
    program.arguments(parser)
    options = parser.parse_args(argv)
    try:
        asked = problems.load(options, program.follow_ups(options))
        response = requests.get(f"{options.url}/get_model_info", timeout=30)
        response.raise_for_status()
        client = Client(options.url, AutoTokenizer.from_pretrained(options.model or response.json()["model_path"]))
        start = time.perf_counter()
        runs = client.run_all(program, asked, options)
        wall = time.perf_counter() - start
    except (OSError, ValueError, RuntimeError) as error:  # those of requests are OSErrors
        print(f"{program.name}: {error}", file=sys.stderr)
        return 2
    for name, value in asdict(figures(runs, wall)).items():
        print(f"{name:<22}{value}")
    return 0
