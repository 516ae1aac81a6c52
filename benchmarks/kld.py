"""Divergence of a server's next-token distributions from those of a 16-bit server, on the same tokens, over length.

    pmkvq bench kld --methods 16bit,age-4,age-2,static-2 --share 0.22 --problems 24
    pmkvq bench kld --model MODEL --text opticks --tokens 1024 --methods 16bit,static-2,kivi-2 --share 1 --problems 4

A stock 16-bit server answers the prompts greedily (or a file gives the answers: ``--data``). Then it, and each method's
server, is made to write these tokens through its decode path, and all log-probabilities are recorded. ``--text`` forces
pieces of a text instead, behind ``--prompt-tokens`` of each. Row ``16bit`` is the control: the 16-bit server against
itself, the requests in reverse order. ``kivi-4`` and ``kivi-2`` (offline, against 16 bits of the same plain PyTorch)
force the same tokens. Records of the 16-bit server stay in
``--work``, so that a run that was killed, or one with further methods, goes on; remove the folder afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks import logit_record
from benchmarks.harness import experiment, methods
from benchmarks.harness.experiment import Job
from benchmarks.harness.methods import PAGE, Method, held_bytes, label, model_facts
from benchmarks.harness.results import Key, Result, Results, markdown, measured, mib, table, unmeasured, write
from benchmarks.harness.servers import Server, Unmeasurable, generate_many, greedy
from benchmarks.harness.stats import mean_error
from benchmarks.harness.tasks import builtin, chat_ids, read_jsonl
from benchmarks.harness.texts import pieces
from benchmarks.offline import memory, parse_method
from benchmarks.reasoner.evaluate import forward
from benchmarks.reasoner.evaluate import load as load_model

SIXTEEN = Method.parse("16bit")
# Of a piece of a text, and those of its beginning that are not forced.
TOKENS, PROMPT_TOKENS = 768, 160


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


def summary(answers: Sequence[Compared], width: int) -> dict[str, Any]:
    """Figures over all positions, and ``curve``, the same over the positions whose context lies in equal ``width``
    tokens. The error is that of the mean over answers."""
    context, kl, agree = (np.concatenate([getattr(a, name) for a in answers]) for name in ("context", "kl", "agree"))

    def figures(here: np.ndarray | slice) -> dict[str, Any]:
        return {
            "positions": len(kl[here]),
            "kl_mean": float(kl[here].mean()),
            "kl_p99": float(np.quantile(kl[here], 0.99)),
            "top1_agreement": float(agree[here].mean()),
        }

    return {
        "answers": len(answers),
        **figures(slice(None)),
        "kl_mean_standard_error": mean_error(np.array([a.kl.mean() for a in answers])),
        "kl_max": float(kl.max()),
        "kl_max_context": int(context[kl.argmax()]),
        "curve": [
            {"context_from": int(n * width), "context_to": int((n + 1) * width), **figures(context // width == n)}
            for n in np.unique(context // width)
        ],
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

    def __post_init__(self) -> None:
        o = self.options
        self.work: Path = o.work or o.out.with_name(o.out.name + ".work")
        self.concurrency = min(o.concurrency, len(self.prompts))
        vocabulary = model_facts(o.model)["vocab_size"]
        self.top = min(o.top, vocabulary)
        self.exact = self.top == vocabulary
        # What decides the answers.
        self.asked = [experiment.config(o)["model"], o.server_args, self.limit, self.prompts]

    @property
    def digest(self) -> str:
        """SHA-256 of model, prompts and answers: rows are comparable if it is the same."""
        return hashlib.sha256(json.dumps([*self.asked, self.tokens]).encode()).hexdigest()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence at its end; while answers are unknown, at most."""
        answers = [len(t) for t in self.tokens] or [self.limit] * len(self.prompts)
        return [len(p) + n for p, n in zip(self.prompts, answers, strict=True)]

    def server(self, method: Method, budget: int) -> AbstractContextManager[Server]:
        """A server of this method without a prefix cache."""
        flags = ("--enable-custom-logit-processor", "--disable-radix-cache")
        return experiment.serve_method(self.options, method, budget, self.concurrency, *flags)

    def recall(self) -> None:
        """Take the tokens that an earlier run left in the work folder, if there are any."""
        path = self.work / "tokens.json"
        if not self.tokens and path.is_file():
            found = json.loads(path.read_text())
            self.tokens = found["tokens"] if found["asked"] == self.asked else []

    def choose(self, server: Server) -> None:
        """Let the 16-bit server choose the tokens greedily."""
        bodies = [greedy(p, self.limit) for p in self.prompts]
        self.tokens = [a["output_ids"] for a in generate_many(server, bodies, self.concurrency)]
        write({"asked": self.asked, "tokens": self.tokens}, self.work / "tokens.json")

    def reference(self, index: int) -> Path:
        """The 16-bit server's record of an answer."""
        return self.work / f"{self.digest[:16]}-{self.top}" / f"{index:05d}.npy"

    def unrecorded(self) -> list[int]:
        """Answers that the reference lacks."""
        return [i for i, t in enumerate(self.tokens) if not logit_record.is_complete(self.reference(i), len(t))]

    def record(self, server: Server, paths: Callable[[int], Path], order: Sequence[int], *, first: bool) -> None:
        """Force the answers of ``order`` and record them; ``first``: this is the reference.

        Raises:
            Unmeasurable: tokens differ from the given ones, or steps are missing.
        """
        bodies = []
        for i in order:
            paths(i).parent.mkdir(parents=True, exist_ok=True)
            logit_record.create(paths(i), len(self.tokens[i]), self.top, ids=first and not self.exact)
            reference = None if first or self.exact else self.reference(i).resolve()
            fields = logit_record.request(self.tokens[i], paths(i).resolve(), reference)
            bodies.append({"input_ids": self.prompts[i], **fields})
        answers = dict(zip(order, generate_many(server, bodies, self.concurrency), strict=True))
        wrong = [
            i
            for i, answer in answers.items()
            if answer["output_ids"] != self.tokens[i] or not logit_record.is_complete(paths(i), len(self.tokens[i]))
        ]
        if wrong:
            raise Unmeasurable(f"{len(wrong)} of {len(order)} answers are not the forced tokens: {wrong[:10]}")

    def compare(self, server: Server, *, backwards: bool = False) -> dict[str, Any]:
        """Record a server and compare it with the reference; its own records do not stay."""
        order = range(len(self.prompts))
        server.mark()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:

            def own(index: int) -> Path:
                return Path(folder) / f"{index:05d}.npy"

            self.record(server, own, order[::-1] if backwards else order, first=False)
            compared = [
                compare(np.load(self.reference(i), mmap_mode="r"), np.load(own(i)), len(prompt))
                for i, prompt in enumerate(self.prompts)
            ]
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
    model_facts(options.model)  # a wrong path is said here, before anybody looks for it elsewhere
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.text:
        size, n = options.tokens or TOKENS, options.prompt_tokens or PROMPT_TOKENS
        if options.data or n >= size:
            raise ValueError("--text takes no --data, and more --tokens than --prompt-tokens")
        found = pieces(tokenizer, options.text, options.problems, size, options.first)
        return Run(options, [piece[:n] for piece in found], [piece[n:] for piece in found], size)
    if options.data is None:
        items = builtin(options.problems, options.lines, options.first)
        limit = max(item.max_tokens or 0 for item in items) + 64
        return Run(options, [chat_ids(tokenizer, item.messages) for item in items], [], limit)
    texts = [*read_jsonl(options.data, _pair)][options.first :][: options.problems]
    if not texts:
        raise ValueError(f"--first {options.first}: {options.data} has no more lines")
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": asked}]) for asked, _ in texts]
    answered = [said for _, said in texts if said is not None]
    if answered and len(answered) < len(texts):
        raise ValueError(f"{options.data}: some lines have an answer and some have none; expected all or none")
    tokens = [tokenizer(said, add_special_tokens=False)["input_ids"][: options.max_new_tokens] for said in answered]
    if not all(tokens):
        raise ValueError(f"{options.data}: an answer is empty")
    return Run(options, prompts, tokens, options.max_new_tokens)


