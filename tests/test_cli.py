"""The ``pmkvq`` command: arguments, exit codes, doctor's findings, and the demo around a real process."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

import pytest

from sglang_pmkvq import __version__
from sglang_pmkvq.timeline import TimelineWriter
from sglang_pmkvq.tools import demo, doctor
from sglang_pmkvq.tools.cli import main

ROOT = Path(__file__).resolve().parent.parent


def pmkvq(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_pmkvq.tools.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=300,
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"sglang-pmkvq {__version__}\n"
    assert metadata.version("sglang-pmkvq") == __version__


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in ("doctor", "report", "serve-demo"):
        assert command in out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["report"], ["doctor", "--", "--tp", "2"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = TimelineWriter(tmp_path / "run.jsonl", {})
    tiers = {"16": 1024, "8": 0, "4": 0, "2": 0}
    writer.record({"bytes": tiers, "arena_bytes": 4096, "used_bytes": 1024, "effective_bits": 16.0})
    writer.close()
    picture = tmp_path / "picture.svg"
    assert main(["report", str(tmp_path / "run.jsonl"), "--out", str(picture)]) == 0
    assert picture.read_text().lstrip().startswith("<?xml")
    assert str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda p: None, "No such file"), (lambda p: p.write_text("hello"), "is not a timeline")],
)
def test_report_of_a_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], make, message: str) -> None:
    make(tmp_path / "x")
    assert main(["report", str(tmp_path / "x")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


# --- doctor ---


@pytest.mark.slow
def test_flags_are_in_the_servers_help() -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--kv-quant", "--pmkvq-final-bits", "--pmkvq-pool-bytes", "--pmkvq-calibration", "--pmkvq-timeline"):
        assert re.search(rf"^  {flag} ", shown, re.MULTILINE), flag


@pytest.mark.slow
def test_doctor_finds_this_environment_usable() -> None:
    done = pmkvq("doctor", "--json")
    found = json.loads(done.stdout)  # nothing else on stdout
    assert found["usable"] is True, done.stdout
    assert done.returncode == 0
    assert found["versions"]["sglang"] == metadata.version("sglang")
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**30
    assert len(found["targets"]) >= 10
    assert all(target["problem"] is None and target["why"] for target in found["targets"])
    flags = [refusal["flag"] for refusal in found["refusals"]]
    assert "--speculative-algorithm" in flags
    assert "a model with attention sinks" in flags
    assert all(refusal["reason"] and refusal["way_out"] for refusal in found["refusals"])


@pytest.mark.slow
def test_doctor_says_what_is_wrong() -> None:
    done = pmkvq("doctor", env={"SGLANG_PLUGINS": "other", "SGLANG_USE_HND_KVCACHE": "1"})
    assert done.returncode == 1
    assert "[FAIL] entry point: SGLANG_PLUGINS=other leaves 'pmkvq' out" in done.stdout
    assert "[FAIL] environment:" in done.stdout
    assert "SGLANG_USE_HND_KVCACHE=1" in done.stdout
    assert "CANNOT serve here" in done.stdout


def test_one_changed_target_makes_it_unusable() -> None:
    target = doctor.TargetCheck("sglang.a.b", "around", "because", None)
    checks = [doctor.Check("python", True, "3.11")]
    hardware = {"cpu": "x", "cores": 1, "memory_bytes": 1, "gpus": []}
    good = doctor.Diagnosis({}, hardware, checks, [target], [])
    changed = doctor.TargetCheck("sglang.a.b", "around", "because", "parameters changed")
    bad = doctor.Diagnosis({}, hardware, checks, [target, changed], [])
    assert good.usable
    assert "[ok  ] sglang.a.b (around): because" in good.text()
    assert not bad.usable
    assert "[FAIL] sglang.a.b (around): parameters changed" in bad.text()


def test_a_broken_installation_is_a_finding() -> None:
    def broken() -> tuple[bool, str]:
        raise ImportError("libcuda.so.1: cannot open\nsecond line")

    check = doctor._attempt("torch", broken)
    assert check == doctor.Check("torch", False, "ImportError: libcuda.so.1: cannot open")


# --- serve-demo ---


def write_config(folder: Path, **values: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_kv_bytes_per_token(tmp_path: Path) -> None:
    gqa = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    assert demo.kv_bytes_per_token(write_config(tmp_path / "a", **gqa, head_dim=128)) == 2 * 6 * 2 * 128 * 2
    assert demo.kv_bytes_per_token(write_config(tmp_path / "b", **gqa)) == 2 * 6 * 2 * 64 * 2
    with pytest.raises(ValueError, match="no 'num_hidden_layers'"):
        demo.kv_bytes_per_token(write_config(tmp_path / "c", num_attention_heads=4, hidden_size=64))
    with pytest.raises(ValueError, match="holds no readable config.json"):
        demo.kv_bytes_per_token(tmp_path)


def test_examples_are_problems_with_answers() -> None:
    found = demo.examples(demo.BUNDLED_MODEL)
    assert len(found) == demo.EXAMPLES
    assert len({example.prompt for example in found}) == demo.EXAMPLES
    from benchmarks.reasoner import task

    for number, example in enumerate(found):
        problem = task.make_problem(task.EVAL_SEED_START + number, demo.EXAMPLE_LINES)
        assert example.prompt == problem.prompt
        assert problem.chain.endswith(example.answer)


def test_a_model_without_a_task_gets_a_plain_question(tmp_path: Path) -> None:
    (example,) = demo.examples(tmp_path)
    assert example.prompt.endswith("?" + " Think step by step.")
    assert example.answer == ""


def test_chat_command_survives_the_shell() -> None:
    """What a shell makes of the printed line is the request that was meant, quotes and all."""
    prompt = """it's "1;2"\n$HOME `id` \\ é"""
    words = shlex.split(demo.chat_command("http://h:1", prompt))
    assert words[:3] == ["curl", "-sf", "http://h:1/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": prompt}]
    echoed = subprocess.run(
        [
            "bash",
            "-c",
            f"echo() {{ printf '%s' \"${{@: -1}}\"; }}; {demo.chat_command('u', prompt)}".replace("curl", "echo", 1),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(echoed) == body


def test_server_command_by_device(tmp_path: Path) -> None:
    cpu = demo.server_command(tmp_path, "127.0.0.1", 1, 99, gpu=False, extra=["--page-size", "32"])
    gpu = demo.server_command(tmp_path, "127.0.0.1", 1, 99, gpu=True, extra=[])
    assert cpu[cpu.index("--device") + 1] == "cpu"
    assert cpu[-2:] == ["--page-size", "32"]
    assert "--device" not in gpu
    assert "--disable-decode-cuda-graph" in gpu
    for command in (cpu, gpu):
        assert command[command.index("--kv-quant") + 1] == "pmkvq"
        assert command[command.index("--pmkvq-pool-bytes") + 1] == "99"
        assert "--enable-metrics" in command


def test_port_in_use_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 64}
    folder = write_config(tmp_path / "m", **config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve-demo", "--model", str(folder), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


SERVER = textwrap.dedent(
    """
    import http.server, os, signal, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(sys.argv[2], "w").write(f"{os.getpid()} {child.pid}")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
        def log_message(self, *args): pass
    if sys.argv[3] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[3] == "dies":
        sys.exit(7)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def supervise(tmp_path: Path, kind: str, patience: float = 1.0) -> tuple[subprocess.Popen[str], Path]:
    """The demo's supervisor around a small HTTP server that has a child, as SGLang has schedulers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, pids = tmp_path / "server.py", tmp_path / "pids"
    script.write_text(SERVER)
    code = (
        f"import sys; from sglang_pmkvq.tools import demo; demo.STOP_TIMEOUT_S = {patience}\n"
        f"command = [sys.executable, {str(script)!r}, {str(port)!r}, {str(pids)!r}, {kind!r}]\n"
        f"sys.exit(demo._supervise(command, {{}}, 'http://127.0.0.1:{port}', [demo.Example('p', '#:1')]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process, pids


def wait_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    seen = ""
    while "# what the KV cache looks like now" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


def assert_gone(pids: Path) -> None:
    deadline = time.monotonic() + 5
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline, "a process of the server is left"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["polite", "stubborn"])
def test_a_signal_ends_the_server_and_its_children(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    process, pids = supervise(tmp_path, kind)
    assert "a right answer ends with #:1" in wait_ready(process)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopping the server" in rest
    assert ("killing it" in rest) == (kind == "stubborn")
    assert_gone(pids)


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    process, pids = supervise(tmp_path, "stubborn", patience=600.0)
    wait_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "stopping the server" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert "killing it" in rest
    assert_gone(pids)


def test_a_server_that_dies_passes_its_status_on(tmp_path: Path) -> None:
    process, pids = supervise(tmp_path, "dies")
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 7
    assert "Ready at" not in out
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
