"""What the parts of the GPU suite share: the clock, cells and their result files, servers and what they must do."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.harness.methods import Method, model_facts
from benchmarks.harness.results import ROOT, Key, Results, Row
from benchmarks.harness.servers import Server, greedy, serve
from benchmarks.serve import word_tokenizer

MODELS = ROOT / "benchmarks" / "models"
# Of SGLang's attention backends those that a kit without FlashAttention-3 can serve; the first is the baseline.
BACKENDS = ("flashinfer", "triton")
# The time that ending a server and writing the last row may take.
MARGIN_S = 15.0
START_S = 75.0  # a server with CUDA graphs, from nothing to its first answer
CHUNK = 2048
GIB = 1 << 30


class TimeUp(BaseException):
    """A limit passed. No ``Exception``: nothing that guards a step against its own errors may swallow it."""


class CheckFailed(RuntimeError):
    """A server or a kernel did not do what it must; its times are worth nothing."""


class Clock:
    """Raises `TimeUp` in the main thread when a limit passes, wherever it is. Needs the process's SIGALRM."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._armed = math.inf

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def limit(self, seconds: float = math.inf) -> Iterator[None]:
        """Inside, `TimeUp` comes after so many seconds or at the clock's end, whichever is first."""

        def time_up(*_: object) -> None:
            raise TimeUp

        outer = self._armed
        signal.signal(signal.SIGALRM, time_up)
        try:
            self._arm(min(self.end, time.monotonic() + seconds))
            yield
        finally:
            self._arm(outer)

    def _arm(self, end: float) -> None:
        self._armed = end
        signal.setitimer(signal.ITIMER_REAL, 0 if end == math.inf else max(1e-3, end - time.monotonic()))


@dataclass
class Context:
    """One run of the suite."""

    out: Path  # folder of results, logs and traces
    dry: bool  # on the CPU, with tiny shapes
    options: argparse.Namespace
    clock: Clock = field(default_factory=lambda: Clock(0.0))  # of the part that runs

    def tokenizer(self, model: str) -> Path:
        """Of one word per id of the model."""
        vocabulary = model_facts(MODELS / model)["vocab_size"]
        folder = self.out / "tokenizers" / str(vocabulary)
        return folder if (folder / "tokenizer_config.json").exists() else word_tokenizer(folder, vocabulary)


# Servers to compare, each by its method (``benchmarks/methods.py``); the last one has the other backend.
SYSTEMS = {name: Method.parse(name) for name in ("stock", "age-4", "age-2", "static-2", "stock-fp8")}
SYSTEMS["stock-triton"] = SYSTEMS["stock"]


def server_args(context: Context, name: str, model: str, kv_bytes: int, concurrency: int, length: int) -> list[str]:
    """Flags of a server with dummy weights; the same for all systems but for the cache itself.

    Args:
        name: in `SYSTEMS`.
        concurrency: requests at a time.
        length: tokens of the longest request.
    """
    # Hard-protected windows are 16-bit pages of every request that may run, so `static` would have little pool left for
    # as many as the others.
    running = max(1, concurrency // 2 if name.startswith("static") else concurrency)
    args = SYSTEMS[name].server_args(MODELS / model, kv_bytes, running, 64 if context.dry else CHUNK)
    args += ["--load-format", "dummy", "--tokenizer-path", str(context.tokenizer(model))]
    # The clients read whole answers; one message per token would be gigabytes.
    args += ["--context-length", str(length + 64), "--stream-interval", "32"]
    args += ["--grammar-backend", "none", "--random-seed", "0"]
    if context.dry:
        return args
    args += ["--cuda-graph-max-bs-decode", str(running)]
    return args if SYSTEMS[name].quant else [*args, "--attention-backend", BACKENDS["triton" in name]]


@contextlib.contextmanager
def dummy_server(context: Context, values: Row, log: str, name: str, model: str, *size: int) -> Iterator[Server]:
    """A server with the flags of `server_args` that has answered the probe; its command goes into `values`.

    Raises:
        CheckFailed: it did not, or it logged an error before the end of the ``with`` block.
    """
    path = context.out / "logs" / f"{log}.log"
    device = "cpu" if context.dry else "auto"
    args, quant = server_args(context, name, model, *size), SYSTEMS[name].quant
    with serve(MODELS / model, args, quant=quant, device=device, log_path=path) as server:
        command = [str(a).replace(f"{ROOT}/", "") for a in list(server.process.args)[1:]]
        values.setdefault("servers", []).append(" ".join(command))
        probe(server, model_facts(MODELS / model)["vocab_size"])
        yield server
        if errors := server.errors():
            raise CheckFailed(f"the server logged {errors[:3]}")


@dataclass(frozen=True)
class Cell:
    """What is measured, resumed and written as one.

    What ``run`` puts into the row that it is given is written even if time is up or it fails.
    """

    key: Key
    run: Callable[[Row], None]
    needs_s: float = 60.0  # with less time than this left it is not started


def facts() -> dict[str, Any]:
    """GPU, driver, and versions of what computes."""
    names = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python", "sglang-pmkvq")
    out: dict[str, Any] = {d.name: d.version for d in metadata.distributions() if d.name in names}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        out["gpu"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    return {"python": sys.version.split()[0], **out}


def open_results(context: Context, part: str) -> Results:
    """The part's result file, without the rows that failed or were cut off."""
    results = Results(context.out / f"{part}.json", f"gpu-{part}", {"dry": context.dry}, [])
    results.command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:])
    results.head["machine"] = facts()
    results.keep(lambda row: not {"failed", "cut_off"} & row.keys())
    return results


def run_cells(context: Context, results: Results, cells: Iterable[Cell]) -> bool:
    """Measure the cells that the file lacks while there is time; returns whether all are there.

    A cell that fails becomes a row that says why, and the next one runs.
    """
    started = False
    for cell in cells:
        name = ", ".join(map(str, cell.key.values()))
        if results.has(cell.key) or (context.options.only and context.options.only not in name):
            continue
        # The first one may start late, or a limit that is too short would let no cell ever begin.
        if started and context.clock.left() < cell.needs_s:
            print(f"suite: {context.clock.left():.0f} s are left, {name} waits for the next run", flush=True)
            return False
        started = True
        values, start = Row(), time.monotonic()
        try:
            with context.clock.limit():
                cell.run(values)
            values["cell_s"] = round(time.monotonic() - start, 1)
        except TimeUp:
            values["cut_off"] = f"after {time.monotonic() - start:.0f} s, by the part's limit"
        except Exception as error:
            values["failed"] = f"{type(error).__name__}: {error}"[-2000:]
        results.add(cell.key, **values)
        brief = {k: v for k, v in values.items() if k != "servers" and len(str(v)) < 200}
        print(f"suite: {name}: {json.dumps(brief)}", flush=True)
        if "cut_off" in values:
            return False
    return True


def probe(server: Server, vocab: int, prompt: int = 48, tokens: int = 16) -> None:
    """Ask twice alone, greedily; CheckFailed if the answers are not whole, in the vocabulary, and the same."""
    ids = [(7 * i + 11) % vocab for i in range(prompt)]
    answers = []
    for _ in range(2):
        server.flush()  # else the second one would extend a prefix, in other shapes
        answers.append(server.generate(**greedy(ids, tokens, ignore_eos=True))["output_ids"])
        if len(answers[-1]) != tokens or not all(0 <= t < vocab for t in answers[-1]):
            raise CheckFailed(f"expected {tokens} tokens below {vocab}, got {answers[-1]}")
    if answers[0] != answers[1]:
        raise CheckFailed(f"the same prompt alone gave {answers[0]} and then {answers[1]}")
