"""The GPU suite without a GPU: limits, resuming, how it reads logs and traces; and a dry run on real servers."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import kernel_table, kernels
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import step_profile, throughput
from benchmarks.gpu.cells import (
    GIB,
    MODELS,
    SYSTEMS,
    Cell,
    CheckFailed,
    Clock,
    Context,
    TimeUp,
    open_results,
    run_cells,
    server_args,
)
from benchmarks.harness.methods import bytes_per_token
from benchmarks.harness.results import Key, Results
from benchmarks.kernel_cases import MIXES
from sglang_pmkvq.tools import cli

ROOT = Path(__file__).resolve().parent.parent


def context(tmp_path: Path, limit_s: float = 60.0, only: str | None = None) -> Context:
    options = argparse.Namespace(only=only, seconds=1.0, rounds=1)
    return Context(tmp_path, True, options, Clock(limit_s))


# -- limits and resuming -------------------------------------------------------------------------------------


def test_a_limit_interrupts_whatever_runs() -> None:
    def guarded() -> None:
        try:
            subprocess.run(["sleep", "20"])
        except Exception:  # what guards a step against its own errors must not swallow it
            pytest.fail("TimeUp was caught as an Exception")

    clock = Clock(60)
    start = time.monotonic()
    with pytest.raises(TimeUp), clock.limit(0.2):
        guarded()
    assert 0.2 <= time.monotonic() - start < 5
    with clock.limit(0.2):
        pass
    time.sleep(0.3)  # a limit that was left says nothing any more


def test_an_inner_limit_gives_way_to_the_outer_one() -> None:
    def inner(clock: Clock, seconds: float) -> None:
        with clock.limit(seconds):
            time.sleep(60)

    # Minutes left, so that a machine that stands still for a while changes nothing.
    clock = Clock(120)
    with clock.limit(), pytest.raises(TimeUp):
        inner(clock, 0.1)
    assert 60 < clock.left() < 120
    clock = Clock(0.3)
    with clock.limit(), pytest.raises(TimeUp):
        inner(clock, 30)
    assert -30 < clock.left() <= 0


def test_cells_are_resumed_failures_and_cuts_measured_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def good(values: dict[str, Any]) -> None:
        ran.append("good")
        values["figure"] = 1

    def bad(values: dict[str, Any]) -> None:
        ran.append("bad")
        values["partial"] = 2
        raise CheckFailed("wrong answer")

    def slow(values: dict[str, Any]) -> None:
        ran.append("slow")
        values["partial"] = 3
        time.sleep(20)

    cells = [
        Cell({"c": "good"}, good, 0),
        Cell({"c": "bad"}, bad, 0),
        Cell({"c": "slow"}, slow, 0),
        Cell({"c": "x"}, good, 0),
    ]
    this = context(tmp_path)
    results = open_results(this, "part")  # imports SGLang for its version
    this.clock = Clock(2.0)
    assert run_cells(this, results, cells) is False
    assert ran == ["good", "bad", "slow"]
    rows = {row["key"]["c"]: row for row in json.loads((tmp_path / "part.json").read_text())["rows"]}
    assert rows["good"]["figure"] == 1 and rows["good"]["commit"]
    assert "wrong answer" in rows["bad"]["failed"] and rows["bad"]["partial"] == 2
    assert "by the part's limit" in rows["slow"]["cut_off"] and rows["slow"]["partial"] == 3
    ran.clear()
    this = context(tmp_path, 60.0)
    results = open_results(this, "part")
    assert run_cells(this, results, [Cell({"c": "slow"}, good, 0), *cells[:2], cells[3]]) is True
    assert ran == ["good", "bad", "good"]
    assert sum("failed" in row for row in results.rows) == 1


def test_a_cell_that_cannot_end_is_not_begun_but_the_first_always_is(tmp_path: Path) -> None:
    ran: list[int] = []
    this = context(tmp_path, 5.0)
    cells = [Cell({"c": i}, lambda values, i=i: ran.append(i), 1000.0) for i in range(2)]
    assert run_cells(this, open_results(this, "part"), cells) is False
    assert ran == [0]


def test_only_chooses_cells(tmp_path: Path) -> None:
    ran: list[str] = []
    this = context(tmp_path, only="age-4")
    cells = [Cell({"system": s}, lambda values, s=s: ran.append(s)) for s in ("stock", "age-4", "age-2")]
    assert run_cells(this, open_results(this, "part"), cells) is True
    assert ran == ["age-4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_limit_that_leaves_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "--limit-s", "10", "--dry-run"])
    assert "--limit-s 10: expected more than" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kernels", "ledger", "gpu"])
def test_it_is_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", name, "--help"])
    assert "--out" in capsys.readouterr().out


def test_no_part_takes_more_than_nine_minutes_by_itself() -> None:
    assert suite.LIMIT_S <= 9 * 60


def test_kernel_table_keeps_whole_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of which a row is missing or failed is made anew as a whole; so is all that other code has made."""
    made: list[Key] = []

    def row(bench: kernel_table.Bench, key: Key, body: object) -> None:
        made.append(key)

    monkeypatch.setattr(kernel_table.Bench, "row", row)
    cells = [{"batch": batch, "tokens": 64, "gqa": 4, "kv_heads": 1} for batch in (1, 8, 32)]
    names = list(MIXES)

    def results(commit: str | None = None) -> Results:
        out = Results(tmp_path / "k.json", "kernels", {}, [])
        out.commit = commit or out.commit
        kernel_table.keep_good_rows(out)
        return out

    first = results()
    for i, cell in enumerate(cells):
        first.add({"part": "decode", "baseline": "sglang_triton", **cell}, p50_us=1.0)
        for name in names[: 1 if i == 1 else None]:  # the second one was cut off
            failed = {"failed": "x"} if (i, name) == (2, names[1]) else {}
            first.add({"part": "decode", "mix": name, **cell}, p50_us=1.0, **failed)
    again = results()
    bench = kernel_table.Bench(again, None, torch.bfloat16)
    for cell in cells:
        bench.attention("decode", cell)
    whole = [{"mix": names[0]}, {"baseline": "sglang_triton"}, *({"mix": name} for name in names[1:])]
    assert made == [{"part": "decode", **key, **cell} for cell in cells[1:] for key in whole]
    assert {row["key"]["batch"] for row in again.rows} == {1}
    assert results("another").rows == []


