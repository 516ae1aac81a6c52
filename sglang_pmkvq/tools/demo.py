"""``pmkvq serve-demo``: SGLang's own server on a pool so small that a few problems make its pages shrink.

Starts ``python -m sglang.launch_server`` as a child, waits until it is healthy, prints requests to
paste, and ends the server in good order on Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sglang_pmkvq.tools import models

# The model of the repository; an installed wheel has none and needs --model.
BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "benchmarks" / "reasoner" / "model"

# The 16-bit pool would hold this many tokens: one example problem with its chain of thought fits whole,
# the second one makes pages of the first shrink.
POOL_TOKENS_AT_16_BITS = 1536
EXAMPLE_LINES = 70
EXAMPLES = 3
MAX_ANSWER_TOKENS = 1500
# Answers of chat models are shorter, so their pool is smaller.
CHAT_POOL_TOKENS_AT_16_BITS = 384
# What such a small pool can hold in reserve for new tokens at 16 bits.
CHAT_FLAGS = ("--chunked-prefill-size", "128", "--max-running-requests", "4")

START_TIMEOUT_S = 900.0
# SGLang answers running requests before it ends on SIGTERM.
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Example:
    """A chat message to send, and what a right answer ends with ("" where that is not known)."""

    prompt: str
    answer: str
    max_tokens: int = MAX_ANSWER_TOKENS


# For the models of `pmkvq models`: the third does not fit beside the first two at 16 bits.
CHAT_EXAMPLES = (
    Example("What is the capital of France?", "Paris.", 400),
    Example("Why is the sky blue? Explain it to a child.", "", 400),
    Example("Write a Python function that says whether a string is a palindrome, and explain each line.", "", 400),
)


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of one token's KV at 16 bits, over all layers, from the model's ``config.json``.

    Raises:
        ValueError: there is no such file, or it does not describe a dense transformer.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model} holds no readable config.json ({error}); give a model folder, or a name from pmkvq models, "
            f"with --model"
        ) from error
    try:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * 2)
    except KeyError as error:
        raise ValueError(f"{model}/config.json has no {error}; give a dense transformer with --model") from error


def examples(model: Path, count: int = EXAMPLES) -> list[Example]:
    """Problems that the model was trained for, from ``task.py`` beside the model folder if there is one.

    Loaded by path: the package imports nothing from the benchmarks.
    """
    task_file = model.resolve().parent / "task.py"
    if not task_file.is_file():
        return [Example("What is 17 * 23? Think step by step.", "")]
    task = _load(task_file)
    problems = [task.make_problem(task.EVAL_SEED_START + i, EXAMPLE_LINES) for i in range(count)]
    return [Example(problem.prompt, f"#:{problem.answer}") for problem in problems]


def _load(path: Path) -> ModuleType:
    name = f"_pmkvq_demo_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def chat_command(base_url: str, prompt: str, max_tokens: int = MAX_ANSWER_TOKENS) -> str:
    """A curl line to paste into a shell: one greedy chat completion."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    return (
        f"curl -sf {base_url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def metrics_command(base_url: str) -> str:
    return f"curl -sf {base_url}/metrics | grep '^sglang:pmkvq_'"


def server_command(
    model: Path, host: str, port: int, budget_bytes: int | str, gpu: bool, extra: list[str]
) -> list[str]:
    """The plain SGLang command that the demo runs; ``extra`` comes last and wins."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", host, "--port", str(port)]
    command += ["--kv-quant", "pmkvq", "--pmkvq-pool-bytes", str(budget_bytes), "--enable-metrics"]
    command += ["--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"] if gpu else ["--device", "cpu"]
    return command + extra


def serve_demo(
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 30000,
    budget_bytes: str | None = None,
    extra: list[str] | None = None,
) -> int:
    """Run the demo until the server ends or a signal comes.

    Args:
        model: a folder, or a name from ``pmkvq models``, which is fetched into the cache if it is not there; by
            default the model of the repository.

    Returns:
        0 after Ctrl-C or SIGTERM, else the server's exit status (1 if it never became healthy).

    Raises:
        OSError: the model cannot be fetched.
        ValueError: the model folder is unusable, or the port is taken.
    """
    if model is None and not BUNDLED_MODEL.is_dir():
        raise ValueError("the bundled model is in the repository only; give a model folder with --model")
    with socket.socket() as probe:  # ahead of what may take minutes
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error}); choose another --port") from error
    flags: list[str] = []
    if model in models.MODELS and not Path(model).is_dir():
        folder, requests, tokens = models.get(model), list(CHAT_EXAMPLES), CHAT_POOL_TOKENS_AT_16_BITS
        flags += CHAT_FLAGS
    else:
        folder = Path(model) if model is not None else BUNDLED_MODEL
        requests, tokens = examples(folder), POOL_TOKENS_AT_16_BITS
    budget = budget_bytes or kv_bytes_per_token(folder) * tokens

    import torch

    gpu = torch.cuda.is_available()
    environment = dict(os.environ)
    if not gpu:
        environment.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    command = server_command(folder, host, port, budget, gpu, [*flags, *(extra or [])])
    print("pmkvq: " + ("GPU found: Triton kernels, CUDA graphs off" if gpu else "no GPU found: CPU path"))
    print("pmkvq: starting", shlex.join(command), flush=True)
    return _supervise(command, environment, f"http://{host}:{port}", requests)


def _supervise(command: list[str], environment: dict[str, str], base_url: str, requests: list[Example]) -> int:
    stop, kill = threading.Event(), threading.Event()

    def on_signal(*_: object) -> None:
        (kill if stop.is_set() else stop).set()

    # Handlers first: a signal between start and registration must not leave the server behind.
    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A session of its own: Ctrl-C in the terminal reaches the server through us only, once.
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not stop.is_set() and server.poll() is None and not _healthy(base_url):
                if time.monotonic() > deadline:
                    print(f"pmkvq: not healthy after {START_TIMEOUT_S:.0f} s, giving up", file=sys.stderr)
                    kill.set()
                    return 1
                stop.wait(0.5)
            if not stop.is_set() and server.poll() is None:
                print(_banner(base_url, requests), flush=True)
            while not stop.is_set() and server.poll() is None:
                stop.wait(0.5)
            if stop.is_set():
                print("pmkvq: stopping the server; Ctrl-C again to kill it", flush=True)
                return 0
            return server.returncode or 0
        finally:
            _end(server, kill)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(server: subprocess.Popen[bytes], kill: threading.Event) -> None:
    """SIGTERM, some patience, then the whole session: schedulers must not outlive their server."""
    if server.poll() is None:
        server.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while server.poll() is None and not kill.is_set() and time.monotonic() < deadline:
            kill.wait(0.1)
        if server.poll() is None:
            print("pmkvq: the server does not stop, killing it", file=sys.stderr, flush=True)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait()


def _banner(base_url: str, requests: list[Example]) -> str:
    lines = ["", "=" * 78, f"Ready at {base_url} (OpenAI-compatible). Ctrl-C ends it.", ""]
    for number, example in enumerate(requests, start=1):
        ending = f"; a right answer ends with {example.answer}" if example.answer else ""
        lines += [f"# problem {number}{ending}", chat_command(base_url, example.prompt, example.max_tokens), ""]
    lines += ["# what the KV cache looks like now", metrics_command(base_url), "=" * 78]
    return "\n".join(lines)
