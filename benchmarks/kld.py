"""Divergence of a server's next-token distributions from those of a 16-bit server, on the same tokens, over length.

    pmkvq bench kld --methods 16bit,age-4,age-2,static-2 --share 0.22 --problems 24

A stock 16-bit server answers the prompts greedily (or a file gives the answers: ``--data``). The same server is then
made to write these tokens once more, through its decode path, and all log-probabilities are recorded; then each
method's server is. At every position this gives the Kullback-Leibler divergence KL(16 bits ‖ method) in nats and
whether both find the same token most likely. All servers keep ``--concurrency`` requests running and have no prefix
cache.

Row ``16bit`` is the control: the 16-bit server against itself, the requests in reverse order, so that batches differ
as they may between any two servers. What it shows is bf16 arithmetic, and no method can be told from 16 bits below it.

Position is the number of tokens that the prediction rests on, the prompt included. Divergences are over the reference's
``--top`` most likely tokens and one bucket for the rest, exact where the vocabulary is not larger. Records of the
16-bit server stay in ``--work`` (4 bytes for each token of the vocabulary and position), so that a run that was killed,
or one with further methods, goes on; remove the folder when no more rows are wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import logit_record, methods
from benchmarks.methods import Method, held_bytes, label, model_facts
from benchmarks.result import Results, write
from benchmarks.serving import Server, ServerFailed, generate_many, serve
from benchmarks.tasks import builtin

DEFAULT = "16bit,age-4,age-2,static-4,static-2"
SIXTEEN = Method.parse("16bit")


class Unequal(RuntimeError):
    """A server did not write the tokens that it was given."""


# -- arithmetic ----------------------------------------------------------------------------------------------


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) in nats of every step, float64 [steps], of two records over the same tokens.

    Σ p · (log p − log q) over the recorded tokens and, as one more, what all others have together.
    """

    def columns(record: np.ndarray) -> np.ndarray:
        return np.concatenate((record["logprobs"], record["rest"][:, None]), 1).astype(np.float64)

    p, q = columns(reference), columns(other)
    possible = p > -np.inf
    terms = np.zeros_like(p)
    terms[possible] = np.exp(p[possible]) * (p[possible] - q[possible])
    return terms.sum(1)


@dataclass(frozen=True)
class Compared:
    """All steps of one answer: context tokens int64, KL in nats float64, same best token bool, each [steps]."""

    context: np.ndarray
    kl: np.ndarray
    agree: np.ndarray


def compare(reference: np.ndarray, other: np.ndarray, prompt: int) -> Compared:
    """Two records of an answer to ``prompt`` tokens."""
    context = prompt + np.arange(len(reference))
    return Compared(context, divergence(reference, other), reference["best"] == other["best"])


