"""Every command of the README runs as it is written there.

``bash`` and ``python`` blocks are run in order, in the repository root. A server command stays up for
the commands after it and is ended before the next one. Left out: ``make test`` (this suite), what
is marked ``# needs GPU`` on a machine without one, and what fetches a model where no package registry answers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.reasoner import task
from sglang_pmkvq.tools import demo
from tests.support.real_models import registry_answers

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NEEDS_GPU = "# needs GPU"
# SGLang cannot serve these models without their weights, which come from the package registry.
NEEDS_REGISTRY = re.compile(r"\bmake serve MODEL=|\bmodels get\b")
SUITE = re.compile(r"^make (test|test-full)\b")
SERVER = re.compile(r"\bmake serve\b|sglang\.launch_server|\bsglang serve\b|\bserve-demo\b")
START_TIMEOUT_S = 900
URL = "http://127.0.0.1:30000"


@dataclass(frozen=True)
class Command:
    """One command of a fenced block; ``line`` is where it stands in the README."""

    line: int
    language: str
    text: str

    @property
    def skipped(self) -> bool:
        return (
            bool(SUITE.match(self.text))
            or NEEDS_GPU in self.text
            or (bool(NEEDS_REGISTRY.search(self.text)) and not registry_answers())
        )

    @property
    def is_server(self) -> bool:
        return self.language == "bash" and bool(SERVER.search(self.text))


def commands(text: str) -> list[Command]:
    """The commands of the ``bash`` blocks, one per line (``\\`` continues it), and whole ``python`` blocks."""
    found: list[Command] = []
    language: str | None = None
    collected: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            if language == "python":
                found.append(Command(start, language, "\n".join(collected)))
            language, collected, start = (
                (line[3:].strip() or "text", [], number + 1) if language is None else (None, [], 0)
            )
        elif language == "python":
            collected.append(line)
        elif language == "bash":
            if not collected:
                start = number
            collected.append(line)
            if not line.endswith("\\"):
                command = "\n".join(collected).strip()
                if command and not command.startswith("#"):
                    found.append(Command(start, language, command))
                collected = []
    assert language is None, "a fence is not closed"
    return found


def test_blocks_are_taken_apart() -> None:
    text = "a\n```bash\n# note\nmake x\n\ncurl a \\\n  -d b | grep c\n```\n```text\nno\n```\n```python\nf()\ng()\n```\n"
    assert commands(text) == [
        Command(4, "bash", "make x"),
        Command(6, "bash", "curl a \\\n  -d b | grep c"),
        Command(13, "python", "f()\ng()"),
    ]
    assert Command(1, "bash", "make test").skipped
    assert not Command(1, "bash", "make check").skipped
    assert Command(1, "bash", "sglang serve --x  # needs GPU").skipped
    assert Command(1, "bash", ".venv/bin/sglang serve --x").is_server
    assert not Command(1, "bash", "curl -s x").is_server


def test_first_command_comes_before_line_40() -> None:
    first = commands(README.read_text())[0]
    assert first.line < 40
    assert first.text.startswith("make ")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([a-z][a-z-]*)", README.read_text())
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())
    assert links
    for link in links:
        if "://" not in link:
            assert (ROOT / link).exists(), link


def users_environment(tmp_path: Path) -> dict[str, str]:
    """Nothing set that this test run needed for itself: what CPU mode needs, the commands must see to.

    The cache of models is empty, as a new user's.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "PYTEST_"))}
    return {**kept, "PMKVQ_MODELS": str(tmp_path / "models")}


class Server:
    """A server command in the background, as a user would leave it in another terminal."""

    def __init__(self, command: Command, log: Path) -> None:
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", command.text],
                cwd=ROOT,
                env=users_environment(log.parent),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, f"the server died:\n{self.tail()}"
            assert time.monotonic() < deadline, f"not healthy:\n{self.tail()}"
            try:
                with urllib.request.urlopen(f"{URL}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """Ctrl-C, as it is typed: to the whole foreground group; then whatever is left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        deadline = time.monotonic() + 60
        while True:  # the next command may want the port
            try:
                with urllib.request.urlopen(f"{URL}/health", timeout=5):
                    pass
            except urllib.error.HTTPError:
                pass
            except (urllib.error.URLError, OSError):
                return
            assert time.monotonic() < deadline, "a stopped server still answers"
            time.sleep(0.5)


def check_output(command: Command, output: str) -> None:
    """A chat completion must be the right answer to the problem in the command."""
    if "engine.generate" in command.text:
        assert output.rstrip().endswith("#:5"), output[-2000:]  # t3 = 2 + 3
    if "/v1/chat/completions" not in command.text:
        return
    prompt = re.search(r'"content":\s*"([^"]*)"', command.text)
    assert prompt, "no problem in the command"
    lines = prompt[1].count(";")
    problem = task.make_problem(task.EVAL_SEED_START, lines)
    assert problem.prompt == prompt[1], "the README's problem is make_problem(EVAL_SEED_START, lines)"
    answer = json.loads(output)["choices"][0]["message"]["content"]
    assert task.check(problem, answer), answer


def check_demo(server: Server, examples: Sequence[demo.Example]) -> None:
    """The printed problems, pasted one after the other: right answers, and pages that shrink where one can see it."""
    deadline = time.monotonic() + 60
    while "metrics" not in server.log.read_text(errors="replace").partition("curl ")[2]:
        assert time.monotonic() < deadline, f"nothing to paste was printed:\n{server.tail()}"
        time.sleep(0.5)
    printed = re.findall(r"^\s*(curl .*/v1/chat/completions .*)$", server.log.read_text(), re.MULTILINE)
    assert len(printed) == len(examples)
    for line, example in zip(printed, examples, strict=True):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600, check=True)
        answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
        assert answer.rstrip().endswith(example.answer), answer[-200:]
    with urllib.request.urlopen(f"{URL}/metrics", timeout=30) as response:
        metrics = response.read().decode()
    shrunk = re.findall(r"^sglang:pmkvq_shrinks_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert sum(map(float, shrunk)) > 0
    assert "#pages 16/8/4/2: " in server.log.read_text()


@pytest.mark.server
@pytest.mark.slow
def test_commands_run_as_written(tmp_path: Path) -> None:
    server: Server | None = None
    ran = 0
    # A new user has no files of an earlier run, perhaps of another version, where the README writes.
    for written in set(re.findall(r"/tmp/pmkvq-(?:results|page)\b", README.read_text())):
        shutil.rmtree(written, ignore_errors=True)
    try:
        for command in commands(README.read_text()):
            if command.skipped:
                continue
            ran += 1
            if command.is_server:
                if server is not None:
                    server.stop()
                server = Server(command, tmp_path / f"server-{command.line}.log")
                server.wait_healthy()
                if command.text == "make serve":
                    check_demo(server, demo.examples(demo.BUNDLED_MODEL))
                elif command.text.startswith("make serve MODEL="):
                    check_demo(server, demo.CHAT_EXAMPLES)
                continue
            if command.language == "python":
                script = tmp_path / f"readme_{command.line}.py"
                script.write_text(command.text)
                arguments = [str(ROOT / ".venv" / "bin" / "python"), str(script)]
            else:
                arguments = ["bash", "-o", "pipefail", "-c", command.text]
            env = users_environment(tmp_path)
            done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
            where = f"README.md:{command.line}: {command.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, where
            check_output(command, done.stdout)
    finally:
        if server is not None:
            server.stop()
    assert ran >= 3
