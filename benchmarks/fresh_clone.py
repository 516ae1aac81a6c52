"""The two commands of the README on a fresh clone, as a new user meets them: time to a right answer, and the suite.

    python -m benchmarks.fresh_clone --out benchmarks/results/fresh_clone.json

Clones the repository's HEAD into an empty folder, runs ``make serve`` there with an empty uv and pip cache until the
first printed problem is answered, and then ``make test``. Needs a registry, 25 GB of disk and an hour at most;
``--only serve`` leaves the suite out, ``--keep-caches`` installs from this machine's caches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import versions, write
from benchmarks.serving import ROOT, free_port
from sglang_pmkvq.tools import demo

START_TIMEOUT_S = 1800.0


def environment(folder: Path, keep_caches: bool) -> dict[str, str]:
    """Nothing of this project's own, and caches below ``folder`` unless they are kept."""
    dropped = ("SGLANG_", "PYTEST_CURRENT", "VIRTUAL_ENV", "PMKVQ_", "OMP_NUM_THREADS", "TOKENIZERS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    if not keep_caches:
        kept |= {"UV_CACHE_DIR": str(folder / "uv-cache"), "PIP_CACHE_DIR": str(folder / "pip-cache")}
    return kept


def answer(url: str, example: demo.Example) -> bool:
    """The first printed problem, as the printed curl sends it."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": example.prompt}],
        "temperature": 0,
        "max_tokens": demo.MAX_ANSWER_TOKENS,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        text = json.loads(response.read())["choices"][0]["message"]["content"]
    return bool(text.rstrip().endswith(example.answer))


def run_serve(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """``make serve`` to a right answer.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message ends with its log.
    """
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", clone / "serve.log"
    start = time.monotonic()
    with open(log, "wb") as out:
        server = subprocess.Popen(
            ["make", "serve", f"PORT={port}"], cwd=clone, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        while "Ready at" not in log.read_text(errors="replace"):
            if server.poll() is not None or time.monotonic() - start > START_TIMEOUT_S:
                raise RuntimeError(f"make serve failed:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        ready = time.monotonic() - start
        right = answer(url, demo.examples(clone / "benchmarks" / "reasoner" / "model")[0])
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["serve", "test"])
    parser.add_argument("--keep-caches", action="store_true", help="install from this machine's caches")
    parser.add_argument("--folder", type=Path, help="where to clone to, kept; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.fresh_clone", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
    }
    with tempfile.TemporaryDirectory(prefix="pmkvq-fresh-") as temporary:
        clone = (options.folder or Path(temporary)) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = environment(clone.parent, options.keep_caches)
        if options.only != "test":
            result["serve"] = run_serve(clone, env)
            print(json.dumps(result["serve"]), flush=True)
        if options.only != "serve":
            log = (options.out or options.folder or Path(tempfile.gettempdir()) / "pmkvq-fresh").with_suffix(".log")
            result["test"] = run_suite(clone, env, log)
            print(json.dumps(result["test"]), f"log: {log}", flush=True)
    write(result, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
