"""Every example runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reasoner import task

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 900


def run(name: str) -> str:
    """What an example prints, with nothing set that this test run needed for itself."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "PYTEST_"))}
    command = [sys.executable, f"examples/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def check_engine(output: str) -> None:
    """Both answers are right, though the pool had to shrink pages for them."""
    answers = re.findall(r"^  (t.*)$", output, re.MULTILINE)
    assert [task.parse_answer(text) for text in answers] == [5, 0], output[-2000:]
    shrunk = re.search(r"^pages shrunk \(bits\): 16->8 \d+", output, re.MULTILINE)
    assert shrunk, output[-2000:]
    bits = re.search(r"mean over forwards: ([\d.]+)$", output, re.MULTILINE)
    assert bits and 4 < float(bits[1]) < 16


def check_kernels(output: str) -> None:
    """The kernels are those of plain attention over what the pages hold."""
    errors = re.findall(r"error of the kernels ([\d.]+), of shrinking random keys and values ([\d.]+)", output)
    assert len(errors) == 2, output
    assert all(float(kernels) < 0.01 < 0.1 < float(coding) for kernels, coding in errors)


EXAMPLES = {"engine": check_engine, "kernels": check_kernels}
MARKS = {"engine": pytest.mark.server}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in EXAMPLES])
def test_example_runs_and_prints_what_it_promises(name: str) -> None:
    EXAMPLES[name](run(name))


def test_every_example_is_run() -> None:
    found = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert set(found) == set(EXAMPLES)
    for name, text in found.items():
        assert f".venv/bin/python examples/{name}.py" in text
