"""The kernel benchmark on a machine without a GPU: its checks run, and it never pretends to have timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cases as kc
from benchmarks import kernel_table, kernels_cpu
from sglang_pmkvq.formats import LayerGroup, PageShape
from sglang_pmkvq.kernels.cpu import partials

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_dry_run_checks_every_part_and_times_nothing():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    assert {row["part"] for row in rows} == {"decode", "extend", "shrink", "store", "plan"}
    for part in ("decode", "extend"):
        assert {row.get("mix") for row in rows if row["part"] == part} == {*kc.MIXES, None}
        assert any(row.get("baseline") == "sglang_triton" for row in rows if row["part"] == part)
    assert len({row["chunk"] for row in rows if row["part"] == "extend"}) == 2
    assert {(row["source"], row["mix"]) for row in rows if row["part"] == "plan"} == {
        ("slots", "mix"), ("slots", "k4v2"), ("dense", "mix")
    }  # fmt: skip
    assert [row["stored"] for row in rows if row["part"] == "store"] == [1, 3, 128]
    assert not any("p50_us" in row or "failed" in row for row in rows)
    assert "FlashInfer needs a GPU" in done.stdout.splitlines()[-1]


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
    # K at 16, 16, 8, 4 and V at 16, 8, 4, 2 bits: with (zero, range) where a side is below 16.
    share = kc.page_counts(4, kc.Mix((4, 2), (0.25, 0.25, 0.25, 0.25)))
    assert share == [1, 1, 1, 1]
    got = kc.layer_bytes_of(shape, 1, 64, kc.Mix((4, 2), (0.25, 0.25, 0.25, 0.25)))
    assert got == 16 * 2 * (256 + 256 + 256 + 132 + 132 + 68 + 68 + 36)
    for name in ("mix", "k4v2"):
        case = kc.make_case(shape, 2, 1600, kc.MIXES[name], 1, torch.bfloat16, torch.device("cpu"))
        for table in case.storage.table:
            steps = (table[case.req_pages.long()] & 3).flatten()
            assert torch.bincount(steps).tolist() == [2 * n for n in kc.page_counts(100, kc.MIXES[name])]


def test_a_group_ends_where_its_mix_does():
    """A kernel holds the loops of all steps of its group: all-16 pages are timed in a group that stays at 16."""
    for name, mix in kc.MIXES.items():
        steps = LayerGroup((0,), *mix.finals).steps
        assert len(mix.shares) == len(steps) and mix.shares[-1] > 0, name


def test_the_request_table_of_a_case_names_its_pages():
    case = kc.make_case(PageShape(16, 1, 64, 64), 3, 100, kc.MIXES["mix"], 1, torch.bfloat16, torch.device("cpu"))
    source = kc.request_table(case)
    assert source.rows is not None
    assert torch.equal(source.values[source.rows][:, :: source.column_stride] // source.divisor, case.req_pages)


def test_large_batches_extend_by_less_and_long_prefixes_by_little():
    cells = kernel_table.attention_cells("extend", dry=False)
    assert {cell["batch"] for cell in cells} == {1, 8, 32, 128}
    assert {64, 2048} <= {cell["chunk"] for cell in cells if cell["tokens"] == 131072 and cell["batch"] == 1}
    assert max(c["chunk"] for c in cells if c["batch"] == 128) < max(c["chunk"] for c in cells if c["batch"] == 8)


def test_what_centres_cost_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table, its arithmetic, and that a wrong output is not timed."""
    monkeypatch.setattr(kernels_cpu, "LAYERS", 1)
    row = kernels_cpu.measure("SmolLM2-135M", "2", 2, 48, 1)
    assert len(row["ms"]) == 5 and len(row["blocks"]) == 30
    assert kernels_cpu.ratio([2.0, 4.0], [0, 1, 1]) == 0.6
    assert "| SmolLM2-135M | 2 | 2 × 48 |" in kernels_cpu.rows_table({"rows": [row]})
    assert {name: {bits: len(b) for bits, b in by.items()} for name, by in kernels_cpu.BLOCKS.items()} == {
        "Qwen2.5-Coder-1.5B": {4: 28, 2: 28},
        "Qwen2.5-Coder-0.5B": {4: 24, 2: 24},
        "SmolLM2-135M": {4: 30, 2: 30},
    }
    monkeypatch.setattr(partials, "_add_center", lambda *arguments: None)
    with pytest.raises(SystemExit, match="attention is off by"):
        kernels_cpu.measure("SmolLM2-135M", "4", 2, 48, 1)
