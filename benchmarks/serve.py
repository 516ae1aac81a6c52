"""Throughput and latency of real servers under SGLang's own client, all methods in the same KV bytes.

    pmkvq bench serve --pool-bytes 8MiB --concurrency 1,4,16 --out benchmarks/results/serve.json

The client is ``sglang.benchmark.serving``, called with its own command line. Profiles:

* ``random``: random ids, lengths uniform between half and all of ``--random``;
* ``shared-prefix``: SGLang's generated-shared-prefix, four questions to each system prompt;
* ``long-cot``: short input, long output of fixed length (``--long-cot``).

EOS is ignored everywhere. The servers of all methods are up at the same time (or, where memory does not allow that,
each further method beside the baseline) and are measured in turn; the order alternates from repeat to repeat. The
first of ``--methods`` is the baseline. A ratio is made within one repeat; the table shows its median, lowest and
highest. *Saturated* means that the requests of that concurrency, at their full length, do not fit in the tokens that
stock has in ``--pool-bytes``.

No time is kept unless every request came back whole, the servers logged no error, and, alone on an unsaturated CPU
server where nothing shrank, the first answer is the baseline's token for token.

Random ids need no language, so server and client get a tokenizer of one word per id: every token is visible in the
stream, none is special, and lengths are exact. ``--tokenizer`` names another one.
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
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.methods import (
    PAGE,
    Method,
    arguments,
    bytes_per_token,
    config,
    extra_args,
    label,
    methods,
    model_facts,
)
from benchmarks.result import Results
from benchmarks.serving import Server, ServerFailed, scheduler_pid, serve
from sglang_pmkvq.serving.config import parse_size

PROFILES = ("random", "shared-prefix", "long-cot")
# Shortest of the lengths of ``random``, as a share of the longest.
RANDOM_RATIO = 0.5
# Questions to each system prompt of ``shared-prefix``.
QUESTIONS = 4
# Seconds between two looks at a pool.
SAMPLE_S = 1.0
# Of a server's three processes on the CPU, beside weights and pool.
SERVER_BYTES = 2 << 30


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
        return RANDOM_RATIO if self.name == "random" else 1.0

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
            raise ValueError(
                f"--profiles {options.profiles}: {name!r} is unknown; expected some of {','.join(PROFILES)}"
            )
        flag = name.replace("-", "_")
        lengths = positive(f"--{name}", getattr(options, flag))
        parts = 3 if name == "shared-prefix" else 2
        if len(lengths) != parts:
            what = "system,question,output" if parts == 3 else "input,output"
            raise ValueError(f"--{name} {getattr(options, flag)}: expected {what} tokens")
        out.append(Profile(name, *lengths) if parts == 3 else Profile(name, 0, *lengths))
    return out


def positive(flag: str, text: str) -> list[int]:
    """Numbers of a comma-separated list, each once.

    Raises:
        ValueError: one is not a positive whole number.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{flag} {text}: expected positive whole numbers such as 1,4,16")
    return numbers


# -- tokenizer and client ------------------------------------------------------------------------------------


def word_tokenizer(folder: Path, vocabulary: int) -> Path:
    """Write a tokenizer whose words are the ids in hexadecimal, none of them special, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"{i:x}": i for i in range(vocabulary)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
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
        said, own = io.StringIO(), (sys.argv, os.environ.get("HOME"))
        sys.argv, os.environ["HOME"] = argv, str(home)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                # SGLang warns of much that a client does not need.
                from sglang.benchmark import serving as client

                client.cli_main()
            return json.loads(out.read_text())
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"the client gave up: {error!r}\n{said.getvalue()[-2000:]}") from error
        finally:
            sys.argv = own[0]
            if own[1] is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = own[1]


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
        "ttft_p50_ms": round(out["median_ttft_ms"], 2),
        "ttft_p99_ms": round(out["p99_ttft_ms"], 2),
        "tpot_p50_ms": round(out["median_tpot_ms"], 3),
        "tpot_p99_ms": round(out["p99_tpot_ms"], 3),
        "itl_p50_ms": round(out["median_itl_ms"], 3),
        "itl_p99_ms": round(out["p99_itl_ms"], 3),
    }


# -- one run on one server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def watch(server: Server, seen: list[dict[str, Any]]) -> Iterator[None]:
    """Put ``/server_info`` into ``seen`` every ``SAMPLE_S`` seconds; stock is asked too, so that both pay for it."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(SAMPLE_S):
            seen.append(server.info()["internal_states"][0])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 2) if values else None


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