def curve(answers: Sequence[Compared], width: int) -> list[dict[str, Any]]:
    """Mean, 99 % quantile and agreement of positions whose context lies in the same ``width`` tokens."""
    context, kl, agree = (np.concatenate([getattr(a, name) for a in answers]) for name in ("context", "kl", "agree"))
    out = []
    for number in np.unique(context // width):
        here = context // width == number
        out.append(
            {
                "context_from": int(number * width),
                "context_to": int((number + 1) * width),
                "positions": int(here.sum()),
                "kl_mean": float(kl[here].mean()),
                "kl_p99": float(np.quantile(kl[here], 0.99)),
                "top1_agreement": float(agree[here].mean()),
            }
        )
    return out


def summary(answers: Sequence[Compared], width: int) -> dict[str, Any]:
    """Figures over all positions, and the curve; the error is that of the mean over answers."""
    context, kl, agree = (np.concatenate([getattr(a, name) for a in answers]) for name in ("context", "kl", "agree"))
    means = np.array([a.kl.mean() for a in answers])
    return {
        "answers": len(answers),
        "positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_mean_standard_error": float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None,
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "kl_max_context": int(context[kl.argmax()]),
        "top1_agreement": float(agree.mean()),
        "curve": curve(answers, width),
    }


# -- tokens and records --------------------------------------------------------------------------------------


@dataclass
class Run:
    """Prompts, what is to be answered, and where records go.

    Attributes:
        prompts: token ids.
        tokens: forced tokens of each answer; empty until the file or the 16-bit server gave them.
        limit: output tokens of a greedy answer.
    """

    options: argparse.Namespace
    prompts: list[list[int]]
    tokens: list[list[int]]
    limit: int

    @property
    def work(self) -> Path:
        return self.options.work or self.options.out.with_name(self.options.out.name + ".work")

    @property
    def concurrency(self) -> int:
        return int(min(self.options.concurrency, len(self.prompts)))

    @property
    def top(self) -> int:
        return int(min(self.options.top, model_facts(self.options.model)["vocab_size"]))

    @property
    def digest(self) -> str:
        """SHA-256 of model, prompts and answers: rows are comparable if it is the same."""
        return hashlib.sha256(json.dumps([*self._asked(), self.tokens]).encode()).hexdigest()

    def _asked(self) -> list[Any]:
        model = methods.config(self.options)["model"]
        return [model, self.options.server_args, self.limit, self.prompts]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence at its end; while answers are unknown, at most."""
        answers = [len(t) for t in self.tokens] or [self.limit] * len(self.prompts)
        return [len(p) + n for p, n in zip(self.prompts, answers, strict=True)]

    def reference(self, index: int) -> Path:
        return self.work / f"{self.digest[:16]}-{self.top}" / f"{index:05d}.npy"

    @contextmanager
    def server(self, method: Method, pool: int) -> Iterator[Server]:
        """A server of this method without a prefix cache."""
        o = self.options
        args = method.server_args(o.model, pool, self.concurrency, o.chunk)
        args += ["--enable-custom-logit-processor", "--disable-radix-cache", "--random-seed", str(o.seed)]
        with serve(o.model, [*args, *methods.extra_args(o)], quant=method.quant) as server:
            yield server

    def sixteen_bytes(self) -> int:
        """Bytes in which nothing ever waits."""
        longest = max(self.lengths)
        return held_bytes(self.options.model, [longest + methods.PAGE] * self.concurrency)

    def recall(self) -> None:
        """Take the tokens that an earlier run left in the work folder, if there are any."""
        path = self.work / "tokens.json"
        if not self.tokens and path.is_file():
            found = json.loads(path.read_text())
            self.tokens = found["tokens"] if found["asked"] == self._asked() else []

    def choose(self, server: Server) -> None:
        """Let the 16-bit server choose the tokens greedily."""
        params = {"temperature": 0, "max_new_tokens": self.limit}
        bodies = [{"input_ids": p, "sampling_params": params} for p in self.prompts]
        self.tokens = [a["output_ids"] for a in generate_many(server, bodies, self.concurrency)]
        write({"asked": self._asked(), "tokens": self.tokens}, self.work / "tokens.json")

    def record(self, server: Server, paths: Callable[[int], Path], order: Sequence[int], *, first: bool) -> None:
        """Force the answers of ``order`` and record them; ``first``: this is the reference.

        Raises:
            Unequal: tokens differ from the given ones, or steps are missing.
        """
        exact = self.top == model_facts(self.options.model)["vocab_size"]
        bodies = []
        for i in order:
            paths(i).parent.mkdir(parents=True, exist_ok=True)
            logit_record.create(paths(i), len(self.tokens[i]), self.top, ids=first and not exact)
            reference = None if first or exact else self.reference(i)
            fields = logit_record.request(self.tokens[i], paths(i).resolve(), reference and reference.resolve())
            bodies.append({"input_ids": self.prompts[i], **fields})
        answers = generate_many(server, bodies, self.concurrency)
        wrong = [
            i
            for i, answer in zip(order, answers, strict=True)
            if answer["output_ids"] != self.tokens[i] or not logit_record.is_complete(paths(i), len(self.tokens[i]))
        ]
        if wrong:
            raise Unequal(f"{len(wrong)} of {len(order)} answers are not the forced tokens: {wrong[:10]}")

    def unrecorded(self) -> list[int]:
        """Answers that the reference lacks."""
        return [i for i, t in enumerate(self.tokens) if not logit_record.is_complete(self.reference(i), len(t))]

    def compare(self, server: Server, *, backwards: bool = False) -> dict[str, Any]:
        """Record a server and compare it with the reference; its own records do not stay."""
        folder = self.work / "method"
        order = range(len(self.prompts))
        server.mark()
        try:
            self.record(server, lambda i: folder / f"{i:05d}.npy", order[::-1] if backwards else order, first=False)
            compared = [
                compare(np.load(self.reference(i), mmap_mode="r"), np.load(folder / f"{i:05d}.npy"), len(prompt))
                for i, prompt in enumerate(self.prompts)
            ]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            **summary(compared, self.options.bin),
            "tokens_sha256": self.digest,
            "retractions": server.retracted(),
            "peak_running": server.peak_running(),
        }


def load(options: argparse.Namespace) -> Run:
    """Prompts of the command, and the answers of its file.

    Raises:
        ValueError: options that are not possible, or a file that holds no prompts. OSError: it cannot be read.
    """
    from transformers import AutoTokenizer

    for name in ("problems", "concurrency", "top", "bin", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    model_facts(options.model)  # a wrong path is said here, before anybody looks for it elsewhere
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def prompt(messages: list[dict[str, str]]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    if options.data is None:
        items = builtin(options.problems, options.lines, options.first)
        limit = max(item.max_tokens or 0 for item in items) + 64
        return Run(options, [prompt(item.messages) for item in items], [], limit)
    texts = pairs(options.data)[options.first :][: options.problems]
    if not texts:
        raise ValueError(f"--first {options.first}: {options.data} has no more lines")
    prompts = [prompt([{"role": "user", "content": asked}]) for asked, _ in texts]
    answered = [said for _, said in texts if said is not None]
    if answered and len(answered) < len(texts):
        raise ValueError(f"{options.data}: some lines have an answer and some have none; expected all or none")
    tokens = [tokenizer(said, add_special_tokens=False)["input_ids"][: options.max_new_tokens] for said in answered]
    if not all(tokens):
        raise ValueError(f"{options.data}: an answer is empty")
    return Run(options, prompts, tokens, options.max_new_tokens)


def pairs(path: Path) -> list[tuple[str, str | None]]:
    """(prompt, answer or None) of JSON lines.

    Raises:
        ValueError: a line is something else; names it. OSError: the file cannot be read.
    """
    out = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{n}: {error}") from error
        answer = record.get("answer") if isinstance(record, dict) else 0
        if not isinstance(answer, str | None) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{path}:{n}: expected an object with the texts "prompt" and, if given, "answer"')
        out.append((record["prompt"], answer))
    return out


# -- rows ----------------------------------------------------------------------------------------------------


def measure(run: Run, method: Method, pool: int) -> dict[str, Any]:
    """One method's server against the reference."""
    with run.server(method, pool) as server:
        found = run.compare(server)
        if method.quant:
            state = server.pool()
            found |= {name: state[name] for name in ("effective_bits_avg", "used_bytes_peak", "used_bytes_avg")}
        return found


def reference(run: Run, results: Results, control: dict[str, Any] | None) -> None:
    """Tokens and records of the 16-bit server as far as they are missing, and the row ``control`` if there is none.

    Raises:
        ValueError: the result file's rows are of other tokens.
    """
    run.recall()
    wanted = control is not None and not results.has(control)
    if not run.tokens or run.unrecorded() or wanted:
        with run.server(SIXTEEN, run.sixteen_bytes()) as server:
            if not run.tokens:
                run.choose(server)
            missing = run.unrecorded()
            if missing:
                run.record(server, run.reference, missing, first=True)
            if wanted:
                assert control is not None
                results.add(control, **run.compare(server, backwards=True))
    if any(row.get("tokens_sha256", run.digest) != run.digest for row in results.rows):
        raise ValueError(
            f"--out {run.options.out} holds rows of other tokens than those in {run.work}; remove one of the two"
        )


def table(result: dict[str, Any]) -> str:
    """Rows as Markdown, then the mean divergence over context length."""
    names = ["method", "pool MiB", "answers", "positions", "KL mean", "± s.e.", "KL 99 %", "KL largest (at)"]
    names += ["same best token", "eff. bits, mean", "retractions"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    measured = [row for row in result["rows"] if "missing" not in row]
    for row in measured:
        error = row["kl_mean_standard_error"]
        cells = [
            *_name(row),
            str(row["answers"]),
            f"{row['positions']:,}",
            f"{row['kl_mean']:.2e}",
            "-" if error is None else f"{error:.1e}",
            f"{row['kl_p99']:.1e}",
            f"{row['kl_max']:.1e} ({row['kl_max_context']:,})",
            f"{100 * row['top1_agreement']:.2f} %",
            f"{row.get('effective_bits_avg', 16):.2f}",
            str(row["retractions"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row in result["rows"]:
        if "missing" in row:
            lines.append(f"| {' | '.join(_name(row))} | missing: {row['missing']} " + "| " * (len(names) - 3) + "|")
    if measured:
        lines += ["", *_curves(measured)]
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> list[str]:
    pool = row["key"]["pool_bytes"]
    return [label(row["key"]["method"]), "-" if pool is None else f"{pool / 2**20:.1f}"]


def _curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean KL (99 % quantile) of each row, a line per part of the context."""
    titles = [name if pool == "-" else f"{name}, {pool} MiB" for name, pool in map(_name, rows)]
    lines = ["| context | " + " | ".join(titles) + " |", "|---" * (len(rows) + 1) + "|"]
    for points in zip(*(row["curve"] for row in rows), strict=True):
        first = points[0]
        cells = [f"{p['kl_mean']:.1e} ({p['kl_p99']:.1e})" for p in points]
        lines.append(f"| {first['context_from']:,} to {first['context_to']:,} | " + " | ".join(cells) + " |")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmkvq bench kld", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods.arguments(parser, DEFAULT, "results/kld.json")
    parser.add_argument("--data", type=Path, help='JSON lines with "prompt" and perhaps "answer", as text')
    parser.add_argument("--problems", type=int, default=24, help="problems, or lines of --data; default %(default)s")
    parser.add_argument("--first", type=int, default=0, help="index of the first one")
    parser.add_argument("--lines", default="64-128", help="program lines of the bundled task")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="bound on answers for --data")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time, default %(default)s")
    parser.add_argument("--chunk", type=int, default=256, help="--chunked-prefill-size of every server")
    methods.size_arguments(parser)
    parser.add_argument("--top", type=int, default=1024, help="tokens recorded at a position, default %(default)s")
    parser.add_argument("--bin", type=int, default=128, help="context tokens of a point of the curve")
    parser.add_argument("--work", type=Path, help="records of the 16-bit server (default: OUT.work)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        chosen = methods.methods(options.methods)
        run = load(options)
        bounded = [m for m in chosen if not m.unbounded]
        if bounded:
            methods.pool_sizes(options, 1)  # refuses wrong options before anything runs
        drop = ("share", "pool_bytes", "problems", "work")
        results = Results(options.out, "kld", methods.config(options, drop=drop), argv)
        return _run(run, results, SIXTEEN in chosen, bounded)
    except (OSError, ValueError) as error:
        print(f"pmkvq bench kld: {error}", file=sys.stderr)
        return 2
    except (ServerFailed, Unequal) as error:
        why = error.reason if isinstance(error, ServerFailed) else error
        print(f"pmkvq bench kld: the 16-bit server: {why}", file=sys.stderr)
        return 1


def _run(run: Run, results: Results, control: bool, bounded: Sequence[Method]) -> int:
    def key(method: Method, pool: int | None) -> dict[str, Any]:
        return {"method": method.name, "pool_bytes": pool, "answers": len(run.prompts)}

    keys = [key(SIXTEEN, None)] if control else []
    with tqdm(unit="row", desc="16-bit server") as bar:
        reference(run, results, keys[0] if control else None)
        bar.update(len(keys))
        held = held_bytes(run.options.model, run.lengths[: run.concurrency])
        rows = [(m, size) for size in (methods.pool_sizes(run.options, held) if bounded else []) for m in bounded]
        bar.total = len(keys) + len(rows)
        for method, size in rows:
            keys.append(key(method, size))
            bar.set_description(f"{method.name}, {size / 2**20:.1f} MiB")
            if not results.has(keys[-1]):
                try:
                    results.add(keys[-1], **measure(run, method, size))
                except ServerFailed as error:
                    results.missing(keys[-1], error.reason)
                except Unequal as error:
                    results.missing(keys[-1], str(error))
            bar.update()
    results.order(keys)
    print(table({"rows": results.rows}))
    print(f"\n{run.work} holds the 16-bit server's records; further rows need them", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
