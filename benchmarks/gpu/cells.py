"""What the parts of the GPU suite share: the clock, cells and their result files, flags of the servers."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import requests

from benchmarks.methods import Method
from benchmarks.result import ROOT, Key, Results
from benchmarks.serving import Server, ServerFailed

MODELS = ROOT / "benchmarks" / "models"
# Of SGLang's attention backends those that a kit without FlashAttention-3 can serve; the first is the baseline.
BACKENDS = ("flashinfer", "triton")
# The time that ending a server and writing the last row may take.
MARGIN_S = 15.0


class TimeUp(BaseException):
    """A limit passed. No ``Exception``: nothing that guards a step against its own errors may swallow it."""


class CheckFailed(RuntimeError):
    """A server did not do what it must; its times are worth nothing."""


class Clock:
    """Raises `TimeUp` in the main thread when a limit passes, wherever it is. Needs the process's SIGALRM."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._armed: float | None = None

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def limit(self, seconds: float | None = None) -> Iterator[None]:
        """Inside, `TimeUp` comes after so many seconds or at the clock's end, whichever is first."""

        def time_up(*_: object) -> None:
            raise TimeUp

        outer, self._armed = self._armed, min(self.end, time.monotonic() + (seconds or float("inf")))
        signal.signal(signal.SIGALRM, time_up)
        try:
            self._arm()
            yield
        finally:
            self._armed = outer
            self._arm()

    def _arm(self) -> None:
        seconds = 0.0 if self._armed is None else max(1e-3, self._armed - time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, seconds)


@dataclass
class Context:
    """One run of the suite.

    Attributes:
        out: folder of results, logs and traces.
        dry: on the CPU, with tiny shapes.
        options: the command line.
        clock: of the part that runs.
    """

    out: Path
    dry: bool
    options: argparse.Namespace
    clock: Clock = field(default_factory=lambda: Clock(0.0))

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "auto"

    def log(self, *name: object) -> Path:
        """Where a server's log goes."""
        path = self.out / "logs" / ("-".join(str(n).replace("/", "_").replace(" ", "_") for n in name) + ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def stock_args(self, backend: str = BACKENDS[0]) -> list[str]:
        """Flags that give stock the attention backend of the baseline; on the CPU it has one only."""
        return [] if self.dry else ["--attention-backend", backend]


@dataclass(frozen=True)
class Cell:
    """What is measured, resumed and written as one.

    Attributes:
        key: its name in the result file.
        run: measures it. What it puts into the dictionary that it is given is written even if time is up or it fails.
        needs_s: with less time than this left it is not started.
    """

    key: Key
    run: Callable[[dict[str, Any]], None]
    needs_s: float = 60.0


def label(key: Key) -> str:
    return ", ".join(str(v) for v in key.values())


def facts() -> dict[str, Any]:
    """GPU, driver, and versions of what computes."""
    names = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python", "sglang-pmkvq")
    out: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        out["gpu"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    return out


def open_results(context: Context, part: str, config: dict[str, Any]) -> Results:
    """The part's result file, without the rows that failed or were cut off: they are measured again."""
    results = Results(context.out / f"{part}.json", f"gpu-{part}", {"dry": context.dry, **config}, [])
    results.command = "python -m benchmarks.gpu.suite " + " ".join(sys.argv[1:])
    results.head["machine"] = facts()
    results.rows[:] = [row for row in results.rows if not {"failed", "cut_off"} & row.keys()]
    return results


def run_cells(context: Context, results: Results, cells: Iterable[Cell]) -> bool:
    """Measure the cells that the file lacks while there is time; returns whether all are there.

    A cell that fails becomes a row that says why, and the next one runs.
    """
    started = False
    for cell in cells:
        if results.has(cell.key) or (context.options.only and context.options.only not in label(cell.key)):
            continue
        # The first one may start late, or a limit that is too short would let no cell ever begin.
        if started and context.clock.left() < cell.needs_s:
            print(f"suite: {context.clock.left():.0f} s are left, {label(cell.key)} waits for the next run", flush=True)
            return False
        started = True
        values: dict[str, Any] = {}
        start = time.monotonic()
        try:
            with context.clock.limit():
                cell.run(values)
        except TimeUp:
            results.add(cell.key, **values, cut_off=f"after {time.monotonic() - start:.0f} s, by the part's limit")
            print(f"suite: {label(cell.key)} was cut off", flush=True)
            return False
        except ServerFailed as error:
            results.add(cell.key, **values, failed=str(error)[-2000:])
        except Exception as error:
            results.add(cell.key, **values, failed=f"{type(error).__name__}: {error}"[:2000])
        else:
            results.add(cell.key, **values, cell_s=round(time.monotonic() - start, 1))
        print(f"suite: {label(cell.key)}: {json.dumps(brief(results.rows[-1]))}", flush=True)
    return True


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers and short texts of a row."""
    skip = ("key", "command", "commit", "server")
    return {
        k: v for k, v in row.items() if k not in skip and (not isinstance(v, str | list | dict) or len(str(v)) < 200)
    }


def command_of(server: Server) -> str:
    """The server's command line, to repeat it by hand."""
    args = server.process.args
    assert isinstance(args, list)
    return " ".join(str(a).replace(str(ROOT) + "/", "") for a in args[1:])


def probe(server: Server, vocab: int, prompt: int = 48, tokens: int = 16) -> None:
    """Ask twice alone, greedily: whole answers, in the vocabulary, and the same.

    Raises:
        CheckFailed: one is not, or the server logged an error.
    """
    ids = [(7 * i + 11) % vocab for i in range(prompt)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answers = []
    for _ in range(2):
        server.flush()  # else the second one would extend a prefix, in other shapes
        answers.append(server.generate(input_ids=ids, sampling_params=params)["output_ids"])
    for answer in answers:
        if len(answer) != tokens or not all(0 <= t < vocab for t in answer):
            raise CheckFailed(f"expected {tokens} tokens below {vocab}, got {answer}")
    if answers[0] != answers[1]:
        raise CheckFailed(f"the same prompt alone gave {answers[0]} and then {answers[1]}")
    if errors := server.errors():
        raise CheckFailed(f"the server logged {errors[:3]}")


def abort_all(server: Server) -> None:
    """End what runs, and wait until the server is empty."""
    requests.post(f"{server.url}/abort_request", json={"rid": "", "abort_all": True}, timeout=60)
    server.flush()


def check_bytes(server: Server, method: Method, pool_bytes: int, token_bytes: int) -> dict[str, int]:
    """KV bytes and tokens of a server; they may not exceed what everybody was given.

    Args:
        token_bytes: of a token as this server stores it, if it is stock.

    Raises:
        CheckFailed: they do, or are far from it.
    """
    if method.quant:
        pool = server.pool()
        stored, tokens = pool["storage_bytes"], pool["logical_tokens"]
    else:
        tokens = server.info()["max_total_num_tokens"]
        stored = tokens * token_bytes
    if not 0.9 * pool_bytes < stored <= pool_bytes:
        raise CheckFailed(f"{method.name} stores {stored} bytes of KV, everybody was given {pool_bytes}")
    return {"kv_bytes": stored, "kv_tokens": tokens}
