"""Throughput and latency of real servers under SGLang's own client, all methods in the same KV bytes.

    pmkvq bench serve --pool-bytes 8MiB --concurrency 1,4,16 --out benchmarks/results/serve.json

Profiles: ``random``, random ids, lengths uniform between half and all of ``--random``; ``shared-prefix``, SGLang's
generated-shared-prefix, four questions to each system prompt; ``long-cot``, short input, long output of fixed length.
EOS is ignored everywhere. The first of ``--methods`` is the baseline. What is measured how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

from benchmarks.harness import experiment
from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.methods import PAGE, Method, bytes_per_token, label, methods, model_facts
from benchmarks.harness.results import Key, Result, Results, Row, table, unmeasured
from benchmarks.harness.servers import Server, ServerFailed, greedy, pool_state, scheduler_pid
from benchmarks.harness.stats import mean
from sglang_pmkvq.serving.config import parse_size

# What the three lengths, or two, of a profile are.
PROFILES = {"random": "input,output", "shared-prefix": "system,question,output", "long-cot": "input,output"}
# Questions to each system prompt of ``shared-prefix``.
QUESTIONS = 4


@dataclass(frozen=True)
class Profile:
    """What the client sends.

    Attributes:
        name: one of ``PROFILES``.
        system: tokens of the shared prefix, 0 where nothing is shared.
        prompt, output: tokens of a request beyond it; the longest, where they vary.
    """

    name: str
    system: int
    prompt: int
    output: int

    def requests(self, wanted: int) -> int:
        """Requests of a run in which ``wanted`` are asked for: whole groups where a prefix is shared."""
        return -(-wanted // QUESTIONS) * QUESTIONS if self.system else wanted

    def tokens(self, concurrency: int) -> int:
        """Tokens in whole pages that ``concurrency`` requests of full length hold, a shared prefix once per group."""
        own = math.ceil((self.prompt + self.output) / PAGE) * PAGE
        return concurrency * own + -(-concurrency // QUESTIONS) * self.system

    def client_args(self, requests: int) -> list[str]:
        if self.system:
            return [
                *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(requests // QUESTIONS)),
                *("--gsp-prompts-per-group", str(QUESTIONS), "--gsp-system-prompt-len", str(self.system)),
                *("--gsp-question-len", str(self.prompt), "--gsp-output-len", str(self.output)),
            ]
        return [
            *("--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", str(requests)),
            *("--random-input-len", str(self.prompt), "--random-output-len", str(self.output)),
            *("--random-range-ratio", str(self._ratio)),
        ]

    @property
    def _ratio(self) -> float:
        """The shortest length, as a share of the longest."""
        return 0.5 if self.name == "random" else 1.0

    def output_lengths(self, requests: int, seed: int) -> list[int]:
        """Tokens that each answer must have: the client's draw, drawn again."""
        from sglang.benchmark.datasets.common import compute_random_lens

        if self.name != "random":
            return [self.output] * requests
        np.random.seed(seed)  # noqa: NPY002 - the generator that the client draws from
        compute_random_lens(self.prompt, self._ratio, requests)
        return compute_random_lens(self.output, self._ratio, requests)


def profiles(options: argparse.Namespace) -> list[Profile]:
    """The profiles asked for.

    Raises:
        ValueError: one is unknown, or its lengths are not so many positive numbers.
    """
    out = []
    for name in options.profiles.split(","):
        if name not in PROFILES:
            expected = ",".join(PROFILES)
            raise ValueError(f"--profiles {options.profiles}: {name!r} is unknown; expected some of {expected}")
        text = getattr(options, name.replace("-", "_"))
        lengths = experiment.number_list(f"--{name}", text)
        if len(lengths) != len(PROFILES[name].split(",")):
            raise ValueError(f"--{name} {text}: expected {PROFILES[name]} tokens")
        out.append(Profile(name, *[0] * (3 - len(lengths)), *lengths))
    return out


# -- tokenizer and client ------------------------------------------------------------------------------------