def servers_at_once(model: Path, cuda: bool) -> int:
    """Servers for which the machine has memory: two on a GPU, where each takes its share by ``--server-args``."""
    if cuda:
        return 2
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return max(2, psutil.virtual_memory().available // (SERVER_BYTES + 2 * weights))


class Bench:
    """All runs that the options ask for; what the result file holds already is not run again.

    Args:
        options: of the command line, valid.
        tokenizer: its folder.
        home: see ``run_client``; one for the whole run.
        cuda: servers run on a GPU.
    """

    def __init__(self, options: argparse.Namespace, results: Results, tokenizer: Path, home: Path, cuda: bool) -> None:
        self.options = options
        self.results = results
        self.tokenizer = tokenizer
        self.home = home
        self.cuda = cuda
        self.methods = {method.name: method for method in methods(options.methods)}
        self.concurrency = positive("--concurrency", options.concurrency)
        self.cells = [(profile, c) for profile in profiles(options) for c in self.concurrency]
        self.pool_bytes = parse_size(options.pool_bytes)
        self.token_bytes = bytes_per_token(options.model)

    def run(self) -> None:
        rows = self.results.rows
        lost = {row["key"]["method"] for row in rows if "missing" in row}
        names = [name for name in self.methods if name not in lost]
        done = [list(g) for g in dict.fromkeys(tuple(row["key"]["methods"]) for row in rows if "missing" not in row)]
        at_once = self.options.at_once or servers_at_once(self.options.model, self.cuda)
        todo = [
            (group, [(repeat, *cell) for repeat in range(self.options.repeats) for cell in self.cells])
            for group in groups(names, done, at_once)
        ]
        with tqdm(total=sum(len(cells) for _, cells in todo), unit="run", disable=None) as bar:
            for group, cells in todo:
                left = [cell for cell in cells if not self.results.has(self._key(group, *cell))]
                bar.update(len(cells) - len(left))
                if not left:
                    continue
                with contextlib.ExitStack() as stack:
                    servers = self._start(stack, group)
                    for repeat, profile, c in left:
                        row = self._turn(servers, repeat, profile, c)
                        self.results.add(self._key(list(servers), repeat, profile, c), **row)
                        bar.update()

    @staticmethod
    def _key(group: Sequence[str], repeat: int, profile: Profile, concurrency: int) -> dict[str, Any]:
        return {"profile": profile.name, "concurrency": concurrency, "repeat": repeat, "methods": list(group)}

    def _start(self, stack: contextlib.ExitStack, group: Sequence[str]) -> dict[str, Server]:
        """The servers of a group; a method that this machine cannot run is noted as missing.

        Raises:
            ServerFailed: the baseline.
        """
        servers: dict[str, Server] = {}
        for name in group:
            method = self.methods[name]
            args = method.server_args(self.options.model, self.pool_bytes, max(self.concurrency), self.options.chunk)
            args += ["--tokenizer-path", str(self.tokenizer), *extra_args(self.options)]
            try:
                servers[name] = stack.enter_context(serve(self.options.model, args, quant=method.quant))
            except ServerFailed as error:
                if name == group[0]:
                    raise
                self.results.missing({"method": name}, error.reason)
        return servers

    def _turn(self, servers: dict[str, Server], repeat: int, profile: Profile, concurrency: int) -> dict[str, Any]:
        """One repeat of one cell on every server in turn: the values of its row."""
        need, fits = profile.tokens(concurrency), self.pool_bytes // self.token_bytes
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
        server.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 16, "ignore_eos": True})
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
        errors = server.errors(since_mark=True)
        if errors:
            raise RuntimeError(f"{method.name}: the server logged {errors[:3]}")
        running = server.decode_running()
        figures |= {
            "retractions": server.retracted(),
            "running_peak": server.peak_running(),
            "running_mean": mean(running),
        }
        if method.quant:
            after = server.pool()
            pools = [state["pmkvq"] for state in seen]
            figures |= {
                "logical_tokens": after["logical_tokens"],
                "storage_bytes": after["storage_bytes"],
                "shrinks": sum(after["shrinks"].values()) - sum(before["shrinks"].values()),
                "shrink_s": round(after["shrink_seconds"] - before["shrink_seconds"], 4),
                "kv_read_bytes_per_step": mean([p["decode_read_bytes"] for p in pools if p["running_requests"]]),
            }
        else:
            token_bytes = self.token_bytes // (2 if "fp8_e4m3" in method.args else 1)
            tokens = server.info()["max_total_num_tokens"]
            figures |= {
                "logical_tokens": tokens,
                "storage_bytes": tokens * token_bytes,
                "shrinks": 0,
                "shrink_s": 0.0,
                "kv_read_bytes_per_step": stock_read_bytes(out, figures["running_mean"], token_bytes),
            }
        return figures, out["generated_texts"]


