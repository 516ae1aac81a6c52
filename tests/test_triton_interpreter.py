"""Runs ``tests/interpreter`` in processes that interpret Triton kernels on the CPU; see its conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests" / "interpreter").glob("test_*.py"), key=lambda path: path.name)


def interpret(path: Path, markers: str) -> str:
    """pytest's output for a file under the interpreter; fails with it if a test did."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout[-8000:] + done.stderr[-2000:], pytrace=False)
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_under_the_interpreter(path: Path) -> None:
    output = interpret(path, "not full")
    assert " passed" in output and "skipped" not in output


@pytest.mark.full
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_whole_matrix_under_the_interpreter(path: Path) -> None:
    # A file without tests of the full matrix deselects all of its own (pytest exits with 5).
    if "pytest.mark.full" in path.read_text():
        assert " passed" in interpret(path, "full")


def test_folder_is_left_out_of_the_ordinary_process() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/interpreter"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "no tests" in done.stdout, done.stdout
