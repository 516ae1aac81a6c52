"""Start a real SGLang server, talk to it over HTTP, read what it did. Shared by benchmarks and tests."""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import requests
import torch

from benchmarks.harness.results import ROOT

Body = dict[str, Any]

REASONER = ROOT / "benchmarks" / "reasoner" / "model"
START_TIMEOUT_S = 600.0
# Of an answer, the wait for its turn included.
TIMEOUT_S = 3600.0

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


class Unmeasurable(RuntimeError):
    """A row cannot be measured here; the message says why."""

    @property
    def reason(self) -> str:
        return str(self)


class ServerFailed(Unmeasurable):
    """The server ended before it was ready; the message ends with its log."""

    @property
    def reason(self) -> str:
        """The last line of the log that names an error, else its last line."""
        lines = str(self).splitlines()
        errors = [line.strip() for line in lines if re.search(r"\b\w*(Error|Exception)\b|: error:", line)]
        return (errors or lines)[-1][:300]


def pool_state(state: dict[str, Any]) -> dict[str, Any]:
    """The pool's figures of a scheduler's state; the one place that knows how ``/server_info`` names them."""
    return state["pmkvq"]


@dataclass
class Server:
    """A running server: base URL, the ``sglang.launch_server`` process, and the file of its stdout and stderr."""

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
        return pool_state(self.info()["internal_states"][0])

    def flush(self) -> None:
        """Empty the radix tree; waits until the server is idle."""
        for _ in range(100):
            if requests.post(f"{self.url}/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.1)
        raise RuntimeError("the server did not become idle")

    def generate(self, **body: Any) -> dict[str, Any]:
        """One ``/generate`` call."""
        response = requests.post(f"{self.url}/generate", json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        return response.json()

    def converse(
        self,
        messages: Sequence[Body],
        tools: Sequence[Body],
        respond: Callable[[Body], str],
        turns: int = 2,
        **body: Any,
    ) -> Body:
        """A conversation of at most ``turns`` turns with the chat endpoint, each of them answered by a tool.

        Returns:
            As ``generate``: ``text`` is a JSON list of each turn's first call; a turn without one that SGLang could
            parse ends the conversation.
        """
        said, calls, tokens = [*messages], [], 0
        body = {"model": "default", "tools": tools, "return_meta_info": True, **body}
        for _ in range(turns):
            response = requests.post(
                f"{self.url}/v1/chat/completions", json={**body, "messages": said}, timeout=TIMEOUT_S
            )
            response.raise_for_status()
            choice = response.json()["choices"][0]
            meta, made = choice["meta_info"], choice["message"].get("tool_calls") or []
            tokens += meta["completion_tokens"]
            if not made:
                break
            function = made[0]["function"]
            calls.append({"name": function["name"], "arguments": json.loads(function["arguments"])})
            answered = {"role": "tool", "tool_call_id": made[0]["id"], "content": respond(calls[-1])}
            said = [*said, {**choice["message"], "tool_calls": made[:1]}, answered]
        return {"text": json.dumps(calls), "meta_info": {**meta, "completion_tokens": tokens}}

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

    def check_log(self, name: str) -> None:
        """Raises:
        RuntimeError: the server logged an error since ``mark``; figures of such a run are worth nothing."""
        if errors := self.errors(since_mark=True):
            raise RuntimeError(f"{name}: the server logged {errors[:3]}")


def scheduler_pid(server: Server) -> int:
    """Process id of the scheduler (the child that holds the pool)."""
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
        args: further flags.
        quant: ``--kv-quant pmkvq``, else ``none`` with ``torch_native`` on CPU.
        device: "cpu" even where there is a GPU.

    Raises:
        ServerFailed: it did not become ready.
    """
    port = free_port()
    cpu = device == "cpu" or not torch.cuda.is_available()
    line = [*command, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    # An idle scheduler polls without pause: on a small machine it would take a core from its neighbours.
    line += ["--kv-quant", "pmkvq" if quant else "none", "--sleep-on-idle"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}
    # SGLang's processes import thousands of modules; compiling them anew takes a minute per server.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if cpu:
        line += ["--device", "cpu", *([] if quant else ["--attention-backend", "torch_native"])]
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    line += args
    path = log_path or Path(tempfile.mkstemp(prefix="pmkvq-server-", suffix=".log")[1])
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


Item = TypeVar("Item")
Answer = TypeVar("Answer")


def greedy(prompt: Sequence[int], tokens: int, *, bits: bool = False, ignore_eos: bool = False) -> Body:
    """The body of a greedy ``/generate`` of at most ``tokens`` output tokens.

    Args:
        bits: the answer is to say at how many bits its KV was in the end (``--kv-quant pmkvq`` only).
    """
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens}
    params |= {"ignore_eos": True} if ignore_eos else {}
    params |= {"custom_params": {"pmkvq_kv_bits": True}} if bits else {}
    return {"input_ids": list(prompt), "sampling_params": params}


def together(ask: Callable[[Item], Answer], items: Iterable[Item], concurrency: int) -> list[Answer]:
    """``ask`` of each item, ``concurrency`` at a time, answers in order."""
    pool = ThreadPoolExecutor(concurrency)
    try:
        return list(pool.map(ask, items))
    finally:  # after an error or Ctrl-C, what has not begun does not begin
        pool.shutdown(cancel_futures=True)


def generate_many(server: Server, bodies: Sequence[Body], concurrency: int) -> list[dict[str, Any]]:
    """``/generate`` for each body, ``concurrency`` at a time, answers in order.

    Raises:
        requests.HTTPError: the server refused one.
    """
    return together(lambda body: server.generate(**body), bodies, concurrency)


def stream_many(server: Server, bodies: Sequence[Body], concurrency: int) -> list[tuple[float, dict[str, Any]]]:
    """The same streamed: seconds to the first token, and the last message, which holds the whole answer.

    Raises:
        requests.HTTPError: the server refused one. RuntimeError: one ended without an answer.
    """

    def stream(body: Body) -> tuple[float, dict[str, Any]]:
        start, first, last = time.perf_counter(), 0.0, b"{}"
        line = {**body, "stream": True}
        with requests.post(f"{server.url}/generate", json=line, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            for part in response.iter_lines():
                part = part.removeprefix(b"data: ")
                if part and part != b"[DONE]":
                    first, last = first or time.perf_counter() - start, part
        answer = json.loads(last)
        if answer.get("meta_info", {}).get("finish_reason") is None:
            raise RuntimeError(f"the answer did not come to its end: {answer}")
        return first, answer

    return together(stream, bodies, concurrency)