def word_tokenizer(folder: Path, vocabulary: int) -> Path:
    """Write a tokenizer whose words are the ids in hexadecimal, none of them special, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.reasoner.tokenizer import save

    core = Tokenizer(models.WordLevel({f"{i:x}": i for i in range(vocabulary)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False), folder)
    return folder


def run_client(
    url: str, tokenizer: Path, home: Path, profile: Profile, concurrency: int, requests: int, seed: int
) -> dict[str, Any]:
    """One run of SGLang's client, with its own command line in this process; returns what it writes to its file.

    Args:
        home: where the client keeps the prompts of ``shared-prefix``. It draws them from the vocabulary in the order of
            a hash table, which no seed fixes: all methods get the same ones only because they are kept. It keeps them
            by their lengths, whatever the tokenizer, so a user's home directory will not do.

    Raises:
        RuntimeError: it gave up; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        argv = [
            "sglang.benchmark.serving",
            *("--backend", "sglang", "--base-url", url, "--model", str(tokenizer), "--tokenizer", str(tokenizer)),
            *("--max-concurrency", str(concurrency), "--seed", str(seed), "--warmup-requests", "0"),
            *("--disable-tqdm", "--output-details", "--output-file", str(out)),
            *profile.client_args(requests),
        ]
        said = io.StringIO()
        try:
            with (
                mock.patch.object(sys, "argv", argv),
                mock.patch.dict(os.environ, HOME=str(home)),
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
            ):
                # SGLang warns of much that a client does not need.
                from sglang.benchmark import serving as client

                client.cli_main()
            return json.loads(out.read_text())
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"the client gave up: {error!r}\n{said.getvalue()[-2000:]}") from error