# -- logs ----------------------------------------------------------------------------------------------------

LOG = """
[2026-11-26 03:40:48] Prefill batch, #new-seq: 1, #new-token: 64, #running-req: 0, #queue-req: 7
[2026-11-26 03:40:48] Decode batch, #running-req: 10, #token: 1000, token usage: 0.34, #pages 16/8/4/2: 6.0/2.2/4.7/0.2, eff bits: 8.00, cuda graph: True, gen throughput (token/s): 500.00, #queue-req: 3
[2026-11-26 03:40:49] Decode batch, #running-req: 20, #token: 3000, token usage: 0.34, #pages 16/8/4/2: 6.0/2.2/4.7/0.2, eff bits: 4.00, cuda graph: True, gen throughput (token/s): 2000.00, #queue-req: 1
[2026-11-26 03:40:50] Decode batch, #running-req: 4, #token: 400, token usage: 0.34, cuda graph: True, gen throughput (token/s): 400.00, #queue-req: 0
"""  # noqa: E501


def test_decode_lines_of_ours_and_of_stock() -> None:
    ours, _, stock = throughput.decode_lines(LOG, 16.0)
    assert ours == throughput.DecodeLine(10, 1000, 8.0, 500.0, 3)
    assert stock == throughput.DecodeLine(4, 400, 16.0, 400.0, 0)
    assert ours.seconds == 0.02


