"""The README's two commands on a fresh clone, as a new user meets them: time to a right answer, and the suite.

    pmkvq bench checks fresh-clone --out benchmarks/results/fresh_clone.json

Clones HEAD into an empty folder, runs ``make serve`` there with empty uv and pip caches until the first printed problem
is answered, and then ``make test``. Needs a registry, 25 GB of disk and an hour at most.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.results import ROOT, Key, Result, Results, Row, measured, table
from benchmarks.harness.servers import free_port
from sglang_pmkvq.tools import demo

START_TIMEOUT_S = 1800.0
# Of this project's own settings a new user has none.
OWN = ("SGLANG_", "PYTEST_CURRENT", "VIRTUAL_ENV", "PMKVQ_", "OMP_NUM_THREADS", "TOKENIZERS_")


def run_serve(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """``make serve`` to a right answer to the first printed problem.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message ends with its log.
    """
    port, log, start = free_port(), clone / "serve.log", time.monotonic()
    with log.open("wb") as out:
        line = ["make", "serve", f"PORT={port}"]
        server = subprocess.Popen(line, cwd=clone, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        while "Ready at" not in log.read_text(errors="replace"):
            if server.poll() is not None or time.monotonic() - start > START_TIMEOUT_S:
                raise RuntimeError(f"make serve failed:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        ready, example = time.monotonic() - start, demo.examples(clone / "benchmarks" / "reasoner" / "model")[0]
        body = {"model": "default", "messages": [{"role": "user", "content": example.prompt}]}
        body |= {"temperature": 0, "max_tokens": demo.MAX_ANSWER_TOKENS}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=600).json()
        right = answer["choices"][0]["message"]["content"].rstrip().endswith(example.answer)
        return {"ready_s": round(ready, 1), "answered_s": round(time.monotonic() - start, 1), "right": right}
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(90)


def run_suite(clone: Path, env: dict[str, str], log: Path) -> dict[str, Any]:
    """``make test``: exit status, seconds, and pytest's own counts; what it printed goes to ``log``."""
    start = time.monotonic()
    done = subprocess.run(["make", "test"], cwd=clone, env=env, capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", done.stdout.rstrip().rsplit("\n", 1)[-1])
    return {"status": done.returncode, "test_s": round(time.monotonic() - start, 1), **{k: int(n) for n, k in counts}}


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    def measure(keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="pmkvq-fresh-") as temporary:
            folder = options.folder or Path(temporary)
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
            env = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
            if not options.keep_caches:
                env |= {f"{name}_CACHE_DIR": str(folder / f"{name}-cache") for name in ("UV", "PIP")}
            log = (options.out or options.folder or Path(tempfile.gettempdir()) / "pmkvq-fresh").with_suffix(".log")
            for key in keys:
                clone = folder / "clone"
                yield run_serve(clone, env) if key["part"] == "serve" else run_suite(clone, env, log)

    parts = [part for part in ("serve", "test") if options.only in (None, part)]
    return [Job([{"part": part, "cores": len(os.sched_getaffinity(0))} for part in parts], measure)]


def rows_table(result: Result) -> str:
    def outcome(row: Row) -> dict[str, str]:
        if "right" in row:
            right = f"first problem answered, {'right' if row['right'] else 'WRONG'}"
            return {"time": f"ready after {row['ready_s']:.0f} s", "outcome": right}
        counts = ", ".join(f"{row[k]:,} {k}" for k in ("passed", "failed", "error", "skipped") if k in row)
        return {"time": f"{row['test_s'] / 60:.1f} minutes", "outcome": counts}

    rows = [{**row, **outcome(row)} for row in measured(result)]
    return table(rows, "command | cores | time | result", "`make {part}` | {cores} | {time} | {outcome}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=["serve", "test"])
    parser.add_argument("--keep-caches", action="store_true", help="install from this machine's caches")
    parser.add_argument("--folder", type=Path, help="where to clone to, kept; default: a temporary folder")


EXPERIMENT = Experiment("checks fresh-clone", __doc__, plan, rows_table, arguments, free=("only", "folder"))
