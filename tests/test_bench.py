"""Parts of the benchmarks that need no server: tasks and their checkers, methods, result files, tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy, report
from benchmarks.harness import experiment, tasks
from benchmarks.harness.methods import Method, bytes_per_token, label, methods
from benchmarks.harness.results import ROOT, Results
from benchmarks.harness.servers import REASONER, ServerFailed
from benchmarks.harness.stats import bootstrap, wilson
from sglang_pmkvq.tools import cli
from sglang_pmkvq.tools.cli import BENCHES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", Fraction(42)),
        ("-1,234.50", Fraction(-2469, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        ("$0.5$", Fraction(1, 2)),
        ("50\\%", Fraction(50)),
        ("1/0", None),
        ("x", None),
        (r"\frac{x}{4}", None),
        ("", None),
    ],
)
def test_number(text: str, expected: Fraction | None) -> None:
    assert tasks.number(text) == expected


@pytest.mark.parametrize(
    ("checker", "text", "answer", "right"),
    [
        ("exact", "  two  words ", "two words", True),
        ("exact", "two words more", "two words", False),
        ("numeric", "so it is 1,024 in all.", "1024", True),
        ("numeric", "first 7, then 8", "7", False),
        ("numeric", r"7 or \boxed{\frac{1}{2}} or 9", "0.5", True),
        ("numeric", r"\boxed{x = 12}", "12", True),
        ("numeric", "no number here", "3", False),
        ("numeric", "<think>maybe 3</think>4", "3", False),
        ("boxed", r"<think>\boxed{1}</think> \boxed{2}", "2", True),
        ("boxed", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
        ("boxed", r"\boxed{\dfrac{\sqrt{2}}{2}}", r"\frac{\sqrt{2}}{2}", True),
        ("boxed", r"\boxed{\text{Evelyn}}", "Evelyn", True),
        ("boxed", r"\boxed{90^\circ}", "90", True),
        ("boxed", r"\boxed{12", "12", False),
        ("boxed", "it is 12", "12", False),
        ("choice", r"\boxed{\textbf{(B)}}", "B", True),
        ("choice", "The answer is (C).", "C", True),
        ("choice", "The answer is clear.\nD", "D", True),
        ("choice", "Answer: **A**", "B", False),
        ("choice", "A man walks", "A", False),
    ],
)
def test_checkers(checker: str, text: str, answer: str, right: bool) -> None:
    assert tasks.CHECKERS[checker](text, answer) is right


def test_files_as_they_are_published(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"id": 1, "problem": "2+2?", "answer": 4},
        {"problem": "x?", "solution": "…", "answer": r"\frac{1}{2}", "level": 3},
        {"Question": "Which?", "Correct Answer": "yes", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}},
        {"messages": [{"role": "user", "content": "say hi"}], "answer": "hi", "checker": "exact"},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    items = tasks.load_jsonl(path, None, seed=0)
    assert [i.check(t) for i, t in zip(items, [r"\boxed{4}", r"\boxed{0.5}", "", "hi"], strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip
    options = dict(re.findall(r"^([A-D])\) (.*)$", items[2].messages[0]["content"], re.M))
    assert sorted(options.values()) == ["no 1", "no 2", "no 3", "yes"]
    assert options[items[2].answer] == "yes"
    assert items[2].check(rf"\boxed{{{items[2].answer}}}")
    orders = {tasks.load_jsonl(path, None, seed=s)[2].answer for s in range(20)}
    assert len(orders) > 1
    assert tasks.load_jsonl(path, None, seed=3)[2].messages == tasks.load_jsonl(path, None, seed=3)[2].messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "no answer"),
        ('{"answer": 1}', "no prompt"),
        ("{", "t.jsonl:1"),
        ("[1]", "t.jsonl:1"),
        ('{"prompt": "a", "answer": 1, "checker": "magic"}', "magic"),
        ("", "no problems"),
    ],
)
def test_bad_files_name_the_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load_jsonl(path, None, 0)


def test_methods() -> None:
    names = "16bit,stock,stock-fp8,age-2,static-0-2:8,3-5:k4v2,uniform-4-hard,static-2-nowindow-hadamard"
    names += ",age-m.safetensors"
    found = methods(names)
    assert [m.name for m in found] == [
        "16bit", "stock", "stock-fp8", "age-2", "static-0-2:8,3-5:k4v2", "uniform-4-hard",
        "static-2-nowindow-hadamard",
        "age-m.safetensors",
    ]  # fmt: skip
    by = {m.name: " ".join(m.server_args(REASONER, 1 << 20, 4)) for m in found}
    assert "--pmkvq-final-bits 0-2:8,3-5:k4v2" in by["static-0-2:8,3-5:k4v2"]
    assert "--pmkvq-protect hard" in by["static-0-2:8,3-5:k4v2"]
    assert "--pmkvq-protect hard" in by["uniform-4-hard"]
    assert "--pmkvq-window 0" in by["static-2-nowindow-hadamard"]
    assert "--pmkvq-key-transform hadamard" in by["static-2-nowindow-hadamard"]
    assert "--pmkvq-key-transform" not in by["age-2"]
    assert "--pmkvq-calibration m.safetensors" in by["age-m.safetensors"]
    token = bytes_per_token(REASONER)
    assert f"--max-total-tokens {(1 << 20) // token}" in by["stock"]
    assert f"--max-total-tokens {(2 << 20) // token}" in by["stock-fp8"]
    assert [label(m.name) for m in found] == [m.name for m in found[:-1]] + ["age-m"]
    families = [report.family(name) for name in ("age-4-hadamard", "static-x.safetensors", "uniform-k4v2", "stock-fp8")]
    assert families == ["age, rotated", "static, calibrated", "uniform", "stock-fp8"]
    assert label("static-some/where/reasoner-2.5.pmkvq.safetensors") == "static-reasoner-2.5"
    for bad in ("int4", "age", "age-", ""):
        with pytest.raises(ValueError, match="method"):
            methods(bad)


def test_a_result_file_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = Results(path, "accuracy", {"seed": 0, "lines": "1-2"}, ["--a"])
    first.save()
    assert json.loads(path.read_text())["config"] == {"seed": 0, "lines": "1-2"}
    first.add({"m": "b"}, value=2)
    again = Results(path, "accuracy", {"seed": 0, "lines": "1-2"}, ["--b"])
    assert again.has({"m": "b"})
    assert not again.has({"m": "a"})
    again.add({"m": "a"}, missing="no such thing")
    again.order([{"m": "a"}, {"m": "b"}])
    rows = json.loads(path.read_text())["rows"]
    assert [(r["key"]["m"], r["command"]) for r in rows] == [
        ("a", "pmkvq bench accuracy --b"),
        ("b", "pmkvq bench accuracy --a"),
    ]
    with pytest.raises(ValueError, match=r"other lines, seed"):
        Results(path, "accuracy", {"seed": 1}, [])
    with pytest.raises(ValueError, match="benchmark accuracy"):
        Results(path, "kld", {"seed": 0, "lines": "1-2"}, [])
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        Results(path, "accuracy", {}, [])


def row(method: str, wrong: list[int], sample: int = 0, pool: int = 1 << 20) -> dict[str, Any]:
    return {
        "key": {"method": method, "budget_bytes": pool, "sample": sample, "problems": 10},
        "problems": 10, "right": 10 - len(wrong), "wrong": wrong, "output_tokens": 100, "peak_running": 3,
        "wall_s": 2.0, "used_bytes_peak": 1 << 20, "used_bytes_avg": 1 << 19, "effective_bits_avg": 16.0,
        "end_bits_mean": 16.0, "retractions": 0,
    }  # fmt: skip


def test_table_pools_samples_and_compares_the_same_problems() -> None:
    rows = [row("stock", [0, 1]), row("age-2", [0]), row("age-2", [1], sample=1), row("age-2", [], pool=2 << 20)]
    rows.append({"key": {**rows[0]["key"], "method": "stock-fp8"}, "missing": "not on a CPU"})
    lines = accuracy.rows_table({"rows": rows, "baseline": "stock"}).splitlines()
    assert "| stock | 1.0 | 80.0 % of 10 | 49.0 to 94.3 |" in lines[2]
    assert "90.0 % of 10 × 2" in lines[3]
    assert "+10.0 (" in lines[3]
    assert lines[4].endswith("| - |")
    assert "missing: not on a CPU" in lines[5]
    assert {line.count("|") for line in lines} == {13}
    low, high = bootstrap(np.array([0.0, 1.0] * 50))
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65
    assert wilson(0, 0) == (0.0, 1.0)


def test_page_has_a_table_per_pool_each_against_its_own_static_width() -> None:
    big, small = 4 << 20, 1 << 20
    rows = [row("age-4", [], pool=big), row("16bit", [], pool=9 << 20), row("static-4", [0], pool=big)]
    rows += [row("static-c.safetensors", [2], pool=small), row("static-2", [0, 1], pool=small)]
    first, second = (part.splitlines() for part in report.KINDS["accuracy"].table({"rows": rows}).split("\n\n"))
    assert [line.split("|")[1].strip() for line in first[2:]] == ["16bit", "static-c", "static-2"]
    assert "points against static-2 |" in first[0]
    assert "+10.0 (" in first[3]
    assert [line.split("|")[1].strip() for line in second[2:]] == ["age-4", "static-4"]
    assert "points against static-4 |" in second[0]
    assert "+10.0 (" in second[2]


def test_served_methods_are_compared_with_kivi_on_the_same_problems() -> None:
    config = {"first": 0, "lines": "1-2", "model": "m", "server_args": ""}
    rows = [row("16bit", [], pool=9 << 20), row("age-2", [0]), row("age-4", [0], pool=2 << 20)]
    served = {"benchmark": "accuracy", "config": config, "rows": rows}
    offline = [row("kivi-2", [1, 2, 3]), row("kivi-4", [])]
    for measured in offline:
        measured["key"]["lines"] = "1-2"
    kivi: dict[str, Any] = {"config": {"first": 0, "model": "m"}, "rows": offline}
    (head, _, line) = report.KINDS["offline"].more(kivi, [served]).splitlines()
    assert head == "| served, points against | kivi-2 |"
    assert line.startswith("| age-2 | +20.0 (")
    offline[0]["key"]["lines"] = "3-4"
    assert report.KINDS["offline"].more(kivi, [served]) == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--share 0.2 --samples 2", "--temperature"),
        ("--share 0.2 --pool-bytes 1MiB", "either"),
        ("", "either"),
        ("--share much", "--share much"),
        ("--share -1", "--share"),
        ("--pool-bytes 1QiB", "1QiB"),
        ("--share 0.2 --methods int4", "int4"),
        ("--share 0.2 --lines many", "--lines many"),
        ("--pool-bytes 1MiB --task nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_wrong_options_are_one_sentence(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--problems", "2", *line.replace("--share -1", "--share=-1").split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_server_args_are_split_as_a_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    options = accuracy.EXPERIMENT.parse(["--server-args", """--tp-size 2 --json-model-override-args '{"a": "b c"}'"""])
    monkeypatch.setattr(experiment, "serve", lambda model, args, quant: args)
    args: Any = experiment.serve_method(options, Method.parse("stock"), None, 1)
    assert args[-4:] == ["--tp-size", "2", "--json-model-override-args", '{"a": "b c"}']
    with pytest.raises(ValueError, match="--server-args: 'open: No closing quotation"):
        accuracy.EXPERIMENT.parse(["--server-args", "'open"])


def test_reason_is_the_last_error() -> None:
    log = "exit 1\nTraceback:\nKeyError: 1\n[time] ValueError: fp8 is not for CPUs\nKilled"
    assert ServerFailed(log).reason == "[time] ValueError: fp8 is not for CPUs"


def test_every_benchmark_is_there_and_listed() -> None:
    """What has a command line stands in BENCHES; scripts for GPU machines and for the tables of kernels stand apart."""
    home = ROOT / "benchmarks"
    for name in BENCHES:
        assert (home / f"{name}.py").is_file() or (home / name / "__main__.py").is_file(), name
    apart = {"gpu", "horizon", "kernels_aot"}
    paths = [path.relative_to(home) for path in home.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert {path.parts[0].removesuffix(".py") for path in paths} - apart <= set(BENCHES)
    assert len(BENCHES) <= 12


def test_runs_beside_each_other_share_a_file(tmp_path: Path) -> None:
    a, b = (Results(tmp_path / "r.json", "accuracy", {}, []) for _ in range(2))
    one, two, three = ({"n": n} for n in (1, 2, 3))
    a.add(one)
    b.add(two)
    a.add(three)
    assert [r["key"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]] == [one, two, three]
    assert all(row["commit"] for row in a.rows)


def test_a_row_is_measured_by_one_run_only(tmp_path: Path) -> None:
    a, b = (Results(tmp_path / "r.json", "accuracy", {}, []) for _ in range(2))
    one, two = {"n": 1}, {"n": 2}
    with a.claim([one]) as first:
        with b.claim([one]) as taken, b.claim([two]) as free:
            assert (first, taken, free) == ([one], [], [two])
    with b.claim([one]) as again:  # the other gave up without a row
        assert again == [one]
        b.add(one)
    with a.claim([one]) as done:
        assert done == []


def test_bench_runs_the_repository_from_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_pmkvq.tools.cli", "bench", "accuracy", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--share" in done.stdout
    assert cli.main(["bench", "accuracy", "--share", "much", "--out", str(tmp_path / "r.json")]) == 2
    assert "--share much" in capfd.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_report_of_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "results", tmp_path / "page"
    results.mkdir()
    assert cli.main(["report", str(results)]) == 2
    assert "holds no result file" in capfd.readouterr().err
    rows = [row("16bit", []), row("static-2", [0, 1, 2]), row("age-2", [0])]
    book = Results(results / "accuracy.json", "accuracy", {"seed": 0}, ["--share", "0.2"])
    for r in rows:
        book.add(r.pop("key"), **r)
    book = Results(results / "accuracy_fp16.json", "accuracy", {"seed": 0, "server_args": "--dtype float16"}, [])
    book.add((r := row("16bit", [])).pop("key"), **r)
    written = report.write_report(results, page)
    assert {p.name for p in written} == {"report.md", "report.html", "accuracy_frontier.png"}
    text, document = (page / "report.md").read_text(), (page / "report.html").read_text()
    assert "`pmkvq bench accuracy --share 0.2`" in text
    assert "| age-2 | 1.0 | 90.0 % of 10 |" in text
    assert "+20.0 (" in text
    assert "## Accuracy at equal bytes, with --dtype float16\n" in text
    assert "has not been run" in text
    assert document.count('<img src="data:image/png;base64,') == 1
    assert "<td>90.0 % of 10</td>" in document
    assert not re.search(r"(?:src|href)=\"http", document)
    (results / "bad.json").write_text("{")
    assert cli.main(["report", str(results), "--out", str(page)]) == 2
    assert "bad.json is not JSON" in capfd.readouterr().err