def test_figures_of_the_log_are_weighted_by_time() -> None:
    lines = [line for line in throughput.decode_lines(LOG) if line.queued]
    got = throughput.log_figures(lines, token_bytes=1000)
    assert got is not None
    # Steps of 20 ms and 10 ms: 30 tokens in 30 ms.
    assert (got["tok_s"], got["step_ms"], got["running_mean"], got["running_peak"]) == (1000.0, 15.0, 15.0, 20)
    # 1000 tokens at half of 16 bits and 3000 at a quarter, 1.25 MB in 30 ms.
    assert got["kv_gb_s"] == 0.0 and throughput.log_figures(lines, 1000**2)["kv_gb_s"] == pytest.approx(41.7)
    assert throughput.log_figures([], 1000) is None


def test_table_compares_with_stock_of_the_same_round() -> None:
    def row(system: str, tok_s: float, round_: int = 0) -> dict[str, Any]:
        key = {"model": "m", "kv_bytes": GIB, "system": system, "round": round_, "workloads": "w"}
        figures = throughput.log_figures([throughput.DecodeLine(10, 100, 16.0, tok_s, 1)], 1000)
        return {
            "key": key,
            "rows": [{"workload": "w", "client": None, "saturated": figures, "all": figures, "retractions": 0}],
        }

    lines = throughput.table(
        [row("stock", 100), row("age-2", 520), row("stock", 200, 1), row("age-2", 600, 1)]
    ).splitlines()
    assert [line.split(" | ")[5] for line in lines[2:]] == ["1.00", "5.20", "1.00", "3.00"]


# -- traces --------------------------------------------------------------------------------------------------


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 0) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 1, "tid": tid}


def test_shares_of_a_step() -> None:
    trace = {
        "traceEvents": [
            event("count_kernel", 0, 100),
            event("decode_kernel", 200, 300),
            event("nvjet_tst_128x64", 500, 400),
            event("copy_kernel", 850, 150, tid=1),  # beside the product, on another stream
            event("aten::mm", 0, 5000, "cpu_op"),
            {"ph": "M", "name": "thread_name"},
        ]
    }
    got = step_profile.shares(trace, steps=2)
    assert got["of"] == "kernels" and got["step_ms"] == 0.5
    assert got["ms_per_step"] == {
        "matrix products": 0.2,
        "attention": 0.15,
        "shrink": 0.075,
        "plan": 0.05,
        "host": 0.05,
    }
    assert got["share"]["host"] == 0.1 and got["longest"][0]["name"] == "nvjet_tst_128x64"


def test_operators_count_with_those_that_they_call() -> None:
    trace = {
        "traceEvents": [
            event("aten::linear", 0, 100, "cpu_op"),
            event("aten::addmm", 10, 60, "cpu_op"),
            event("aten::copy_", 20, 10, "cpu_op"),
            event("aten::argmax", 150, 50, "cpu_op"),
            event("aten::copy_", 90, 20, "cpu_op", tid=1),  # beside the product, on another thread
        ]
    }
    got = step_profile.shares(trace, steps=1)
    assert got["of"] == "operators"
    assert got["ms_per_step"] == {"matrix products": 0.1, "sampling": 0.05, "host": 0.04, "copies": 0.02}
    with pytest.raises(CheckFailed, match="no kernels and no operators"):
        step_profile.shares({"traceEvents": []}, 1)


def test_every_kernel_of_ours_has_a_category() -> None:
    source = "".join(path.read_text() for path in (ROOT / "kernels" / "triton").glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    assert len(names) >= 10
    got = {name: step_profile.category(name) for name in names}
    assert set(got.values()) == {"shrink", "plan", "store", "attention"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<...>", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<...>", "attention"),
        ("_fwd_grouped_kernel_stage1", "attention"),
        ("create_flashinfer_kv_indices_triton", "plan"),
        ("nvjet_tst_64x32_64x16_2x1_v_bz_TNN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_gemm>", "matrix products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_silu", "other"),
    ],
)
def test_categories_of_stock_kernels(name: str, expected: str) -> None:
    assert step_profile.category(name) == expected


