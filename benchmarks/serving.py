"""Start a real SGLang server, talk to it over HTTP, read what it did. Shared by benchmarks and tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import requests

from benchmarks.result import ROOT

REASONER = ROOT / "benchmarks" / "reasoner" / "model"
START_TIMEOUT_S = 600.0

# SGLang's own integrity checks, made strict: any leak or double free ends the server.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


def free_port() -> int:
    """A free local port, low enough for the ports that SGLang derives from it (up to 10,000 above).

    Below 32,768, where Linux begins to give ports to outgoing connections: the server binds only after it has loaded
    its model, and until then such a connection could take the port.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")


class ServerFailed(RuntimeError):
    """The server ended before it was ready; the message ends with its log."""

    @property
    def reason(self) -> str:
        """The last line of the log that names an error, else its last line."""
        lines = str(self).splitlines()
        errors = [line.strip() for line in lines if re.search(r"\b\w*(Error|Exception)\b|: error:", line)]
        return (errors or lines)[-1][:300]


@dataclass
class Server:
    """A running server.

    Attributes:
        url: base URL.
        process: the ``sglang.launch_server`` process.
        log_path: stdout and stderr.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    _mark: int = field(default=0)

    def log(self) -> str:
        """The log so far."""
        return self.log_path.read_text(errors="replace")

    def mark(self) -> None:
        """From now on ``new_log`` starts here."""
        self._mark = len(self.log())

    def new_log(self) -> str:
        return self.log()[self._mark :]

    def info(self) -> dict[str, Any]:
        """``/server_info``."""
        return requests.get(f"{self.url}/server_info", timeout=60).json()

    def pool(self) -> dict[str, Any]:
        """What the pool says of itself (``--kv-quant pmkvq`` only)."""
        return self.info()["internal_states"][0]["pmkvq"]

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by ``name{labels}`` without SGLang's own labels."""
        out: dict[str, float] = {}
        for line in requests.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            match = re.fullmatch(r"([\w:]+)(\{.*\})? ([-+.\deE]+|NaN)", line)
            if match:
                labels = re.findall(r'(tier|from|to|kind)="([^"]*)"', match[2] or "")
                key = match[1] + ("{" + ",".join(f"{k}={v}" for k, v in labels) + "}" if labels else "")
                out[key] = float(match[3])
        return out

    def flush(self) -> None:
        """Empty the radix tree; waits until the server is idle."""
        for _ in range(100):
            if requests.post(f"{self.url}/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.1)
        raise RuntimeError("the server did not become idle")

    def generate(self, **body: Any) -> dict[str, Any]:
        """One ``/generate`` call."""
        response = requests.post(f"{self.url}/generate", json=body, timeout=1200)
        response.raise_for_status()
        return response.json()

    def retracted(self) -> int:
        """Requests retracted since ``mark``."""
        return sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", self.new_log()))

    def peak_running(self) -> int:
        """Most requests in one decode batch of the log since ``mark``."""
        return max((int(n) for n in re.findall(r"#running-req: (\d+)", self.new_log())), default=0)

    def decode_running(self) -> list[int]:
        """Running requests in each decode line of the log since ``mark``."""
        return [int(n) for n in re.findall(r"Decode batch.*?#running-req: (\d+)", self.new_log())]

    def errors(self, since_mark: bool = False) -> list[str]:
        """Tracebacks and error lines of the log; a client that hangs up is not an error."""
        log = self.new_log() if since_mark else self.log()
        lines = [line for line in log.splitlines() if "disconnected from the client side" not in line]
        return [line for line in lines if re.search(r"Traceback|\w*Error\b|leak|CRITICAL", line)]


def sound(server: Server) -> None:
    """Nothing was lost on the device, no error was logged, and an empty server holds no page (``--kv-quant pmkvq``).

    Raises:
        RuntimeError: something was.
    """
    pool = server.pool()
    lost = {name: pool[name] for name in ("dropped_rows", "unmapped_reads") if pool[name]}
    if lost:
        raise RuntimeError(f"lost on the device: {lost}")
    server.flush()
    mapped = server.pool()["mapped_pages"]
    if mapped:
        raise RuntimeError(f"an empty server holds {mapped} pages")
    if errors := server.errors():
        raise RuntimeError(f"the server logged {errors[:3]}")


def scheduler_pid(server: Server) -> int:
    """Process id of the scheduler (the child that holds the pool)."""
    import psutil

    for child in psutil.Process(server.process.pid).children(recursive=True):
        if "sglang::scheduler" in " ".join(child.cmdline()):
            return child.pid
    raise RuntimeError("no scheduler process found")


@contextlib.contextmanager
def serve(
    model: Path | str,
    args: Sequence[str] = (),
    *,
    quant: bool = True,
    device: Literal["auto", "cpu"] = "auto",
    env: dict[str, str] | None = None,
    cwd: Path | str | None = None,
    log_path: Path | None = None,
    command: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
) -> Iterator[Server]:
    """A server on a free local port, CPU unless a GPU is there; stopped at the end of the ``with`` block.

    Args:
        model: model path.
        args: further flags.
        quant: ``--kv-quant pmkvq``, else ``none`` with ``torch_native`` on CPU.
        device: "cpu" even where there is a GPU.

    Raises:
        ServerFailed: it did not become ready.
    """
    port = free_port()
    cpu = device == "cpu" or not _cuda()
    line = [*command, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    # An idle scheduler polls without pause: on a small machine it would take a core from its neighbours.
    line += ["--kv-quant", "pmkvq" if quant else "none", "--sleep-on-idle"]
    if cpu:
        line += ["--device", "cpu"]
        if not quant:
            line += ["--attention-backend", "torch_native"]
    line += list(args)
    path = log_path or Path(tempfile.mkstemp(prefix="pmkvq-server-", suffix=".log")[1])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}
    # SGLang's processes import thousands of modules; compiling them anew takes a minute per server.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if cpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with path.open("wb") as log:
        process = subprocess.Popen(
            line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=cwd or ROOT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, path)
    try:
        _wait_ready(server)
        yield server
    finally:
        stop(server)


def stop(server: Server) -> None:
    """Kill the server and everything it started; a SIGTERM would only make SGLang wait for crash reports."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(15)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait_ready(server: Server) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ServerFailed(f"exit {server.process.returncode}\n{server.log()[-6000:]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.url}/health_generate", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise ServerFailed(f"not ready after {START_TIMEOUT_S} s\n{server.log()[-6000:]}")


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """One streamed ``/generate``: seconds to the first token, and the last message, which holds the whole answer.

    Raises:
        aiohttp.ClientResponseError: the server refused it. RuntimeError: it ended without an answer.
    """
    start = time.perf_counter()
    first, last = 0.0, b"{}"
    async with session.post(f"{url}/generate", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            part = line.removeprefix(b"data: ").strip()
            if not part or part == b"[DONE]":
                continue
            first = first or time.perf_counter() - start
            last = part
    answer = json.loads(last)
    if answer.get("meta_info", {}).get("finish_reason") is None:
        raise RuntimeError(f"the answer did not come to its end: {answer}")
    return first, answer


def generate_many(server: Server, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """``/generate`` for each body, ``concurrency`` at a time, answers in order.

    Raises:
        aiohttp.ClientResponseError: the server refused one.
    """

    async def run() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(concurrency)
        timeout = aiohttp.ClientTimeout(total=3600)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with gate, session.post(f"{server.url}/generate", json=body) as response:
                    response.raise_for_status()
                    return await response.json()

            return await asyncio.gather(*(one(body) for body in bodies))

    return asyncio.run(run())
