"""The kernel benchmark on a machine without a GPU: its checks run, and it never pretends to have timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cases as kc
from sglang_pmkvq.formats import PageShape

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/kernels.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_dry_run_checks_every_part_and_times_nothing():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    assert {row["part"] for row in rows} == {"decode", "extend", "shrink", "store", "plan"}
    assert {row["mix"] for row in rows if row["part"] == "decode"} == set(kc.MIXES)
    assert not any("p50_us" in row or "failed" in row for row in rows)
    assert "baselines" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so_and_fails():
    done = run("--only", "plan")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not done.stdout


def test_a_wrong_result_has_no_time():
    right = torch.ones(4)
    assert kc.check("x", right + 1e-4, right, 1e-2) < 1e-3
    for wrong in (right * 1.1, right * torch.nan):
        with pytest.raises(kc.CheckFailed, match="x: relative error"):
            kc.check("x", wrong, right, 1e-2)


def test_bytes_of_a_case_are_the_pools_own():
    shape = PageShape(16, 2, 128, 128)
    token_head = {"all-16": 512, "all-8": 264, "all-4": 136, "all-2": 72}
    for name, each in token_head.items():
        assert kc.layer_bytes_of(shape, 3, 64, kc.MIXES[name]) == 3 * 64 * 2 * each
    case = kc.make_case(shape, 2, 1600, kc.MIXES["mix"], 1, torch.bfloat16, torch.device("cpu"))
    steps = (case.storage.table[0][case.req_pages.long()] & 3).flatten()
    assert torch.bincount(steps).tolist() == [2 * n for n in kc.page_counts(100, kc.MIXES["mix"])]