def _pair(record: dict[str, Any]) -> tuple[str, str | None]:
    prompt, answer = record.get("prompt"), record.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise ValueError('expected an object with the texts "prompt" and, if given, "answer"')
    return prompt, answer


# -- rows ----------------------------------------------------------------------------------------------------


def measure(run: Run, method: Method, budget: int) -> dict[str, Any]:
    """One method's server against the reference."""
    with run.server(method, budget) as server:
        found = run.compare(server)
        if method.quant:
            state = server.pool()
            found |= {name: state[name] for name in ("effective_bits_avg", "used_bytes_peak", "used_bytes_avg")}
        return found


@torch.no_grad()
def offline(run: Run, keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
    """Values of KIVI's rows: plain PyTorch against itself at 16 bits, weights in fp32, on the same tokens.

    Raises:
        Unmeasurable: plain PyTorch does not know the model.
    """
    try:
        model = load_model(run.options.model)
    except (OSError, ValueError) as error:
        raise Unmeasurable(str(error)) from error
    sixteen, *kivi = (parse_method(name, model.config)[0] for name in ("16bit", *(key["method"] for key in keys)))
    found: list[list[Compared]] = [[] for _ in kivi]
    for prompt, answer in zip(run.prompts, run.tokens, strict=True):
        tokens, first = torch.tensor([*prompt, *answer[:-1]]), len(prompt) - 1
        exact, *states = (forward(model, tokens, q, len(prompt))[first:].split(64) for q in (sixteen, *kivi))
        for parts, own in zip(states, found, strict=True):
            compared = [agreement(model.lm_head(x), model.lm_head(y)) for x, y in zip(exact, parts, strict=True)]
            kl, agree = (torch.cat(values).numpy() for values in zip(*compared, strict=True))
            own.append(Compared(len(prompt) + np.arange(len(answer)), kl.astype(np.float64), agree))
    spans = [(len(p), len(t)) for p, t in zip(run.prompts, run.tokens, strict=True)]
    for quantizer, own in zip(kivi, found, strict=True):
        bits = memory(quantizer, spans, run.concurrency)["effective_bits_avg"]
        yield {**summary(own, run.options.bin), "tokens_sha256": run.digest, "effective_bits_avg": bits}


def agreement(exact: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(exact ‖ other) in nats of logits [n, vocabulary], and whether the best token is the same; each [n]."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def plan(options: argparse.Namespace, results: Results) -> Iterator[Job]:
    """The control, if it is wanted, then a row per budget and method; sizes are known when the answers are."""
    listed = methods.names(options.methods)
    kivi = [name for name in listed if re.fullmatch("kivi-[248]", name)]
    chosen = [Method.parse(name) for name in listed if name not in kivi]
    run = load(options)
    bounded = [m for m in chosen if not m.unbounded]
    if bounded:
        experiment.budgets(options, 1)  # refuses wrong options before anything runs

    def key(method: Method, budget: int | None) -> Key:
        return {"method": method.name, "budget_bytes": budget, "answers": len(run.prompts)}

    def jobs() -> Iterator[Job]:
        control = [key(SIXTEEN, None)] if SIXTEEN in chosen else []
        reference(run, results, control)
        # The control is there by now: it was measured on the server that made the reference.
        yield Job(control, lambda keys: iter(()), "16bit")
        held = held_bytes(options.model, run.lengths[: run.concurrency])
        for budget in experiment.budgets(options, held) if bounded else []:
            for m in bounded:
                yield Job.row(key(m, budget), partial(measure, run, m, budget), f"{m.name}, {mib(budget)} MiB")
        yield Job([{**key(SIXTEEN, None), "method": name} for name in kivi], partial(offline, run), "KIVI")

    return jobs()


def reference(run: Run, results: Results, control: Sequence[Key]) -> None:
    """Tokens and records of the 16-bit server as far as they are missing, and the row ``control`` if there is none.

    Raises:
        Unmeasurable: the server did not run, or the result file's rows are of other tokens.
    """
    run.recall()
    wanted = [key for key in control if not results.has(key)]
    if not run.tokens or run.unrecorded() or wanted:
        # One sequence more than run, so that nothing ever waits: admission wants a little more than sequences hold.
        budget = held_bytes(run.options.model, [max(run.lengths) + PAGE] * (run.concurrency + 1))
        with run.server(SIXTEEN, budget) as server:
            if not run.tokens:
                run.choose(server)
            if missing := run.unrecorded():
                run.record(server, run.reference, missing, first=True)
            for key in wanted:
                results.add(key, **run.compare(server, backwards=True))
    if any(row.get("tokens_sha256", run.digest) != run.digest for row in results.rows):
        raise Unmeasurable(
            f"--out {run.options.out} holds rows of other tokens than those in {run.work}; remove one of the two"
        )


def rows_table(result: Result) -> str:
    """Rows as Markdown, then the mean divergence over context length."""
    rows = measured(result)
    text = table(
        [*({"effective_bits_avg": 16.0, **row} for row in rows), *unmeasured(result)],
        "method | pool MiB | answers | positions | KL mean | ± s.e. | KL 99 % | KL largest (at) | same best token "
        "| eff. bits, mean | retractions",
        "{method:m} | {budget_bytes:M} | {answers} | {positions:,} | {kl_mean:.2e} | {kl_mean_standard_error:.1e} "
        "| {kl_p99:.1e} | {kl_max:.1e} ({kl_max_context:,}) | {top1_agreement:.2%} | {effective_bits_avg:.2f} "
        "| {retractions}",
        names=2,
    )
    keys = [row["key"] for row in rows]
    titles = [label(k["method"]) + (f", {mib(k['budget_bytes'])} MiB" if k["budget_bytes"] else "") for k in keys]
    lines = [
        [f"{points[0]['context_from']:,} to {points[0]['context_to']:,}"]
        + [f"{p['kl_mean']:.1e} ({p['kl_p99']:.1e})" for p in points]
        for points in zip(*(row["curve"] for row in rows), strict=True)
    ]
    return text + ("\n\n" + markdown(["context", *titles], lines) if rows else "")


def arguments(parser: argparse.ArgumentParser) -> None:
    experiment.server_arguments(parser, chunk=256)
    experiment.problem_arguments(parser, 24)
    parser.add_argument("--data", type=Path, help='JSON lines with "prompt" and perhaps "answer", instead of the task')
    told = "opticks, a text file, or GSM8K's lines: pieces of it are forced, instead of the task"
    parser.add_argument("--text", help=told)
    parser.add_argument("--tokens", type=experiment.positive, help=f"of a piece of --text, default {TOKENS}")
    told = f"of a piece that are its prompt, default {PROMPT_TOKENS}: sinks, window, and a page that is old"
    parser.add_argument("--prompt-tokens", type=experiment.positive, help=told)
    experiment.budgets_arguments(parser)
    experiment.numbers(
        parser,
        concurrency=(8, "requests at a time"),
        max_new_tokens=(4096, "bound on answers for --data"),
        top=(1024, "tokens recorded at a position"),
        bin=(128, "context tokens of a point of the curve"),
    )
    parser.add_argument("--work", type=Path, help="records of the 16-bit server, which further rows need: OUT.work")


FREE = ("share", "budget_bytes", "problems", "work")
METHODS = "16bit,age-4,age-2,static-4,static-2"
EXPERIMENT = experiment.Experiment("kld", __doc__, plan, rows_table, arguments, METHODS, "results/kld.json", FREE)
main = EXPERIMENT.main