def client_figures(out: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Figures of a run of the client, once it is certain that it was whole.

    Args:
        out: what the client wrote.
        lengths: tokens that each answer must have, in the order of the requests.

    Raises:
        RuntimeError: a request failed, or an answer has another length.
    """
    failed = [error for error in out["errors"] if error]
    if failed or out["completed"] != len(lengths):
        raise RuntimeError(f"{out['completed']} of {len(lengths)} requests completed: {failed[:1]}")
    wrong = [(want, got) for want, got in zip(lengths, out["output_lens"], strict=True) if want != got]
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers have another length: (wanted, got) {wrong[:4]}")
    # Without a visible token the client keeps the length that it asked for, and a refusal within a stream is a success.
    unseen = sum(ttft <= 0 for ttft in out["ttfts"])
    if unseen:
        raise RuntimeError(
            f"{unseen} answers had no visible token: the server refused them (its log says why), or --tokenizer does "
            "not show every id of the model"
        )
    return {
        "requests": len(lengths),
        "output_tokens": sum(lengths),
        "duration_s": round(out["duration"], 3),
        "output_tok_s": round(out["output_throughput"], 2),
        **{
            f"{time}_{short}_ms": round(out[f"{quantile}_{time}_ms"], 3)
            for time in ("ttft", "tpot", "itl")
            for short, quantile in (("p50", "median"), ("p99", "p99"))
        },
    }


# -- one run on one server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def watch(server: Server, seen: list[dict[str, Any]]) -> Iterator[None]:
    """Put ``/server_info`` into ``seen`` every second; stock is asked too, so that both pay for it."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(1.0):
            seen.append(server.info()["internal_states"][0])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def stock_read_bytes(out: dict[str, Any], running: float | None, token_bytes: int) -> float | None:
    """Bytes that attention reads in a mean decode step of stock: ``running`` requests with the mean context of a token.

    The step that makes token i of an answer reads the prompt and i tokens more, whether they are shared or not.

    Args:
        out: what the client wrote.
        running: mean requests in a decode batch.
    """
    made = [
        (prompt, answer) for prompt, answer in zip(out["input_lens"], out["output_lens"], strict=True) if answer > 1
    ]
    steps = sum(answer - 1 for _, answer in made)
    if running is None or not steps:
        return None
    read = sum(prompt * (answer - 1) + answer * (answer - 1) // 2 for prompt, answer in made)
    return round(running * read / steps * token_bytes, 2)


def compare_answers(figures: dict[str, Any], texts: Sequence[str], base: Sequence[str], exact: bool) -> None:
    """Note how many answers are the baseline's, where no page shrank.

    Args:
        exact: the first one must be.

    Raises:
        RuntimeError: it is not.
    """
    if figures["shrinks"]:
        return
    if exact and texts[0] != base[0]:
        raise RuntimeError("nothing shrank, yet the first answer is not the baseline's; no time is worth keeping")
    figures["answers_equal"] = sum(a == b for a, b in zip(texts, base, strict=True))


# -- all runs ------------------------------------------------------------------------------------------------


def groups(names: Sequence[str], done: Sequence[Sequence[str]], at_once: int) -> list[list[str]]:
    """Which methods are up together: always the baseline (the first), and each other method once.

    Args:
        done: groups that a result file holds already; they stay as they are.
    """
    first, *rest = names
    kept = [list(group) for group in done if group[0] == first and set(group) <= set(names)]
    left = [name for name in rest if not any(name in group for group in kept)]
    size = max(1, at_once - 1)
    new = [[first, *left[i : i + size]] for i in range(0, len(left), size)]
    return kept + new or [[first]]


class Bench:
    """All runs that the options ask for.

    Args:
        options: of the command line.
        cuda: servers run on a GPU.

    Raises:
        ValueError: an option is wrong.
    """

    def __init__(self, options: argparse.Namespace, results: Results, cuda: bool) -> None:
        self.options, self.results, self.cuda = options, results, cuda
        self.methods = {method.name: method for method in methods(options.methods)}
        self.concurrency = experiment.number_list("--concurrency", options.concurrency)
        self.cells = {(profile.name, c): profile for profile in profiles(options) for c in self.concurrency}
        self.budget = parse_size(options.budget_bytes)
        self.folder = tempfile.TemporaryDirectory()
        # See ``run_client``; one for the whole run.
        self.home = Path(self.folder.name)

    @cached_property
    def tokenizer(self) -> Path:
        vocabulary = model_facts(self.options.model)["vocab_size"]
        return self.options.tokenizer or word_tokenizer(self.home / "words", vocabulary)

    def jobs(self) -> Iterator[Job]:
        """One per group of servers."""
        lost = {row["key"]["method"] for row in self.results.rows if "missing" in row}
        done = dict.fromkeys(tuple(row["key"]["methods"]) for row in self.results.rows if "missing" not in row)
        # On a GPU each of two takes its share by --server-args.
        at_once = self.options.at_once or (2 if self.cuda else len(self.methods))
        for group in groups([name for name in self.methods if name not in lost], list(done), at_once):
            keys = [
                {"profile": profile, "concurrency": c, "repeat": repeat, "methods": group}
                for repeat in range(self.options.repeats)
                for profile, c in self.cells
            ]
            yield Job(keys, self.measure, ", ".join(group))

    def measure(self, keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
        """Values of rows of one group."""
        with contextlib.ExitStack() as stack:
            servers = self._start(stack, keys[0]["methods"])
            for key in keys:
                # A method that this machine cannot run has no part in the group's rows.
                key["methods"][:] = servers
                profile = self.cells[key["profile"], key["concurrency"]]
                yield self._turn(servers, key["repeat"], profile, key["concurrency"])

    def _start(self, stack: contextlib.ExitStack, group: Sequence[str]) -> dict[str, Server]:
        """The servers of a group; a method that this machine cannot run is noted as missing.

        Raises:
            RuntimeError: the baseline did not start.
        """
        servers: dict[str, Server] = {}
        for name in group:
            more = ("--tokenizer-path", str(self.tokenizer))
            running = max(self.concurrency)
            started = experiment.serve_method(self.options, self.methods[name], self.budget, running, *more)
            try:
                servers[name] = stack.enter_context(started)
            except ServerFailed as error:
                if name == group[0]:
                    raise RuntimeError(f"the baseline {name}: {error.reason}") from error
                self.results.add({"method": name}, missing=error.reason)
        return servers

    def _turn(self, servers: dict[str, Server], repeat: int, profile: Profile, concurrency: int) -> dict[str, Any]:
        """One repeat of one cell on every server in turn: the values of its row."""
        need, fits = profile.tokens(concurrency), self.budget // bytes_per_token(self.options.model)
        names = list(servers)
        got: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name in names if repeat % 2 == 0 else reversed(names):
            got[name] = self._measure(servers[name], self.methods[name], repeat, profile, concurrency)
        base = got[names[0]][1]
        for name in names[1:]:
            compare_answers(*got[name], base, exact=not self.cuda and concurrency == 1 and need <= fits)
        return {
            "needed_tokens": need,
            "stock_tokens": fits,
            "saturated": need > fits,
            "first": next(iter(got)),
            "of": {name: got[name][0] for name in names},
        }

    def _measure(
        self, server: Server, method: Method, repeat: int, profile: Profile, concurrency: int
    ) -> tuple[dict[str, Any], list[str]]:
        """Figures of one run on an empty cache, and the answers as text.

        Raises:
            RuntimeError: the run was not whole, or the server logged an error.
        """
        seed = self.options.seed + repeat
        requests = profile.requests(concurrency * self.options.rounds)
        # The first request after a pause, and the first of a server, is slow.
        server.generate(**greedy([1, 2, 3], 16, ignore_eos=True))
        server.flush()
        server.mark()
        before = server.pool() if method.quant else {}
        scheduler = psutil.Process(scheduler_pid(server))
        cpu = scheduler.cpu_times()
        seen: list[dict[str, Any]] = []
        with watch(server, seen):
            out = run_client(server.url, self.tokenizer, self.home, profile, concurrency, requests, seed)
        figures = client_figures(out, profile.output_lengths(requests, seed))
        used = scheduler.cpu_times()
        # Other work on the machine stretches every time but this one.
        figures["scheduler_cpu_s"] = round(used.user + used.system - cpu.user - cpu.system, 2)
        server.check_log(method.name)
        running = mean(server.decode_running())
        figures |= {
            "retractions": server.retracted(), "running_peak": server.peak_running(), "running_mean": running,
        }  # fmt: skip
        if method.quant:
            after = server.pool()
            pools = [pool_state(state) for state in seen]
            figures |= {
                "logical_tokens": after["logical_tokens"],
                "storage_bytes": after["storage_bytes"],
                "shrinks": sum(after["shrinks"].values()) - sum(before["shrinks"].values()),
                "shrink_s": round(after["shrink_seconds"] - before["shrink_seconds"], 4),
                "kv_read_bytes_per_step": mean([p["decode_read_bytes"] for p in pools if p["running_requests"]]),
            }
        else:
            token_bytes = method.stock_token_bytes(self.options.model)
            tokens = server.info()["max_total_num_tokens"]
            figures |= {
                "logical_tokens": tokens,
                "storage_bytes": tokens * token_bytes,
                "shrinks": 0,
                "shrink_s": 0.0,
                "kv_read_bytes_per_step": stock_read_bytes(out, running, token_bytes),
            }
        return figures, out["generated_texts"]


def plan(options: argparse.Namespace, results: Results) -> Iterator[Job]:
    return Bench(options, results, torch.cuda.is_available()).jobs()


# -- tables --------------------------------------------------------------------------------------------------


def summary(result: Result) -> list[dict[str, Any]]:
    """One entry per profile, concurrency and method: medians over repeats; ratios to the baseline within a repeat.

    ``tok_s_ratio`` and ``tpot_ratio`` are (median, lowest, highest), None for the baseline.
    """
    cells: dict[tuple[str, int, str], list[Row]] = {}
    for row in result["rows"]:
        for name in row.get("of", {}):
            cells.setdefault((row["key"]["profile"], row["key"]["concurrency"], name), []).append(row)
    out = []
    for (profile, concurrency, name), rows in cells.items():
        entry = {"profile": profile, "concurrency": concurrency, "method": name, "repeats": len(rows)}
        entry["saturated"] = rows[0]["saturated"]
        for figure in (key for key, value in rows[0]["of"][name].items() if isinstance(value, int | float)):
            values = [row["of"][name].get(figure) for row in rows]
            entry[figure] = statistics.median(value for value in values if value is not None)
        own = all(row["key"]["methods"][0] == name for row in rows)
        for short, figure in (("tok_s_ratio", "output_tok_s"), ("tpot_ratio", "tpot_p50_ms")):
            ratios = [row["of"][name][figure] / row["of"][row["key"]["methods"][0]][figure] for row in rows]
            entry[short] = None if own else (statistics.median(ratios), min(ratios), max(ratios))
        out.append(entry)
    return out


def rows_table(result: Result) -> str:
    """The result as two Markdown tables: throughput, then latency and what the pool did."""

    def shown(entry: dict[str, Any]) -> Row:
        def ratio(value: tuple[float, ...] | None) -> str:
            return "1" if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)

        return {
            **entry,
            "bytes": "too few" if entry["saturated"] else "enough",
            "tok_s_ratio": ratio(entry["tok_s_ratio"]),
            "tpot_ratio": ratio(entry["tpot_ratio"]),
            "stalled": entry["shrink_s"] / entry["duration_s"],
            "cpu_ms": 1e3 * entry["scheduler_cpu_s"] / entry["output_tokens"],
        }

    place = list(PROFILES).index
    entries = sorted(summary(result), key=lambda e: (place(e["profile"]), e["concurrency"]))
    rows = list(map(shown, entries))
    fast = table(
        rows,
        "profile | concurrent | stock's bytes | method | output tok/s | x baseline | TPOT ms | TPOT x baseline "
        "| running: mean, peak | retractions",
        "{profile} | {concurrency} | {bytes} | {method:m} | {output_tok_s:.0f} | {tok_s_ratio} | {tpot_p50_ms:.2f} "
        "| {tpot_ratio} | {running_mean:.1f}, {running_peak:.0f} | {retractions:.0f}",
    )
    more = table(
        rows,
        "profile | concurrent | method | TTFT ms p50, p99 | ITL ms p50, p99 | logical tokens | shrinks | stall s "
        "| of the run | KV read per step, MiB | CPU ms per token",
        "{profile} | {concurrency} | {method:m} | {ttft_p50_ms:.0f}, {ttft_p99_ms:.0f} "
        "| {itl_p50_ms:.1f}, {itl_p99_ms:.1f} | {logical_tokens:,.0f} | {shrinks:,.0f} | {shrink_s:.2f} "
        "| {stalled:.1%} | {kv_read_bytes_per_step:.2fM} | {cpu_ms:.2f}",
    )
    lost = [f"Missing: {label(row['key']['method'])}: {row['missing']}" for row in unmeasured(result)]
    return "\n\n".join([fast, more, *lost])


def arguments(parser: argparse.ArgumentParser) -> None:
    experiment.server_arguments(parser, chunk=256, pool="8MiB")
    parser.add_argument("--profiles", default=",".join(PROFILES), help="default %(default)s")
    parser.add_argument("--concurrency", default="1,4,16", help="requests at a time, default %(default)s")
    experiment.numbers(parser, rounds=(2, "requests per concurrent one"), repeats=(3, "times that all is measured"))
    parser.add_argument("--random", default="256,256", help="tokens in,out, the longest; default %(default)s")
    parser.add_argument("--shared-prefix", default="512,32,128", help="tokens system,question,out; default %(default)s")
    parser.add_argument("--long-cot", default="32,1024", help="tokens in,out; default %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: one word for each id of the model)")
    told = "servers that are up together (default: all, on a GPU 2)"
    parser.add_argument("--at-once", type=experiment.positive, help=told)


OUT = "benchmarks/results/serve.json"
FREE = ("at_once", "repeats")
EXPERIMENT = Experiment("serve", __doc__, plan, rows_table, arguments, "stock,age-2,age-4", OUT, FREE)
main = EXPERIMENT.main