# -- tables --------------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per profile, concurrency and method: medians over repeats; ratios to the baseline within a repeat.

    ``tok_s_ratio`` and ``tpot_ratio`` are (median, lowest, highest), None for the baseline.
    """
    cells: dict[tuple[str, int, str], list[tuple[dict[str, Any], dict[str, Any], bool]]] = {}
    for row in result["rows"]:
        for name, figures in row.get("of", {}).items():
            key = row["key"]
            base = row["of"][key["methods"][0]]
            cells.setdefault((key["profile"], key["concurrency"], name), []).append((figures, base, row["saturated"]))
    out = []
    for (profile, concurrency, name), runs in cells.items():
        entry: dict[str, Any] = {
            "profile": profile,
            "concurrency": concurrency,
            "method": name,
            "saturated": runs[0][2],
            "repeats": len(runs),
        }
        for figure in (key for key, value in runs[0][0].items() if isinstance(value, int | float)):
            values = [figures[figure] for figures, _, _ in runs if figures.get(figure) is not None]
            entry[figure] = statistics.median(values)
        own = all(figures is base for figures, base, _ in runs)
        for short, figure in (("tok_s_ratio", "output_tok_s"), ("tpot_ratio", "tpot_p50_ms")):
            ratios = [figures[figure] / base[figure] for figures, base, _ in runs]
            entry[short] = None if own else (statistics.median(ratios), min(ratios), max(ratios))
        out.append(entry)
    return out


def table(result: dict[str, Any]) -> str:
    """The result as two Markdown tables: throughput, then latency and what the pool did."""
    place = {name: i for i, name in enumerate(PROFILES)}
    rows = sorted(summary(result), key=lambda e: (place[e["profile"]], e["concurrency"]))

    def ratio(value: tuple[float, float, float] | None) -> str:
        return "1" if value is None else f"{value[0]:.2f} ({value[1]:.2f}-{value[2]:.2f})"

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    fast = [
        "| profile | concurrent | stock's bytes | method | output tok/s | x baseline | TPOT ms | x baseline "
        "| running: mean, peak | retractions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    more = [
        "| profile | concurrent | method | TTFT ms p50, p99 | ITL ms p50, p99 | logical tokens | shrinks | stall s "
        "| of the run | KV read per step, MiB "
        "| CPU ms per token |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in rows:
        cell = f"| {e['profile']} | {e['concurrency']} "
        fast.append(
            f"{cell}| {'too few' if e['saturated'] else 'enough'} | {label(e['method'])} | {e['output_tok_s']:.0f} "
            f"| {ratio(e['tok_s_ratio'])} | {e['tpot_p50_ms']:.2f} | {ratio(e['tpot_ratio'])} "
            f"| {number(e.get('running_mean'), '.1f')}, {e['running_peak']:.0f} | {e['retractions']:.0f} |"
        )
        read = e.get("kv_read_bytes_per_step")
        more.append(
            f"{cell}| {label(e['method'])} | {e['ttft_p50_ms']:.0f}, {e['ttft_p99_ms']:.0f} "
            f"| {e['itl_p50_ms']:.1f}, {e['itl_p99_ms']:.1f} | {e['logical_tokens']:,.0f} | {e['shrinks']:,.0f} "
            f"| {e['shrink_s']:.2f} | {100 * e['shrink_s'] / e['duration_s']:.1f} % "
            f"| {number(None if read is None else read / 2**20, '.2f')} "
            f"| {1e3 * e['scheduler_cpu_s'] / e['output_tokens']:.2f} |"
        )
    lost = [f"Missing: {label(row['key']['method'])}: {row['missing']}" for row in result["rows"] if "missing" in row]
    return "\n".join([*fast, "", *more, *(["", *lost] if lost else [])])


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, "stock,age-2,age-4", "benchmarks/results/serve.json")
    parser.add_argument("--pool-bytes", default="8MiB", help="KV bytes of every server, default %(default)s")
    parser.add_argument("--profiles", default=",".join(PROFILES), help="default %(default)s")
    parser.add_argument("--concurrency", default="1,4,16", help="requests at a time, default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="requests per concurrent one, default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    parser.add_argument("--random", default="256,256", help="tokens in,out, the longest; default %(default)s")
    parser.add_argument("--shared-prefix", default="512,32,128", help="tokens system,question,out; default %(default)s")
    parser.add_argument("--long-cot", default="32,1024", help="tokens in,out; default %(default)s")
    parser.add_argument("--chunk", type=int, default=256, help="--chunked-prefill-size of every server")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: one word for each id of the model)")
    parser.add_argument("--at-once", type=int, help="servers that are up together (default: as many as memory holds)")
    options = parser.parse_args(argv)
    try:
        profiles(options)
        methods(options.methods)
        positive("--concurrency", options.concurrency)
        parse_size(options.pool_bytes)
        for name in ("rounds", "repeats", "chunk", "at_once"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
        results = Results(options.out, "serve", config(options, drop=("at_once", "repeats")), argv)
    except ValueError as error:
        print(f"pmkvq bench serve: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer = options.tokenizer or word_tokenizer(home / "words", model_facts(options.model)["vocab_size"])
        Bench(options, results, tokenizer, home, torch.cuda.is_available()).run()
    print(table({**results.head, "rows": results.rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