# -- models and servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("r1-distill-qwen-7b", 7_615_616_512, 57_344),
        ("r1-distill-llama-8b", 8_030_261_248, 131_072),
        ("qwen3-8b", 8_190_735_360, 147_456),
    ],
)
def test_configurations_have_the_published_sizes(name: str, parameters: int, kv_bytes: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert bytes_per_token(MODELS / name) == kv_bytes


def test_plans_name_models_and_systems_and_begin_with_the_goal() -> None:
    for plan in (*throughput.PLANS, *throughput.DRY_PLANS):
        assert (MODELS / plan.model / "config.json").exists()
        assert plan.systems[0] == "stock"
        assert set(plan.systems) <= set(SYSTEMS)
    first = throughput.PLANS[0]
    assert (first.kv_bytes, str(first.workloads[0])) == (8 * GIB, "512 in, 8192 out, 256 at a time")
    assert {"stock", "age-4", "age-2", "static-2", "stock-fp8", "stock-triton"} == set(first.systems)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert f"of its {sum(len(plan.systems) for plan in throughput.PLANS)} servers" in page


def test_all_systems_get_the_same_flags_but_for_the_cache(tmp_path: Path) -> None:
    this = Context(tmp_path, False, argparse.Namespace())
    plan = throughput.PLANS[0]
    names = ("stock", "stock-triton", "age-4", "age-2")
    args = {name: server_args(this, name, plan.model, *plan.size) for name in names}
    cache = {"--max-total-tokens", "--page-size", "--attention-backend"}

    def flags(name: str) -> dict[str, str]:
        pairs = dict(zip(args[name][::2], args[name][1::2], strict=True))
        return {k: v for k, v in pairs.items() if k not in cache and not k.startswith("--pmkvq")}

    assert flags("stock") == flags("age-4") == flags("age-2") == flags("stock-triton")
    assert "flashinfer" in args["stock"] and "triton" in args["stock-triton"]


def test_parts_name_tests_and_tables_that_exist(tmp_path: Path) -> None:
    this = context(tmp_path)
    named = [cell.run.args[2][-1] for cell in suite.smoke_cells(this)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if "::" in line] == named
    assert [cell.key["table"] for cell in suite.kernel_cells(this)] == list(kernels.PARTS)


def test_what_a_module_says_of_its_failure_is_kept(tmp_path: Path) -> None:
    this, log = context(tmp_path), tmp_path / "logs" / "x.log"
    log.parent.mkdir()
    with pytest.raises(CheckFailed, match="--only shrinkage: expected one of decode"):
        suite.run_module(this, "x", ["benchmarks.kernels", "--only", "shrinkage"], {})
    this.clock = Clock(3.0)
    with pytest.raises(TimeUp), this.clock.limit():
        suite.run_module(this, "x", ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], {})
    assert "KeyboardInterrupt" in log.read_text()  # it had time to end what it had started


def dry_run(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


@pytest.mark.full
@pytest.mark.server
def test_dry_run_of_the_throughput_of_one_server(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--parts", "3", "--only", "age-4")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows_of(tmp_path / "throughput.json")
    saturated, few = row["rows"]
    assert saturated["client"]["output_tokens"] == 20 * 120 and few["client"]["output_tokens"] == 2 * 8
    assert saturated["saturated"] is not None and few["saturated"] is None
    assert row["kv_bytes"] <= 448 << 10 and sum(saturated["pool"]["shrinks"].values()) > 0
    assert "--load-format dummy" in row["servers"][0] and "age-4" in (tmp_path / "throughput.md").read_text()


@pytest.mark.full
@pytest.mark.server
def test_dry_run_of_every_part(tmp_path: Path) -> None:
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {part.name: rows_of(tmp_path / f"{part.name}.json") for part in suite.PARTS}
    assert not [row for rows in found.values() for row in rows if {"failed", "cut_off"} & row.keys()]
    assert [row["key"]["table"] for row in found["kernels"]] == list(kernels.PARTS)
    assert [row["key"]["test"] for row in found["smoke"]] == list(suite.SMOKE)
    assert {row["key"]["system"] for row in found["throughput"]} == set(SYSTEMS) - {"stock-triton"}
    assert found["unsaturated"][0]["rows"][0]["shrinks"] == 0
    assert found["profile"][0]["of"] == "operators" and found["profile"][0]["share"]["attention"] > 0
